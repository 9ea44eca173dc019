"""A vision tower whose own blocks prune, together with a method in the decoder behind it.

Against a loop over patches in float64, and against the tower cut off behind its features and pruned by itself.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_tokenprune import (
    ConfigError,
    DivPruneConfig,
    FastVConfig,
    PruneConfig,
    PruneStateError,
    StackConfig,
    UnsupportedModelError,
    list_adapters,
    list_methods,
    prune,
    pruned,
    record,
    unprune,
)
from hf_tokenprune.adapters.decoder._encoder import encoder_adapter
from hf_tokenprune.adapters.decoder._tower import HAS_CLS, tower_blocks
from hf_tokenprune.benchmark import benchmark
from hf_tokenprune.benchmark.timing import Arms, GivenStage
from hf_tokenprune.cost import config_for_macs, cost
from hf_tokenprune.engine import current_config, options, plan
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.search import search
from hf_tokenprune.sharing.pretrained import from_pretrained
from hf_tokenprune.signals import Signals

from .decoder_families import FAMILIES, adapter_of, built, run, tiny_vlm
from .decoder_prompts import collate, sample
from .families import snapshot
from .reference_merging import Groups, naive_salience_merge, naive_tome

DEPTH = 4
DECODER = DivPruneConfig(keep_ratio=0.4)
MERGE = {"method": "salience_merge", "salience": "contrast", "exact_last_block": False}


def tower_of(model: PreTrainedModel) -> Any:
    return adapter_of(model).tower(adapter_of(model).inner(model))


def can(family: str) -> bool:
    try:
        encoder_adapter(tower_of(built(family)))
    except UnsupportedModelError:
        return False
    return True


KINDS = sorted(HAS_CLS.keys() & {*list_adapters()})
"""Vision towers whose blocks may prune."""
PRUNABLE, OTHERS = [f for f in FAMILIES if can(f)], [f for f in FAMILIES if not can(f)]
METHODS = [name for name in list_methods("vision") if name not in list_methods("decoder") and name != "exact"]
FEATURES: dict[str, dict[str, Any]] = {
    "default": {},
    "the last block's": {"vision_feature_layer": -1},
    "an early block's": {"vision_feature_layer": 2, "vision_feature_select_strategy": "full"},
    "full": {"vision_feature_select_strategy": "full"},
}


def tiny(family: str, kind: str | None = None, attention: str = "sdpa", **fields: Any) -> PreTrainedModel:
    vision = {"num_hidden_layers": DEPTH, **({} if kind is None else {"model_type": kind})}
    return tiny_vlm(family, attention=attention, vision_config=vision, **fields)


look_at = functools.cache(tiny)
"""One model for all tests, to be looked at and never changed."""


def part_of(method: str) -> PruneConfig:
    """A method for vision encoders that takes tokens out of a tower of few blocks."""
    fields: dict[str, Any] = {"exact_last_block": False} if hasattr(get_method(method)(), "exact_last_block") else {}
    return PruneConfig.for_method(method, **fields, **({"salience": "contrast"} if method == "salience_merge" else {}))


def stack(method: str | dict[str, Any] | PruneConfig, *decoder: PruneConfig) -> StackConfig:
    part = part_of(method) if isinstance(method, str) else method
    part = PruneConfig.from_dict(part) if isinstance(part, dict) else part
    return StackConfig((part, *(decoder or (DECODER,))))


@functools.cache
def fits(family: str, kind: str, method: str) -> bool:
    """Whether the tower gives the method what it needs: an attention of CLS, for some."""
    model, config = look_at(family, kind), stack(method)
    shape = adapter_of(model).shape(model)
    try:
        adapter_of(model).check(model, plan(config, shape), **options(config, shape))
    except UnsupportedModelError:
        return False
    return True


def runs(family: str, kind: str, layer: str) -> bool:
    """Whether the dense model takes these features: crops cannot be put together with CLS, or without a patch."""
    model = tiny(family, kind, **FEATURES[layer])
    try:
        run(model, sample(model, "..I.."))
    except (ValueError, RuntimeError):
        return False
    return True


SETTINGS = [(f, kind, layer) for f in PRUNABLE for kind in KINDS for layer in FEATURES if runs(f, kind, layer)]
TOWERS = sorted({(family, kind) for family, kind, layer in SETTINGS if layer == "default"})
"""Every family with every tower whose blocks may prune."""
FITTING = [(*setting, method) for setting in SETTINGS for method in METHODS if fits(*setting[:2], method)]


@contextmanager
def features(model: PreTrainedModel, states: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The tower's hidden states are all ``states(pixels)``, (I, P + N, D)."""

    def hook(tower: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        made = states(kwargs.get("pixel_values", args[0] if args else None))
        output.hidden_states = tuple(made for _ in output.hidden_states)

    handle = tower_of(model).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def cut_off(tower: nn.Module, depth: int) -> Any:
    """A copy of the tower that ends with so many blocks."""
    tower = copy.deepcopy(tower)
    del tower_blocks(tower)[depth:]
    return tower


def prompts(model: PreTrainedModel) -> dict[str, Tensor]:
    return collate([sample(model, "..I...", 1), sample(model, ".I.I..", 2), sample(model, "....", 3)])


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "layer", "method"), FITTING)
def test_the_decoder_sees_the_restored_features_of_the_pruned_tower(
    family: str, kind: str, layer: str, method: str
) -> None:
    model = tiny(family, kind, **FEATURES[layer])
    inputs, config = prompts(model), stack(method)
    with pruned(model, DECODER):
        plain = run(model, inputs).logits
    depth = adapter_of(model).shape(model).encoder.depth
    alone = cut_off(tower_of(model), depth)
    fields = config.tower_part.to_dict() | {"restore": True}
    prune(alone, PruneConfig.from_dict(fields))
    with pruned(model, DECODER), features(model, lambda p: alone(p, output_hidden_states=True).hidden_states[-1]):
        expected = run(model, inputs).logits
    with pruned(model, config):
        found = run(model, inputs).logits
        tokens = tower_blocks(tower_of(model))
        assert any(hasattr(block, "token_prune") for block in tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


Choose = Callable[[Signals, int, int], Groups]
LOOPS: dict[str, tuple[dict[str, Any], Choose]] = {
    "tome": ({"method": "tome"}, naive_tome),
    "contrast": (MERGE | {"where": "mid_block"}, partial(naive_salience_merge, salience_of="contrast")),
}


def naive(tower: Any, pixels: Tensor, choose: Choose, layers: dict[int, int], depth: int) -> Tensor:
    """(P + N, D): what the tower's first blocks make of one image, merging as it goes, one patch after the other."""
    x = tower.embeddings(pixels[None].double())[0]
    x = tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x
    protected = int(HAS_CLS[tower.config.model_type])
    patches = [{i} for i in range(len(x) - protected)]  # that each token stands for
    count, sizes = len(patches), torch.ones(len(x), dtype=x.dtype)
    for layer, block in enumerate(tower_blocks(tower)[:depth]):
        of: Any = block.self_attn
        q, k, v = (
            proj(block.layer_norm1(x)).unflatten(-1, (-1, of.head_dim)).transpose(0, 1)
            for proj in (of.q_proj, of.k_proj, of.v_proj)
        )
        attention = (q @ k.mT / of.head_dim**0.5 + sizes.log()).softmax(-1)
        x = x + of.out_proj((attention @ v).transpose(0, 1).flatten(1))
        if layer in layers:
            seen = Signals(
                x[None], x[None], protected, bool(protected), keys=k[None], values=v[None], sizes=sizes[None]
            )
            groups = choose(seen, 0, min(layers[layer], (len(x) - protected) // 2))
            merged = [sum(w * x[protected + i] for i, w in members.items()) for members in groups.values()]
            x = torch.stack([*x[:protected], *merged])
            patches = [set().union(*(patches[i] for i in members)) for members in groups.values()]
            sizes = torch.tensor([1.0] * protected + [float(len(p)) for p in patches], dtype=x.dtype)
        x = x + block.mlp(block.layer_norm2(x))
    owner = {patch: token for token, members in enumerate(patches) for patch in members}
    return torch.stack([*x[:protected], *(x[protected + owner[patch]] for patch in range(count))])


@pytest.mark.parametrize("case", LOOPS)
@pytest.mark.parametrize(("family", "kind", "layer"), [setting for setting in SETTINGS if setting[1] != "vit"])
def test_the_features_are_those_of_a_plain_loop(family: str, kind: str, layer: str, case: str) -> None:
    model, (fields, choose) = tiny(family, kind, **FEATURES[layer]), LOOPS[case]
    inputs, depth = prompts(model), adapter_of(model).shape(model).encoder.depth
    counts = {0: 2, depth - 1: 1}
    config = stack(fields | {"layers": list(counts), "r": list(counts.values())})
    dense = copy.deepcopy(tower_of(model)).double()

    def states(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([naive(dense, image, choose, counts, depth) for image in pixels]).float()

    with pruned(model, DECODER), features(model, states):
        expected = run(model, inputs).logits
    with pruned(model, config):
        torch.testing.assert_close(run(model, inputs).logits, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("family", "kind"), TOWERS)
def test_merging_nothing_is_the_decoder_method_alone(family: str, kind: str) -> None:
    model = tiny(family, kind)
    inputs = prompts(model)
    with pruned(model, DECODER):
        expected = run(model, inputs).logits
    with pruned(model, stack(PruneConfig.for_method("tome", r=0))):
        assert torch.equal(run(model, inputs).logits, expected)


@pytest.mark.parametrize(("family", "kind"), TOWERS)
@pytest.mark.parametrize("decoder", [DECODER, FastVConfig(layer=1, keep_ratio=0.5)], ids=lambda c: c.method)
def test_prompts_of_a_batch_do_not_know_of_each_other(family: str, kind: str, decoder: PruneConfig) -> None:
    model = prune(tiny(family, kind), stack("salience_merge", decoder))
    alone = [sample(model, parts, seed) for seed, parts in enumerate(("..I...", ".I.I..", "...I."))]
    together = run(model, collate(alone)).logits
    for row, inputs in enumerate(alone):
        length = inputs["input_ids"].shape[1]
        torch.testing.assert_close(together[row, -length:], run(model, inputs).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), TOWERS)
def test_generating_is_forwards(family: str, kind: str) -> None:
    model = prune(tiny(family, kind), stack("tome"))
    inputs = sample(model, "..I..")
    output = model.generate(
        **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    ids = output.sequences
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    full = run(model, inputs).logits[0, -5:-1]
    torch.testing.assert_close(torch.cat(output.logits), full, rtol=1e-4, atol=1e-4)


def test_features_of_several_layers_and_of_one_that_the_call_names() -> None:
    model = tiny("llava", vision_feature_layer=[-2, 1])
    inputs, config = sample(model, "..I.."), stack({"method": "tome", "layers": [0, 1], "r": 4})
    assert adapter_of(model).shape(model).encoder.depth == DEPTH - 1
    one = tiny("llava")
    for each, call in ((model, {}), (one, {"vision_feature_layer": 1}), (one, {"vision_feature_layer": -1})):
        alone = prune(copy.deepcopy(tower_of(each)), {**config.tower_part.to_dict(), "restore": True})
        with torch.no_grad():
            states = alone(inputs["pixel_values"], output_hidden_states=True).hidden_states

        def hook(tower: nn.Module, args: Any, output: Any, states: Any = states) -> None:
            output.hidden_states = states

        with pruned(each, DECODER):
            handle = tower_of(each).register_forward_hook(hook)
            expected = run(each, inputs, **call).logits
            handle.remove()
        with pruned(each, config):
            torch.testing.assert_close(run(each, inputs, **call).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(kind: str, autocast: bool) -> None:
    model = prune(tiny("llava", kind), stack("tome"))
    inputs, wanted = sample(model, "..I.."), torch.bfloat16
    if autocast:
        with torch.autocast("cpu", wanted), record(model) as rec:
            logits = run(model, inputs).logits
    else:
        inputs["pixel_values"] = inputs["pixel_values"].to(wanted)
        with record(model.to(wanted)) as rec:
            logits = run(model, inputs).logits
    assert logits.isfinite().all()
    assert rec.tower.tokens["2"] < rec.tower.tokens["0"]


def test_an_attention_that_is_chosen_later() -> None:
    inputs = sample(look_at("llava"), "..I..")
    for first, later in (("sdpa", "eager"), ("eager", "sdpa")):
        expected = run(prune(tiny("llava", attention=later), stack("salience_merge")), inputs).logits
        model = prune(tiny("llava", attention=first), stack("salience_merge"))
        model.set_attn_implementation(later)
        assert torch.equal(run(model, inputs).logits, expected)


def test_training_with_gradient_checkpointing() -> None:
    model = prune(tiny("llava"), stack("tome")).train()
    inputs = sample(model, "..I..")
    inputs |= {"labels": inputs["input_ids"]}
    model(**inputs).loss.backward()
    parameter = tower_blocks(tower_of(model))[0].mlp.fc1.weight
    expected, parameter.grad = parameter.grad, None
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    assert expected.abs().sum() > 0
    torch.testing.assert_close(parameter.grad, expected)


# -- an encoder by itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_encoder_gives_all_hidden_states_their_full_length(kind: str) -> None:
    """Each is what the encoder that ends there gives out."""
    tower = tower_of(tiny("llava", kind))
    pixels = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    config = PruneConfig.for_method("evit", layers=(0, 2), keep_ratios=0.6, restore=True) if HAS_CLS[kind] else None
    config = config or PruneConfig.for_method("tome", layers=(0, 2), r=6, restore=True)
    shorter = [
        prune(cut_off(tower, depth), {**config.to_dict(), "layers": layers, **counts})
        for depth, layers in ((1, [0]), (2, [0]), (3, [0, 2]), (4, [0, 2]))
        for counts in [{} if "r" not in config.to_dict() else {"r": 6}]
    ]
    with torch.no_grad():
        dense = tower(pixels, output_hidden_states=True).hidden_states
        found = prune(tower, config)(pixels, output_hidden_states=True).hidden_states
        ends = [each(pixels, output_hidden_states=True).hidden_states[-1] for each in shorter]
    assert torch.equal(found[0], dense[0])
    last = len(ends) - (kind == "vit")  # its last one has passed a norm
    for state, end in list(zip(found[1:], ends, strict=True))[:last]:
        assert state.shape == dense[0].shape
        torch.testing.assert_close(state, end)
    with pytest.raises(UnsupportedModelError, match="return_dict=True"):
        tower(pixels, output_hidden_states=True, return_dict=False)
    tower(pixels, return_dict=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_was_pruned_by_itself(kind: str) -> None:
    """With restore=True it is what a stack does; `unprune` of the model around it leaves it alone."""
    model = tiny("llava", kind)
    inputs, part = sample(model, "..I.."), part_of("tome")
    with pruned(model, stack(part)):
        expected = run(model, inputs).logits
    fields = part.to_dict() | {"layers": [0, 1, 2], "restore": True}  # not behind the features
    prune(tower_of(model), fields)
    with pytest.raises(UnsupportedModelError, match="pruned itself already; call unprune on it first"):
        prune(model, stack(part))
    with pruned(model, DECODER):
        torch.testing.assert_close(run(model, inputs).logits, expected)
    assert current_config(tower_of(model)) == PruneConfig.from_dict(fields)
    unprune(tower_of(model))


# -- putting in, taking out, sharing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), TOWERS)
def test_unprune_is_exact_and_so_are_copies(family: str, kind: str) -> None:
    model = tiny(family, kind)
    pickled = pickle.dumps(prune(copy.deepcopy(model), stack("salience_merge")))  # none can be that has run
    inputs = prompts(model)
    dense, before = run(model, inputs).logits, snapshot(model)
    prune(model, stack("salience_merge"))
    found = run(model, inputs).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickled)):
        assert torch.equal(run(copied, inputs).logits, found)
        assert torch.equal(run(unprune(copied), inputs).logits, dense)
    assert torch.equal(run(model, inputs).logits, found)
    assert torch.equal(run(unprune(model), inputs).logits, dense)
    assert snapshot(model) == before


def test_files(tmp_path: Path) -> None:
    model = prune(tiny("llava"), stack("salience_merge"))
    model.save_pretrained(tmp_path)
    current_config(model).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert current_config(loaded) == current_config(model) == PruneConfig.from_pretrained(tmp_path)
    inputs = sample(model, "..I..")
    assert torch.equal(run(loaded, inputs).logits, run(model, inputs).logits)


@pytest.mark.parametrize("failing", ["tower", "decoder", "hook"])
def test_a_prune_that_fails_half_way_leaves_the_model_as_it_was(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llava")
    inputs = prompts(model)
    dense, before = run(model, inputs).logits, snapshot(model)
    calls = iter(range(100))
    module = {
        "tower": "hf_tokenprune.adapters.vision._adapter",
        "decoder": "hf_tokenprune.adapters.decoder._adapter",
    }.get(failing)

    def swap(block: nn.Module, new_class: type) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        real(block, new_class)

    if module is not None:
        import hf_tokenprune.adapters._swap as source

        real = source.swap_class
        monkeypatch.setattr(f"{module}.swap_class", swap)
    else:
        monkeypatch.setattr(type(model.model), "register_forward_pre_hook", lambda *_, **__: 1 / 0)
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        prune(model, stack("salience_merge"))
    monkeypatch.undo()
    assert snapshot(model) == before
    assert current_config(model) is None and not hasattr(model.config, "prune_config")
    assert torch.equal(run(model, inputs).logits, dense)


def test_the_tower_of_a_stack_belongs_to_the_model() -> None:
    model = prune(tiny("llava"), stack("salience_merge"))
    tower = tower_of(model)
    for change in (unprune, lambda t: prune(t, part_of("tome"))):
        with pytest.raises(PruneStateError, match="pruned together with the model around it"):
            change(tower)
    inputs = sample(model, "..I..")
    with record(tower) as rec:
        run(model, inputs)
    assert rec.kept
    unprune(model)
    assert current_config(tower) is None and not get_adapter(tower.config.model_type).states(tower)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", OTHERS)
def test_towers_without_an_adapter_are_refused(family: str) -> None:
    model = tiny_vlm(family)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=rf"tower is a '\w+'; .*blocks of {', '.join(KINDS)}\. Leave"):
        prune(model, stack("tome"))
    assert snapshot(model) == before


def test_blocks_behind_the_features_are_no_place_to_prune() -> None:
    model = tiny("llava")
    for part in (
        {"method": "tome", "layers": [DEPTH - 1], "r": 2},
        {"method": "evit", "layers": [DEPTH - 1], "keep_ratios": 0.5},
    ):
        with pytest.raises(ConfigError, match=r"in the vision tower, of which 3 of 4 blocks make the image tokens"):
            prune(model, stack(part))
    embeddings = tiny("llava", vision_feature_layer=0)
    with pytest.raises(ConfigError, match="made by no block of its tower"):
        prune(embeddings, stack("tome"))


@pytest.mark.parametrize("method", [name for name in METHODS if hasattr(get_method(name)(), "exact_last_block")])
def test_patches_have_to_be_computed(method: str) -> None:
    fields = part_of(method).to_dict() | {"exact_last_block": True}
    with pytest.raises(ConfigError, match="exact_last_block=False in the vision tower"):
        stack(fields)


def test_what_the_tower_does_not_have_is_refused() -> None:
    model = tiny("llava", "siglip_vision_model")
    with pytest.raises(UnsupportedModelError, match=r"needs cls_attention.*having no CLS token"):
        prune(model, stack(MERGE | {"salience": "cls"}))
    other = tiny("llava", attention="sdpa")
    tower_of(other).config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="takes no bias for the sizes of merged tokens"):
        prune(other, stack("tome"))


def test_a_search_is_refused() -> None:
    model = tiny("llava")
    with pytest.raises(ConfigError, match="a search chooses counts in the decoder"):
        search(model, stack("tome"), [sample(model, "..I..")], speedup=1.2)


# -- counting, measuring, recording ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), TOWERS)
def test_records_tell_both(family: str, kind: str) -> None:
    model = tiny(family, kind)
    config = stack({"method": "tome", "layers": [0, 1], "r": [3, 2]})
    with record(prune(model, config)) as rec:
        model.generate(**prompts(model), max_new_tokens=3)
    shape = adapter_of(model).shape(model)
    patches, protected = shape.tower.num_patches, get_adapter(tower_of(model).config.model_type).shape(tower_of(model))
    left = [patches, patches - 3, patches - 5, patches - 5]
    assert list(rec.tower.tokens.values()) == [count + protected.num_protected for count in left]
    assert [kept.shape[1] for kept in rec.tower.kept.values()] == left[1:3]
    images = 3 * shape.tower_images if family == "llava" else len(rec.tower.kept["0"])
    assert len(rec.tower.kept["1"]) == images
    assert list(rec.kept) == ["entrance"]
    assert rec.summary().startswith("vision tower\nblock") and "\ndecoder\n" in rec.summary()
    with record(prune(tiny(family), DECODER)) as rec:
        assert rec.tower is None


@pytest.mark.parametrize("method", ["salience_merge", "tome", "evit"])
@pytest.mark.parametrize(("family", "kind"), TOWERS)
def test_cost_is_what_pytorch_counts(family: str, kind: str, method: str) -> None:
    """Of a tower that drops as many tokens without products of its own; the choice is not counted."""
    model, part = tiny(family, kind, "eager"), part_of(method if fits(family, kind, method) else "tome")
    config = stack(replace(part, where="mid_block"))  # "queries" projects the query of one token more, to choose
    report, alone = cost(model, config), cost(model, DECODER)
    shape, tower = adapter_of(model).shape(model), tower_of(model)
    pixels = torch.randn(shape.tower_images, 3, *shape.tower.image_size)

    def measured() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            tower(pixels, output_hidden_states=True)
        return counter.get_total_flops() // 2

    arms = Arms(model, config)
    dense, given, chosen = (arms.run(arm, measured) for arm in ("dense", "given", "pruned"))
    assert report.dense.vision_tower - report.pruned.vision_tower == dense - given > 0
    assert chosen >= given
    assert replace(report.pruned, vision_tower=0) == replace(alone.pruned, vision_tower=0)
    assert report.to_dict()["pruned_tower_macs"] == report.pruned.vision_tower


def test_budgets_scale_both_parts() -> None:
    model = tiny("llava")
    dense = cost(model).dense.macs
    config = stack(PruneConfig.for_method("tome", r=0.5))
    for found in (config.for_budget(model, speedup=1.25), config_for_macs(model, config, dense / 1.25)):
        report = cost(model, found)
        assert dense / 1.35 < report.pruned.macs <= dense / 1.25
        assert report.pruned.vision_tower < report.dense.vision_tower
        assert report.pruned.layers[0].tokens_in < report.dense.layers[0].tokens_in


@pytest.mark.parametrize(("family", "kind"), TOWERS)
def test_benchmark(family: str, kind: str) -> None:
    model, config = tiny(family, kind), stack("salience_merge")
    run(model, sample(model, "..I.."))  # which installs what stock code captures states with
    before = snapshot(model)
    report = benchmark(model, config, batch_sizes=(2,), rounds=1, warmup=0, text_tokens=6, new_tokens=3)
    assert report.macs == cost(model, config, text_tokens=6, new_tokens=3)
    assert report.to_dict()["macs"]["pruned_tower_macs"] < report.to_dict()["macs"]["dense_tower_macs"]
    arms, inputs = Arms(model, config), sample(model, "..I..")

    def tokens() -> list[int]:
        blocks = tower_blocks(tower_of(model))
        lengths: list[int] = []
        handles = [b.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1])) for b in blocks]
        run(model, inputs)
        for handle in handles:
            handle.remove()
        return lengths

    lengths = {arm: arms.run(arm, tokens) for arm in ("pruned", "given")}
    assert lengths["pruned"] == lengths["given"]
    assert all(isinstance(stage, GivenStage) for stage in arms.options["given"]["tower"])
    assert snapshot(model) == before
