"""``prune``, ``unprune``, ``pruned`` and ``record``: what they refuse, what they leave behind, what they report."""

import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionModel,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokenprune import (
    PruneConfig,
    RandomConfig,
    UniformConfig,
    ZeroTPruneConfig,
    list_adapters,
    list_methods,
    prune,
    pruned,
    record,
    unprune,
)
from hf_tokenprune.adapters.vision import _adapter as vision
from hf_tokenprune.adapters.vision.vit import ViTAdapter
from hf_tokenprune.engine import current_config, find_adapter, plan
from hf_tokenprune.errors import ConfigError, PruneStateError, UnsupportedModelError
from hf_tokenprune.methods.layerwise import LayerwiseConfig
from hf_tokenprune.recording import LayerDict
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.signals import Signals

from .families import TINY, first_tensor, images, supported_classes, tiny_model

ROOT = Path(__file__).resolve().parents[1]
DEPTH = TINY["num_hidden_layers"]
FAMILIES = [name for name in list_adapters() if isinstance(get_adapter(name), ViTAdapter)]  # others: the contract
FAMILIES.remove("vit_mae")  # takes noise, and is refused with masks
OURS = [(family, cls) for family, cls in supported_classes() if family in FAMILIES]
DEFAULTS = [get_method(name)() for name in list_methods("vision") if issubclass(get_method(name), LayerwiseConfig)]
LAYERWISE = [config.method for config in DEFAULTS if hasattr(config, "layers")]
CONFIG = RandomConfig(layers=(1, 4), keep_ratios=(0.75, 0.5), seed=3)
OTHER = UniformConfig(layers=(2,), keep_ratios=0.5, where="mid_block")


def by_method(config: PruneConfig) -> str:
    return config.method


def vit(**overrides: Any) -> ViTForImageClassification:
    return tiny_model("vit", ViTForImageClassification, **overrides)


def run(model: nn.Module, pixels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(images() if pixels is None else pixels, **kwargs))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that pruning could leave behind: classes, attributes, hooks, config objects and their contents, tensors."""
    modules = {
        name: (
            type(module),
            sorted(module.__dict__),
            {key: list(value) for key, value in module.__dict__.items() if "hooks" in key and hasattr(value, "keys")},
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    }
    tensors = {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    config = model.config
    return {
        "modules": modules,
        "tensors": tensors,
        "config": json.dumps(config.to_dict(), sort_keys=True, default=str),
        "config keys": sorted(vars(config)),
        "attention": config._attn_implementation,
    }


def error_of(kind: type[Exception], call: Any, *args: Any) -> str:
    with pytest.raises(kind) as error:
        call(*args)
    return str(error.value)


# -- what prune refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_does_not_exist(method: str, family: str) -> None:
    model = tiny_model(family, next(cls for name, cls in supported_classes() if name == family))
    before = snapshot(model)
    config = PruneConfig.for_method(method, layers=(2, DEPTH, DEPTH + 3), keep_ratios=0.5)
    message = error_of(ConfigError, prune, model, config)
    assert f"layers={config.layers} in {type(config).__name__}" in message
    assert f"blocks 0..{DEPTH - 1}" in message
    assert f"block {DEPTH}, {DEPTH + 3} does not exist" in message
    assert f"this model has {DEPTH} blocks" in message
    assert snapshot(model) == before


def test_a_config_of_a_deeper_model() -> None:
    of_twelve = ZeroTPruneConfig(layers=(0, 2, 5, 8, 10), keep_ratios=(1, 0.9, 0.8, 0.7, 1))
    message = error_of(ConfigError, prune, vit(), of_twelve)
    assert "block 8, 10 does not exist, this model has 8 blocks" in message


def test_a_config_with_one_value_for_each_default_layer_of_another_depth() -> None:
    shallow = vit(num_hidden_layers=3)  # where (1, 3, 6, 9, 11) of 12 are (1, 1, 2, 2, 2) of 3
    config = ZeroTPruneConfig(num_similar=(1, 2, 3, 4, 5))
    message = error_of(ConfigError, prune, shallow, config)
    assert "num_similar=(1, 2, 3, 4, 5)" in message
    assert "2 values, one for each pruned layer" in message


@pytest.mark.parametrize("layers", [(4, 1), (1, 1), (-1, 2), (1, DEPTH)], ids=str)
def test_stages_are_in_order_each_once_and_in_the_model_whatever_a_method_says(layers: tuple[int, ...]) -> None:
    model = vit()
    stage = CONFIG.stages_for(find_adapter(model).shape(model))[0]
    config = SimpleNamespace(
        prunes={"vision"}, stages_for=lambda shape: tuple(dataclasses.replace(stage, layer=layer) for layer in layers)
    )
    with pytest.raises(ConfigError) as error:
        plan(config, find_adapter(model).shape(model))
    assert f"prunes in blocks {list(layers)}: expected ascending ones of 0..{DEPTH - 1}" in str(error.value)


@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
@pytest.mark.parametrize("depth", [1, 2, 3, 5, 13])
def test_default_configs_fit_every_depth(config: PruneConfig, depth: int) -> None:
    model = vit(num_hidden_layers=depth, hidden_size=16, intermediate_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # with one block there is only the last one
        prune(model, config)
    with record(model) as rec:
        run(model)
    assert len(rec.tokens) == depth
    assert rec.kept


SWIN = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
BERT = BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=20)


@pytest.mark.parametrize(
    "make", [lambda: SwinForImageClassification(SWIN), lambda: BertModel(BERT)], ids=["swin", "bert"]
)
def test_a_family_without_adapter(make: Any) -> None:
    model = make()
    before = snapshot(model)
    for call in (lambda: prune(model, CONFIG), lambda: unprune(model), lambda: current_config(model)):
        message = error_of(UnsupportedModelError, call)
        assert f"no adapter for model_type={model.config.model_type!r}" in message
        assert f"have: {', '.join(list_adapters())}" in message
        assert "docs/add_a_family.md" in message
    assert snapshot(model) == before


def dual_encoder(family: str = "vit", cls: type[PreTrainedModel] = ViTModel) -> VisionTextDualEncoderModel:
    """A model without an adapter around one that has one."""
    vision = tiny_model(family, cls).config
    torch.manual_seed(1)
    joint = VisionTextDualEncoderConfig.from_vision_text_configs(vision, BERT, projection_dim=8)
    return VisionTextDualEncoderModel(joint).eval()


def image_features(model: VisionTextDualEncoderModel) -> torch.Tensor:
    with torch.no_grad():
        return model.get_image_features(images()).pooler_output


def test_a_family_without_adapter_around_one_that_has_one() -> None:
    model = dual_encoder()
    before = snapshot(model)
    for call in (lambda: prune(model, CONFIG), lambda: unprune(model), lambda: current_config(model)):
        message = error_of(UnsupportedModelError, call)
        assert message.startswith("no adapter for model_type='vision-text-dual-encoder'")
        assert "docs/add_a_family.md" in message
        assert message.endswith(", or pass model.vision_model instead: 'vit' has an adapter")
    assert snapshot(model) == before


@pytest.mark.parametrize("tower", [("vit", ViTModel), ("clip_vision_model", CLIPVisionModel)], ids=lambda pair: pair[0])
def test_pruning_through_a_part_as_the_hint_says(tower: tuple[str, type[PreTrainedModel]]) -> None:
    model = dual_encoder(*tower)
    before, dense = snapshot(model), image_features(model)
    assert prune(model.vision_model, CONFIG) is model.vision_model
    assert current_config(model.vision_model) == CONFIG
    assert not torch.equal(image_features(model), dense)
    unprune(model.vision_model)
    assert snapshot(model) == before
    assert torch.equal(image_features(model), dense)


def test_a_checkpoint_with_a_pruned_part_loads_dense_and_says_what_the_part_was_pruned_with(tmp_path: Path) -> None:
    model = dual_encoder()
    dense = image_features(model)
    prune(model.vision_model, CONFIG)
    model.save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path)
    assert torch.equal(image_features(loaded), dense)
    prune(loaded.vision_model, loaded.vision_model.config.prune_config)
    assert torch.equal(image_features(loaded), image_features(model))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model


@pytest.mark.parametrize(
    ("wrap", "name", "hint"),
    [
        (lambda model: nn.Linear(2, 2), "Linear", ""),
        (lambda model: nn.DataParallel(model), "DataParallel", "pass model.module, or prune before wrapping"),
        (lambda model: torch.compile(model, backend="eager"), "OptimizedModule", "pass model._orig_mod, or prune"),
        (Wrapper, "Wrapper", "pass model.base_model, or prune before wrapping"),
        (lambda model: SimpleNamespace(model=model), "SimpleNamespace", "pass model.model, or prune"),  # a pipeline
        (lambda model: "owner/name", "str", ""),
        (lambda model: None, "NoneType", ""),
        (lambda model: model.vit.layers[0], "ViTLayer", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_something_that_is_no_pretrained_model(wrap: Any, name: str, hint: str) -> None:
    message = error_of(UnsupportedModelError, prune, wrap(vit()), CONFIG)
    assert message.startswith(f"expected a transformers PreTrainedModel, got {name}")
    assert (hint in message) if hint else message.endswith(name)


def test_pruning_through_a_wrapper_as_the_hint_says() -> None:
    model = vit()
    compiled = torch.compile(model, backend="eager")
    assert prune(compiled._orig_mod, CONFIG) is model
    assert current_config(model) == CONFIG


@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
def test_a_pruned_model_is_not_pruned_again(config: PruneConfig) -> None:
    model = prune(vit(), config)
    expected = run(model)
    message = error_of(PruneStateError, prune, model, CONFIG)
    assert "already pruned" in message
    assert type(config).__name__ in message
    assert "call unprune(model) first" in message
    assert current_config(model) == config
    assert torch.equal(run(model), expected)
    error_of(PruneStateError, prune, model.vit, CONFIG)  # the same through a part of it


@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
def test_a_schedule_that_prunes_nothing(config: PruneConfig) -> None:
    model = vit()
    before = snapshot(model)
    message = error_of(ConfigError, prune, model, config.scaled(0))
    assert "prunes nothing on this model: every layer keeps all 64 tokens" in message
    assert "Keep less, or leave the model dense" in message
    assert snapshot(model) == before


HEADS = [(family, head) for family in FAMILIES for head in get_adapter(family).full_grid_heads]


@pytest.mark.parametrize(("family", "head"), HEADS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
def test_a_head_that_needs_every_token(family: str, head: type, config: PruneConfig) -> None:
    model = tiny_model(family, head)
    before = snapshot(model)
    message = error_of(UnsupportedModelError, prune, model, config)
    assert f"{head.__name__} cannot be pruned: {get_adapter(family).full_grid_heads[head]}" in message
    assert "reconstructs every patch" in message
    assert snapshot(model) == before


class MyViTLayer(type(vit().vit.layers[0])):
    pass


def _own_forward(block: nn.Module) -> None:
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)


def _partial_forward(block: nn.Module) -> None:
    block.forward = functools.partial(type(block).forward, block)


def _subclass(block: nn.Module) -> None:
    block.__class__ = MyViTLayer


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_own_forward, "block 6 has a forward of its own"),
        (_partial_forward, "block 6 has a forward of its own"),
        (_subclass, "MyViTLayer, expected ViTLayer"),
    ],
)
def test_a_block_that_somebody_else_has_changed(change: Any, text: str) -> None:
    model = vit()
    change(model.vit.layers[6])
    before, expected = snapshot(model), run(model)
    assert text in error_of(UnsupportedModelError, prune, model, CONFIG)
    assert snapshot(model) == before
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("bad", [3, [], object()], ids=lambda value: type(value).__name__)
def test_something_that_is_no_config(bad: Any) -> None:
    model = vit()
    before = snapshot(model)
    assert "a prune config is an object with a 'method'" in error_of(ConfigError, prune, model, bad)
    assert snapshot(model) == before


def test_prune_takes_a_dictionary_and_a_path(tmp_path: Path) -> None:
    expected = run(prune(vit(), CONFIG))
    file = CONFIG.save_pretrained(tmp_path)
    for like in (CONFIG.to_dict(), tmp_path, str(tmp_path), file):
        model = vit()
        assert prune(model, like) is model
        assert torch.equal(run(model), expected)
        assert current_config(model) == CONFIG


@pytest.mark.parametrize(("where", "warns"), [("after_block", True), ("mid_block", False)])
def test_pruning_after_the_last_block_warns(where: str, warns: bool) -> None:
    config = RandomConfig(layers=(2, DEPTH - 1), keep_ratios=0.5, where=where)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune(vit(), config)
    texts = [(str(warning.message), warning.filename) for warning in caught]
    expected = (f"pruning after block {DEPTH - 1}, the last one, saves no work: no block follows", __file__)
    assert texts == ([expected] if warns else [])


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_mask_that_hides_a_token_is_refused_and_one_that_hides_none_changes_nothing(
    attention: str, compiled: bool
) -> None:
    model = vit(attention=attention, num_hidden_layers=3)
    prune(model, RandomConfig(layers=(1,), keep_ratios=0.5))
    expected = run(model)
    torch.compiler.reset()
    called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    mask = torch.ones(2, 65, dtype=torch.long)
    assert torch.equal(run(called), expected)
    assert torch.equal(run(called, attention_mask=mask), expected)
    mask[1, 30] = 0
    with pytest.raises((UnsupportedModelError, RuntimeError), match="takes no attention_mask; call unprune"):
        run(called, attention_mask=mask)
    if not compiled:
        masked = run(unprune(model), attention_mask=mask)
        assert torch.equal(masked[0], run(model)[0])
        assert not torch.equal(masked[1], run(model)[1])


# -- what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
@pytest.mark.parametrize(("family", "cls"), OURS, ids=lambda value: getattr(value, "__name__", value))
def test_unprune_leaves_the_model_as_it_was(family: str, cls: type, config: PruneConfig) -> None:
    model = tiny_model(family, cls)
    before, expected = snapshot(model), run(model)
    assert prune(model, config) is model
    assert type(model) is cls
    assert model.config.prune_config == config.to_dict()
    assert not torch.equal(run(model), expected)
    assert unprune(model) is model
    assert snapshot(model) == before
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("name", ["swap_class", "BlockState", "enable_capture"])
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_attach_that_fails_half_way_leaves_the_model_as_it_was(
    name: str, nth: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit()
    before, expected = snapshot(model), run(model)
    real, calls = getattr(vision, name), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == nth:
            raise error("half-way")
        return real(*args, **kwargs)

    monkeypatch.setattr(vision, name, fails)
    with pytest.raises(error, match="half-way"):
        prune(model, ZeroTPruneConfig())
    assert len(calls) >= nth
    monkeypatch.undo()
    assert snapshot(model) == before
    assert current_config(model) is None
    assert torch.equal(run(model), expected)
    prune(model, ZeroTPruneConfig())  # and works the next time


def test_unprune_of_a_dense_model() -> None:
    model = vit()
    before = snapshot(model)
    assert "this model is not pruned; call prune(model, config) first" in error_of(PruneStateError, unprune, model)
    prune(model, CONFIG)
    unprune(model)
    error_of(PruneStateError, unprune, model)
    assert snapshot(model) == before


def test_two_models_with_one_config_object_do_not_mix_up_what_they_are_pruned_with() -> None:
    first = vit()
    second = ViTForImageClassification(first.config).eval()
    expected = run(prune(first, CONFIG))
    prune(second, OTHER)
    assert (current_config(first), current_config(second)) == (CONFIG, OTHER)
    unprune(second)
    assert current_config(first) == CONFIG
    with pruned(first, OTHER):
        assert current_config(first) == OTHER
    assert current_config(first) == CONFIG
    assert torch.equal(run(first), expected)
    unprune(first)


@pytest.mark.parametrize("junk", [None, {}, {"method": "gone"}, "text"], ids=repr)
def test_what_stands_in_model_config_does_not_matter_to_a_pruned_model(junk: Any) -> None:
    model = vit()
    expected = run(model)
    prune(model, CONFIG)
    model.config.prune_config = junk
    assert current_config(model) == CONFIG
    assert torch.equal(run(unprune(model)), expected)
    assert not hasattr(model.config, "prune_config")


# -- pruned() --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
def test_pruned_and_back(config: PruneConfig) -> None:
    model = vit()
    before, expected = snapshot(model), run(model)
    reference = run(prune(vit(), config))
    with pruned(model, config) as same:
        assert same is model
        assert current_config(model) == config
        assert torch.equal(run(model), reference)
    assert snapshot(model) == before
    assert torch.equal(run(model), expected)
    with pytest.raises(ZeroDivisionError), pruned(model, config):
        1 / 0  # noqa: B018
    assert snapshot(model) == before
    assert torch.equal(run(model), expected)


def test_pruned_nests_and_restores_what_was_there() -> None:
    model = prune(vit(), CONFIG)
    first, second = run(model), run(prune(vit(), OTHER))
    inner_config = RandomConfig(layers=(5,), keep_ratios=0.25)
    third = run(prune(vit(), inner_config))
    assert not torch.equal(first, second)
    with pytest.raises(KeyError), pruned(model, OTHER.to_dict()):
        assert torch.equal(run(model), second)
        with pruned(model, inner_config):
            assert torch.equal(run(model), third)
        assert current_config(model) == OTHER
        assert model.config.prune_config == OTHER.to_dict()
        assert torch.equal(run(model), second)
        with pytest.raises(RuntimeError), pruned(model, inner_config):
            raise RuntimeError
        assert torch.equal(run(model), second)
        raise KeyError
    assert current_config(model) == CONFIG
    assert model.config.prune_config == CONFIG.to_dict()
    assert torch.equal(run(model), first)


@pytest.mark.parametrize("bad", [RandomConfig(layers=(DEPTH,), keep_ratios=0.5), {"method": "gone"}, "./absent"])
def test_a_config_that_does_not_fit_leaves_pruned_models_pruned_and_dense_ones_dense(bad: Any) -> None:
    for model in (prune(vit(), CONFIG), vit()):
        before, expected, config = snapshot(model), run(model), current_config(model)
        with pytest.raises(ConfigError), pruned(model, bad):
            raise AssertionError("the block must not run")
        assert snapshot(model) == before
        assert current_config(model) == config
        assert torch.equal(run(model), expected)


# -- record() --------------------------------------------------------------------------------------------------------


def hand_chain(model: nn.Module, config: PruneConfig, pixels: torch.Tensor, **kwargs: Any) -> tuple[Any, Any, Any]:
    """Stock blocks one after the other, with the tokens taken out between them by hand: an eager ``ViTModel``.

    Returns:
        the last hidden state, the ORIGINAL positions kept by layer, and the tokens that enter each block.
    """
    stages = {stage.layer: stage for stage in config.stages_for(find_adapter(model).shape(model))}
    states = model.embeddings(pixels, **kwargs)
    positions = torch.arange(states.shape[1] - 1).expand(len(pixels), -1)
    kept, tokens = {}, []
    for layer, block in enumerate(model.layers):
        tokens.append(states.shape[1])
        normed = block.layernorm_before(states)
        _, attention = block.attention(normed, None)
        heads = {
            name: getattr(block.attention, f"{name[0]}_proj")(normed).unflatten(-1, (4, -1)).transpose(1, 2)
            for name in ("queries", "keys", "values")
        }
        inputs, states = states, block(states, None)
        if layer in stages:
            pieces = attention.split(2)  # the batch may come in any pieces
            signals = Signals(
                states,
                inputs,
                num_protected=1,
                has_cls=True,
                attention=pieces,
                cls_attention=attention[:, :, 0],
                **heads,
            )
            keep = stages[layer].reduce(signals, stages[layer].num_kept(states.shape[1] - 1)).keep
            rows = [[0, *(1 + i for i in row)] for row in keep.tolist()]
            states = torch.stack([sample[row] for sample, row in zip(states, rows, strict=True)])
            positions = torch.stack([row[index] for row, index in zip(positions, keep, strict=True)])
            kept[str(layer)] = positions.tolist()
    return model.layernorm(states), kept, tokens


AFTER_BLOCK = [config for config in DEFAULTS if config.where == "after_block"]


@pytest.mark.parametrize("config", AFTER_BLOCK, ids=by_method)
def test_record_tells_original_positions_as_a_chain_composed_by_hand_does(config: PruneConfig) -> None:
    model = tiny_model("vit", ViTModel, "eager")
    pixels = images(3)
    with torch.no_grad():
        expected, kept, tokens = hand_chain(copy.deepcopy(model), config, pixels)
    prune(model, config)
    with record(model) as rec:
        got = run(model, pixels)
    assert {layer: keep.tolist() for layer, keep in rec.kept.items()} == kept
    assert len(kept) > 1  # or the composition was not put to the test
    assert list(rec.tokens.items()) == [(str(i), n) for i, n in enumerate(tokens)]
    for keep in rec.kept.values():
        assert keep.dtype == torch.int64
        assert (keep.diff(dim=1) > 0).all()
        assert 0 <= keep.min() <= keep.max() < 64
    # float32 sums of 32 to 65 terms in another order, through 8 blocks and a layer norm: a few dozen ulps of O(1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", AFTER_BLOCK, ids=by_method)
@pytest.mark.parametrize("size", [(48, 48), (24, 56), (34, 61)], ids=str)
def test_images_of_another_size(config: PruneConfig, size: tuple[int, int]) -> None:
    model = tiny_model("vit", ViTModel, "eager")
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    patches = (size[0] // 4) * (size[1] // 4)
    with torch.no_grad():
        expected, kept, tokens = hand_chain(copy.deepcopy(model), config, pixels, interpolate_pos_encoding=True)
    prune(model, config)
    with record(model) as rec:
        got = run(model, pixels, interpolate_pos_encoding=True)
    assert {layer: keep.tolist() for layer, keep in rec.kept.items()} == kept
    assert list(rec.tokens.values()) == tokens
    assert tokens[0] == 1 + patches
    assert tokens[-1] < tokens[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # as above


@pytest.mark.parametrize(("family", "cls"), OURS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("config", DEFAULTS, ids=by_method)
def test_record_agrees_with_the_schedule_in_every_family(family: str, cls: type, config: PruneConfig) -> None:
    model = tiny_model(family, cls)
    shape = get_adapter(family).shape(model)
    prune(model, config)
    with record(model) as rec:
        run(model)
    remaining, stages = shape.num_patches, {stage.layer: stage for stage in plan(config, shape)}
    assert list(rec.kept) == [str(layer) for layer in stages]
    for layer in range(DEPTH):
        assert rec.tokens[layer] == rec.tokens[str(layer)] == remaining + shape.num_protected
        if layer in stages:
            remaining = stages[layer].num_kept(remaining)
            assert rec.kept[layer].shape == (2, remaining)


def test_the_summary_has_a_row_a_block() -> None:
    model = prune(vit(), RandomConfig(layers=(1, 4), keep_ratios=(0.75, 0.5)))
    with record(model) as rec:
        assert rec.summary().startswith(
            "nothing recorded yet: call the model inside the with block, in the same thread"
        )
        assert (dict(rec.kept), dict(rec.tokens)) == ({}, {})
        run(model)
    header, *rows = rec.summary().splitlines()
    assert header.split() == ["block", "tokens", "in", "kept"]
    assert [row.split() for row in rows] == [
        ["0", "65"],
        ["1", "65", "48"],
        ["2", "49"],
        ["3", "49"],
        ["4", "49", "24"],
        ["5", "25"],
        ["6", "25"],
        ["7", "25"],
    ]
    assert len({len(row) for row in (header, *rows)}) == 1  # a table


def test_the_last_forward_counts() -> None:
    model = prune(vit(), CONFIG)
    with record(model) as rec:
        run(model, images(3))
        run(model, torch.randn(1, 3, 48, 48), interpolate_pos_encoding=True)
        assert rec.tokens[0] == 145
        assert [tuple(keep.shape) for keep in rec.kept.values()] == [(1, 108), (1, 54)]
        with pytest.raises(ValueError):
            run(model, torch.randn(1, 3, 48, 48))  # fails in the embeddings
        assert dict(rec.tokens) == {}  # and does not pass for what an earlier one did


def test_record_of_a_dense_model() -> None:
    model = vit()
    before = snapshot(model)
    with pytest.raises(PruneStateError, match=r"not pruned, so there is nothing to record; call prune\(model"):
        record(model).__enter__()
    assert snapshot(model) == before


def test_record_survives_an_exception_and_leaves_nothing() -> None:
    model = prune(vit(), ZeroTPruneConfig())
    before, expected = snapshot(model), run(model)
    with pytest.raises(ZeroDivisionError), record(model) as rec:
        run(model)
        1 / 0  # noqa: B018
    assert rec.tokens[DEPTH - 1] < rec.tokens[0]
    assert len(rec.kept) > 1
    kept = {layer: keep.clone() for layer, keep in rec.kept.items()}
    assert snapshot(model) == before
    assert not any(block.token_prune.recorders for block in get_adapter("vit").pruned_blocks(model).values())
    assert torch.equal(run(model, -images()), run(prune(vit(), ZeroTPruneConfig()), -images()))
    assert all(torch.equal(kept[layer], rec.kept[layer]) for layer in kept)  # later forwards do not reach it
    assert torch.equal(run(model), expected)


def test_recording_changes_no_output_and_nests() -> None:
    model = prune(vit(), ZeroTPruneConfig())
    expected = run(model)
    with record(model) as outer:
        assert torch.equal(run(model), expected)
        with record(model) as inner:
            assert torch.equal(run(model), expected)
        assert torch.equal(run(model), expected)
    assert list(outer.kept) == list(inner.kept) != []
    assert all(torch.equal(outer.kept[layer], inner.kept[layer]) for layer in inner.kept)
    assert dict(outer.tokens) == dict(inner.tokens)


def test_record_through_a_backward_pass_with_gradient_checkpointing() -> None:
    """On some versions the backward pass calls the blocks' hooks once more, last block first."""
    model = prune(vit(), CONFIG)
    with record(model) as rec:
        run(model)
    expected = {layer: keep.tolist() for layer, keep in rec.kept.items()}
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    with record(model) as rec:
        model(images()).logits.sum().backward()
    assert {layer: keep.tolist() for layer, keep in rec.kept.items()} == expected
    assert [rec.tokens[layer] for layer in range(DEPTH)] == [65, 65, 49, 49, 49, 25, 25, 25]
    assert all(parameter.grad is not None for parameter in model.vit.layers.parameters())


def test_a_layer_dictionary_is_in_the_order_of_layers() -> None:
    values = LayerDict({"10": "b", "2": "a", "entrance": "e"})
    assert list(values) == ["entrance", "2", "10"]
    assert values["10"] == values[10] == "b"
    assert len(values) == 3
    assert 3 not in values
    assert "a" in repr(values)


def test_both_teacher_heads_read_protected_tokens() -> None:
    model = prune(tiny_model("deit", DeiTForImageClassificationWithTeacher), RandomConfig(layers=(1,), keep_ratios=0.1))
    out = model(images())
    assert not torch.equal(out.cls_logits, out.distillation_logits)
    torch.testing.assert_close(out.logits, (out.cls_logits + out.distillation_logits) / 2, rtol=0, atol=0)


# -- transformers itself ---------------------------------------------------------------------------------------------

UNTOUCHED = """
import sys, types
import transformers
from transformers import ViTConfig, ViTForImageClassification, PreTrainedModel, AttentionMaskInterface, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
import torch
config = ViTConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=3, image_size=8,
                   patch_size=2)
model = ViTForImageClassification(config).eval()
pixels = torch.randn(1, 3, 8, 8)
dense = model(pixels).logits
import transformers.models.deit.modeling_deit, transformers.models.dinov2.modeling_dinov2, transformers.activations

def picture():
    seen = {}
    for name, module in list(sys.modules.items()):
        torch_itself = name in ("torch", "torch.nn", "torch.nn.functional", "torch.nn.modules.module")
        if not (torch_itself or name.split(".")[0] == "transformers") or not isinstance(module, types.ModuleType):
            continue
        for key, value in list(vars(module).items()):
            seen[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                for attribute, member in list(vars(value).items()):
                    if attribute not in PYTHONS_OWN:
                        seen[name, key, attribute] = member
    return seen

PYTHONS_OWN = ("__weakref__", "__dict__", "__slotnames__", "__annotations__")  # some appear when they are looked at

def registries():
    return set(ALL_ATTENTION_FUNCTIONS.valid_keys()), set(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys())

before, (attention, masks) = picture(), registries()
import hf_tokenprune
hf_tokenprune.list_adapters()
from hf_tokenprune.engine import current_config
hf_tokenprune.prune(model, hf_tokenprune.ZeroTPruneConfig(layers=(0,), keep_ratios=0.5))
assert not torch.equal(model(pixels).logits, dense)
hf_tokenprune.unprune(model)
assert torch.equal(model(pixels).logits, dense)
after, (attention_after, masks_after) = picture(), registries()
changed = [key for key, value in before.items() if after.get(key, None) is not value]
assert len(before) > 5000, len(before)
assert not changed, changed
new = [key for key in after if key[:2] in before and key not in before]  # attributes of classes that were there
assert not new, new
assert masks_after == masks
print(sorted(attention_after - attention), sorted(attention - attention_after))
"""


@pytest.mark.slow
def test_transformers_stays_as_it_is_but_for_one_key_in_the_attention_registry() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNTOUCHED],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['hf_tokenprune_capture'] []"


def test_pruned_leaves_the_config_that_a_dense_model_carries() -> None:
    model = vit()
    model.config.prune_config = carried = RandomConfig(keep_ratios=0.9).to_dict()
    with pruned(model, CONFIG):
        assert model.config.prune_config != carried
    assert model.config.prune_config == carried
