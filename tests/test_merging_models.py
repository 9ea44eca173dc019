"""Merging inside whole models: against plain loops over samples, layers and tokens; sizes; restored patches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    DeiTModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    ViTForMaskedImageModeling,
    ViTModel,
)

from hf_tokenprune import PruneConfig, UnsupportedModelError, prune, record
from hf_tokenprune.adapters._capture import Capture, capture_attention_forward, enable_capture
from hf_tokenprune.adapters.vision import _block
from hf_tokenprune.engine import plan
from hf_tokenprune.methods.tome import ToMeStage
from hf_tokenprune.registry import get_adapter
from hf_tokenprune.signals import Signals

from .families import (
    TINY,
    first_tensor,
    fitting,
    images,
    inputs_for,
    methods_for,
    refused,
    supported_classes,
    tiny_model,
)
from .reference_merging import Groups, naive_evit, naive_pitome, naive_salience_merge, naive_tome

FAMILIES = list({pair[0]: pair for pair in supported_classes() if pair[1].__name__.endswith("Model")}.values())
SCHEDULED = [name for name in methods_for("vision") if name != "exact"]
BATCH = 2


def config_of(method: str, **fields: Any) -> PruneConfig:
    """The default of a method, without the exact last block: these tests look at patches."""
    plain = {"exact_last_block": False} if method == "salience_merge" else {}
    return PruneConfig.for_method(method, **plain, **fields)


def merges(method: str) -> bool:
    shape = get_adapter("vit").shape(tiny_model("vit", ViTModel))
    return any(stage.merges for stage in config_of(method).stages_for(shape))


# -- against plain loops ---------------------------------------------------------------------------------------------

VIT = ("layernorm_before", "attention", "o_proj", "layernorm_after")
PARTS = {"vit": VIT, "deit": VIT, "clip_vision_model": ("layer_norm1", "self_attn", "out_proj", "layer_norm2")}
Choose = Callable[[Signals, int, int], Groups]


def loop(
    model: Any, pixels: Tensor, choose: Choose, layers: dict[int, int], proportional: bool, where: str = "mid_block"
) -> Tensor:
    """Last hidden state of one image: ToMe's equations with whatever ``choose`` merges between attention and MLP, or
    before the queries."""
    adapter, (norm1, attention, output, norm2) = get_adapter(model.config.model_type), PARTS[model.config.model_type]
    encoder, protected = adapter.encoder(model), adapter.shape(model).num_protected
    x = encoder.embeddings(pixels)[0]
    if hasattr(encoder, "pre_layrnorm"):
        x = encoder.pre_layrnorm(x)
    sizes = torch.ones(len(x), dtype=x.dtype)
    for layer, block in enumerate(adapter.blocks(model)):
        parts, states = getattr(block, attention), getattr(block, norm1)(x)
        q, k, v = (
            getattr(parts, name)(states).unflatten(-1, (-1, parts.head_dim)).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        logits = q @ k.mT / parts.head_dim**0.5
        probabilities = (logits + sizes.log() if proportional else logits).softmax(-1)
        if where == "mid_block":
            x = x + getattr(parts, output)((probabilities @ v).transpose(0, 1).flatten(1))
        old_sizes = sizes
        if layer in layers:
            seen = Signals(
                x[None], x[None], protected, True, keys=k[None], values=v[None],
                cls_attention=probabilities[None, :, 0], sizes=sizes[None],
            )  # fmt: skip
            groups = choose(seen, 0, layers[layer])
            merged = [sum(w * x[protected + i] for i, w in members.items()) for members in groups.values()]
            total = [sum(sizes[protected + i] for i in members) for members in groups.values()]
            x = torch.cat([x[:protected], torch.stack(merged)])
            sizes = torch.cat([sizes[:protected], torch.stack(total)])
        if where == "queries":  # of the states as they are now, to the keys and values of all that entered
            q = parts.q_proj(getattr(block, norm1)(x)).unflatten(-1, (-1, parts.head_dim)).transpose(0, 1)
            logits = q @ k.mT / parts.head_dim**0.5
            probabilities = (logits + old_sizes.log() if proportional else logits).softmax(-1)
            x = x + getattr(parts, output)((probabilities @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(getattr(block, norm2)(x))
    return encoder.layernorm(x) if hasattr(encoder, "layernorm") else x


def half(choose: Choose) -> Choose:
    """At most half of the tokens merge in a layer."""
    return lambda signals, row, r: choose(signals, row, min(r, (signals.tokens.shape[1] - signals.num_protected) // 2))


LAYERS = {1: 9, 2: 40, 4: 5, 7: 3}  # in block 2 half of the tokens are fewer than 40


CASES = {
    "tome": (config_of("tome", r=tuple(LAYERS.values()), layers=tuple(LAYERS)), half(naive_tome), LAYERS, True),
    "tome, queries": (
        config_of("tome", r=tuple(LAYERS.values()), layers=tuple(LAYERS), where="queries"),
        half(naive_tome),
        LAYERS,
        True,
    ),
    "tome, plain attention": (
        config_of("tome", r=tuple(LAYERS.values()), layers=tuple(LAYERS), proportional_attention=False),
        half(naive_tome),
        LAYERS,
        False,
    ),
    "salience_merge": (
        config_of("salience_merge", r=tuple(LAYERS.values()), layers=tuple(LAYERS)),
        half(naive_salience_merge),
        LAYERS,
        True,
    ),
    "salience_merge, contrast": (
        config_of("salience_merge", r=tuple(LAYERS.values()), layers=tuple(LAYERS), salience="contrast"),
        half(partial(naive_salience_merge, salience_of="contrast")),
        LAYERS,
        True,
    ),
    "evit": (
        config_of("evit", layers=(1, 4), keep_ratios=(0.75, 0.5)),
        lambda signals, row, percent: naive_evit(signals, row, percent / 100, True),
        {1: 75, 4: 50},
        False,
    ),
    "pitome": (
        config_of("pitome", layers=(1, 4), keep_ratios=(0.75, 0.5), margin=0.8),
        lambda signals, row, k: naive_pitome(signals, row, k, {16: 0.8 * 7 / 8, 24: 0.8 / 2}[k]),
        {1: 16, 4: 24},  # 64 patches, 48, 24
        True,
    ),
}


MODELS = [("vit", ViTModel), ("deit", DeiTModel), ("clip_vision_model", CLIPVisionModel)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model_class", MODELS, ids=lambda pair: pair[0])
def test_a_model_is_its_plain_loop(model_class: Any, case: str) -> None:
    config, choose, layers, proportional = CASES[case]
    model = tiny_model(*model_class)
    if refused(model, config):
        pytest.skip("blocks take no keyword arguments in this version of Transformers")
    pixels = images(BATCH)
    with torch.no_grad():
        dense = tiny_model(*model_class).double()
        arguments = (choose, layers, proportional, plan(config, get_adapter(model_class[0]).shape(model))[0].where)
        expected = torch.stack([loop(dense, pixel[None].double(), *arguments) for pixel in pixels])
        found = prune(model, config)(pixels).last_hidden_state
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda pair: pair[1].__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merging_nothing_is_bit_identical(family: Any, attention: str) -> None:
    """In every block; `prune` leaves such stages out, so they are put in by hand."""
    model = tiny_model(*family, attention=attention)
    if refused(model, config_of("tome")):
        pytest.skip("blocks take no keyword arguments in this version of Transformers")
    adapter, inputs = get_adapter(family[0]), inputs_for(model, images(BATCH))
    with torch.no_grad():
        dense = first_tensor(model(**inputs))
        adapter.attach(
            model, tuple(ToMeStage(layer, "mid_block", 0, True) for layer in range(TINY["num_hidden_layers"]))
        )
        assert torch.equal(first_tensor(model(**inputs)), dense)


# -- sizes -----------------------------------------------------------------------------------------------------------


def named(pair: Any) -> str:
    return f"{pair[0][1].__name__}-{pair[1].method}"


@pytest.mark.parametrize("pair", fitting(FAMILIES, [config_of(name) for name in SCHEDULED if merges(name)]), ids=named)
def test_token_mass_is_conserved(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (family, config), model = pair, tiny_model(*pair[0])
    shape = get_adapter(family[0]).shape(model)
    sizes: list[Tensor] = []
    stock = _block.merge_tokens

    def watched(*args: Any) -> Any:
        merged = stock(*args)
        sizes.append(merged[1])
        return merged

    monkeypatch.setattr(_block, "merge_tokens", watched)
    with torch.no_grad():
        prune(model, config)(**inputs_for(model, images(BATCH)))
    assert len(sizes) == len(plan(config, shape))
    for each in sizes:
        assert each.min() >= 1 and torch.equal(each, each.round())
        assert each.sum(1).tolist() == [shape.num_patches + shape.num_protected] * BATCH
    assert sizes[-1].shape[1] < sizes[0].shape[1]


def test_sizes_bias_the_attention_of_their_own_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps are made in pieces of the batch; each has the sizes of its samples. Against one softmax of them all."""
    model = tiny_model("vit", ViTModel)
    attention = get_adapter("vit").attention(get_adapter("vit").blocks(model)[0])
    enable_capture(attention)
    queries, keys, values = torch.randn(3, 5, 4, 9, 8)
    sizes = torch.randint(1, 5, (5, 9)).float()
    capture = Capture(frozenset({"attention"}), sizes.log()[:, None, None])
    monkeypatch.setattr("hf_tokenprune.adapters._capture.CACHE_BYTES", 2 * 4 * 4 * 9 * 9)
    output, _ = capture_attention_forward(attention, queries, keys, values, None, 0.3, token_prune_capture=capture)
    assert len(capture.attention) == 3
    weights = (queries @ keys.mT * 0.3).exp() * sizes[:, None, None]
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(torch.cat(capture.attention), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(output, (expected @ values).transpose(1, 2), atol=1e-6, rtol=1e-5)


# -- restored patches ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pair", fitting(FAMILIES, [config_of(name, restore=True) for name in SCHEDULED]), ids=named)
def test_every_patch_has_a_state_again(pair: Any) -> None:
    """One that just left has the state that the stock block gave it; the others are finite and as many as before."""
    (family, config), model = pair, tiny_model(*pair[0])
    method = config.method
    adapter = get_adapter(family[0])
    shape, blocks = adapter.shape(model), adapter.blocks(model)
    stages = {stage.name: stage for stage in plan(config, shape)}
    entered: list[Tensor] = []
    prune(model, config)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    blocks[-1].register_forward_hook(lambda module, args, output: entered.append(output))
    with torch.no_grad(), record(model) as rec:
        adapter.encoder(model)(**adapter.image_inputs(model, images(BATCH)))
    last = entered[-1][:, shape.num_protected :]
    assert last.shape[1] == shape.num_patches and last.isfinite().all()
    before = torch.arange(shape.num_patches).expand(BATCH, -1)
    for name, after in rec.kept.items():
        if not merges(method) and method != "evit" and stages[name].where == "after_block":
            stock = adapter.block_class.stock_class.forward
            with torch.no_grad():
                states = stock(blocks[int(name)], entered[int(name)], **adapter.block_class.no_mask)
            for row in range(BATCH):
                gone = [i for i, patch in enumerate(before[row].tolist()) if patch not in after[row]]
                found = last[row, before[row, gone]]
                torch.testing.assert_close(found, states[row, [shape.num_protected + i for i in gone]])
        before = after


def test_a_head_that_needs_every_patch_works_restored() -> None:
    model = tiny_model("vit", ViTForMaskedImageModeling, encoder_stride=4)
    with pytest.raises(UnsupportedModelError, match="it reconstructs every patch"):
        prune(model, config_of("random"))
    with torch.no_grad():
        dense = model(images()).reconstruction
        prune(model, config_of("random", restore=True))
        assert model(images()).reconstruction.shape == dense.shape


@pytest.mark.parametrize("method", ["zero_tprune", "random", "tome", "salience_merge", "pitome", "ats"])
@pytest.mark.parametrize("model_class", [("dinov2", Dinov2Model), ("dinov2_with_registers", Dinov2WithRegistersModel)])
def test_restored_patches_are_closer_to_dense_than_zeros(model_class: Any, method: str) -> None:
    config = config_of(method, restore=True)
    model = tiny_model(*model_class)
    if refused(model, config):
        pytest.skip("blocks take no keyword arguments in this version of Transformers")
    protected = get_adapter(model_class[0]).shape(model).num_protected
    with torch.no_grad():
        dense = model(images(4)).last_hidden_state[:, protected:]
        prune(model, config)
        with record(model) as rec:
            restored = model(images(4)).last_hidden_state[:, protected:]
    assert restored.shape == dense.shape
    stays = torch.zeros(dense.shape[:2], dtype=torch.bool).scatter(1, rec.kept[list(rec.kept)[-1]], True)
    cosine = torch.cosine_similarity(restored, dense, dim=-1)
    zero_filled = torch.cosine_similarity(restored * stays.unsqueeze(-1), dense, dim=-1)
    assert cosine.mean() > zero_filled.mean()
    assert cosine[~stays].mean() > 0.2, "not by chance"
