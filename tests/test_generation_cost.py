"""MACs and cache of vision-language models: against PyTorch's own counter on real runs, papers, and by hand."""

import dataclasses
import json
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_tokenprune import PruneConfig, RandomConfig, UniformConfig, list_adapters, prune, unprune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.benchmark.decoder import random_inputs
from hf_tokenprune.cost import config_for_macs, cost
from hf_tokenprune.cost.decoder import GenerationCost, GenerationCostReport, generation_cost
from hf_tokenprune.cost.vision import BlockCost
from hf_tokenprune.engine import find_adapter, plan
from hf_tokenprune.errors import ConfigError, UnsupportedModelError
from hf_tokenprune.methods.divprune import divprune
from hf_tokenprune.signals import DecoderShape

from .decoder_families import FAMILIES, SUPPORTED, TEXTS, Case, small_size, tiny_vlm

TEXT, NEW = 9, 4
ROTARY = ("rotary_emb", "rotary_pos_emb", "patch_positional_embedding")
DROP_WITHOUT_LOOKING = [  # no products of their own: a run costs what the model does
    RandomConfig(),
    UniformConfig(layers=(1, 4), keep_ratios=(0.6, 0.5)),
]


def llava_7b(**text: Any) -> PreTrainedModel:
    """LLaVA-1.5-7B without weights: 576 image tokens."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(vocab_size=32064, **text)))


def shape_of(model: nn.Module) -> DecoderShape:
    return find_adapter(model).shape(model)


def counted_vlm(family: str, text: str | None = None) -> PreTrainedModel:
    """A tiny model that runs on products which PyTorch counts."""
    model = tiny_vlm(family, text, attention="eager")
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")
    return model


def takes(family: str, config: PruneConfig) -> bool:
    model = tiny_vlm(family)
    try:
        find_adapter(model).check(model, plan(config, shape_of(model)))
    except UnsupportedModelError:
        return False
    return True


DROPPING = [(family, config) for family in FAMILIES for config in DROP_WITHOUT_LOOKING if takes(family, config)]
IDS = {"ids": lambda value: getattr(value, "method", value) if value is not None else "dense"}


def measured(run: Any, model: nn.Module | None = None) -> dict[str, int]:
    """Multiply-adds that PyTorch counts in ``run()``, in all ("Global") and by name of a part of the model.

    Angles of the rotary embedding are left out: an outer product, which some versions make by a matrix product. The
    recurrence of recurrent layers is counted by hand, since its kernels differ: three products of each token with the
    state.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    for rotary in [name for name in counts if name.endswith(ROTARY)]:
        for name in [name for name in counts if name == "Global" or rotary.startswith(f"{name}.")]:
            counts[name] -= counts[rotary]
    assert counts["Global"] % 2 == 0
    macs = {name if name == "Global" else name.partition(".")[2]: count // 2 for name, count in counts.items()}
    for name, mixer in model.named_modules() if model is not None else ():
        if hasattr(mixer, "head_v_dim"):
            linear = sum(macs[f"{name}.{child}"] for child, part in mixer.named_children() if type(part) is nn.Linear)
            tokens = macs[f"{name}.out_proj"] // mixer.out_proj.weight.numel()
            whole = linear + 3 * tokens * mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
            macs["Global"] += whole - macs[name]
            macs[name] = whole
    return macs


def measured_parts(model: PreTrainedModel, run: Any) -> dict[str, int]:
    """The same by part of the model; "rest" is what no part of the dense model does."""
    macs, adapter = measured(run, model), find_adapter(model)
    names = {module: name for name, module in model.named_modules()}
    connectors = [names[module] for module in adapter.connectors(adapter.inner(model))]
    tower = names[adapter.tower(adapter.inner(model))]
    projector = sum(macs[name] for name in connectors)
    inside = sum(macs[name] for name in connectors if name.startswith(f"{tower}."))
    parts = {"vision_tower": macs[tower] - inside, "projector": projector, "head": macs["lm_head"]}
    for number, layer in enumerate(adapter.blocks(model)):
        parts[str(number)] = sum(macs.get(names[part], 0) for part in layer.children())
    return {**parts, "rest": macs["Global"] - sum(parts.values())}


def counted_parts(count: GenerationCost) -> dict[str, int]:
    parts = {"vision_tower": count.vision_tower, "projector": count.projector, "head": count.head}
    return parts | {str(i): layer.macs for i, layer in enumerate(count.layers)} | {"rest": 0}


# -- PyTorch's counter, on real runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_a_dense_prefill_costs_what_pytorch_counts(family: str, text: str) -> None:
    model = counted_vlm(family, text)
    size = small_size(model)
    inputs = random_inputs(model, 1, TEXT, size)
    report = cost(model, image_size=size, text_tokens=TEXT)
    assert counted_parts(report.dense) == measured_parts(model, lambda: model(**inputs, logits_to_keep=1))
    assert report.dense.macs == sum(counted_parts(report.dense).values())
    assert report.pruned == report.dense


@pytest.mark.parametrize(("family", "config"), DROPPING, **IDS)
def test_a_pruned_prefill_costs_what_pytorch_counts(family: str, config: PruneConfig) -> None:
    model = prune(counted_vlm(family), config)
    size = small_size(model)
    inputs = random_inputs(model, 1, TEXT, size)
    report = cost(model, image_size=size, text_tokens=TEXT)
    assert counted_parts(report.pruned) == measured_parts(model, lambda: model(**inputs, logits_to_keep=1))
    assert report.pruned.macs < report.dense.macs


@pytest.mark.parametrize(("family", "config"), [*((family, None) for family in FAMILIES), *DROPPING], **IDS)
def test_generating_costs_what_pytorch_counts_and_fills_the_cache(family: str, config: PruneConfig | None) -> None:
    model = counted_vlm(family)
    if config is not None:
        prune(model, config)
    size = small_size(model)
    inputs, outputs = random_inputs(model, 1, TEXT, size), []

    def generate() -> None:
        settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
        outputs.append(model.generate(**inputs, **settings))

    counted = cost(model, image_size=size, text_tokens=TEXT, new_tokens=NEW).pruned
    assert counted.decode_steps == NEW - 1
    if not shape_of(model).recurrent:  # whose decode steps are made without matrix products
        assert counted.macs + counted.decode_macs == measured(generate)["Global"]
    else:
        generate()
    held = [layer for layer in outputs[0][CACHE_NAME].layers if isinstance(layer, DynamicLayer)]
    tensors = [tensor for layer in held for tensor in (layer.keys, layer.values)]
    assert counted.kv_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def has_sizes(family: str) -> bool:
    model = tiny_vlm(family)
    return find_adapter(model).shape(model, (8, 30)) != shape_of(model)


@pytest.mark.parametrize("family", [*filter(has_sizes, FAMILIES)])
def test_other_image_sizes_cost_what_pytorch_counts(family: str) -> None:
    model = prune(counted_vlm(family), RandomConfig(keep_ratios=0.5))
    for size in ((18, 16), (8, 30), (40, 9)):
        inputs = random_inputs(model, 1, TEXT, size)
        counted = cost(model, image_size=size, text_tokens=TEXT).pruned
        run = partial(model, **inputs, logits_to_keep=1)
        assert counted_parts(counted) == measured_parts(model, run)


def test_a_base_model_costs_what_pytorch_counts() -> None:
    whole = tiny_vlm("llava", attention="eager")
    model, inputs = whole.model, random_inputs(whole, 1, TEXT)
    report = cost(model, text_tokens=TEXT)
    assert report.dense.head == 0
    assert report.dense.macs == measured(lambda: model(**inputs))["Global"]


@pytest.mark.parametrize(("family", "case"), SUPPORTED, ids=str)
def test_nothing_but_the_choice_is_left_out(family: str, case: Case) -> None:
    """Tokens leave where the count says, and a method makes products of its own only where it looks at something."""
    model = counted_vlm(family)
    config, size = case.config(model), small_size(model)
    stages = plan(config, shape_of(model))
    inputs = random_inputs(prune(model, config), 1, TEXT, size)
    counted = counted_parts(cost(model, image_size=size, text_tokens=TEXT).pruned)
    macs = measured_parts(model, lambda: model(**inputs, logits_to_keep=1))
    choosing = macs.pop("rest") + macs.pop("vision_tower") - counted.pop("vision_tower") - counted.pop("rest")
    assert macs == counted
    assert choosing >= 0
    assert choosing == 0 or any(stage.needs or stage.where == "entrance" for stage in stages)


# -- published figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "fields", "image_tokens", "printed"),
    [
        pytest.param(None, {}, 576, "3.82", id="dense"),
        pytest.param("transprune", {}, 576, "1.56", id="TransPrune-High"),
        pytest.param("fastv", {}, 576, "2.01", id="FastV-K2-R.5"),
        pytest.param("fastv", {"keep_ratio": 0.25}, 576, "1.12", id="FastV-K2-R.75"),
        pytest.param("pyramiddrop", {}, 576, "1.78", id="PyramidDrop"),
        pytest.param("transprune", {"layers": (4, 6, 9), "accumulate_layers": (4,)}, 576, "1.35", id="layers-5-7-10"),
        pytest.param("transprune", {"layers": (8, 10, 13)}, 576, "1.77", id="layers-9-11-14"),
        pytest.param(None, {}, 2880, "20.83", id="NeXT-dense"),
        pytest.param("transprune", {}, 2880, "8.33", id="NeXT-TransPrune-High"),
        pytest.param("fastv", {}, 2880, "10.55", id="NeXT-FastV-K2-R.5"),
    ],
)
def test_figures_of_the_transprune_paper(method: str | None, fields: dict, image_tokens: int, printed: str) -> None:
    """Its tables 1, 2 and 9: "TFLOPs" are multiply-adds of image tokens in the layers, 4nd² + 2n²d + 3ndm each."""
    shape = dataclasses.replace(shape_of(llava_7b()), image_tokens=image_tokens)
    stages = () if method is None else plan(PruneConfig.for_method(method, **fields), shape)
    layers = generation_cost(shape, stages, text_tokens=0).layers
    assert f"{sum(layer.macs for layer in layers) / 1e12:.2f}" == printed
    n, d, m = layers[-1].tokens_in, 4096, 11008
    assert layers[-1].macs == 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m


def test_counts_of_llava_7b_with_the_default_text() -> None:
    report = cost(llava_7b(), PruneConfig.for_method("transprune"))
    assert (report.text_tokens, report.new_tokens) == (64, 32)
    tokens = [640] * 7 + [568] * 2 + [424] * 3 + [136] * 20  # 576, 504, 360, 72 image tokens behind layers 7, 9, 12
    assert [layer.tokens_in for layer in report.pruned.layers] == tokens
    assert report.dense.kv_bytes == 32 * 2 * 4096 * (640 + 31) * 4
    # The tower is CLIP ViT-L/14 at 336 pixels: 24 blocks of 577 tokens.
    block = 12 * 577 * 1024**2 + 2 * 577**2 * 1024
    assert report.dense.vision_tower == 576 * 3 * 14**2 * 1024 + 24 * block
    assert report.dense.projector == 576 * (1024 * 4096 + 4096**2)
    assert report.pruned.vision_tower == report.dense.vision_tower


@pytest.mark.parametrize(("image_tokens", "kept"), [(576, 56), (2340, 229)])
def test_the_choice_of_divprune_is_below_two_per_cent_of_a_prefill(image_tokens: int, kept: int) -> None:
    """Of LLaVA-1.5-7B's at batch 4: PyTorch counts the products; each step compares and updates one row."""
    batch, width = 4, 4096
    features = torch.empty(batch, image_tokens, width, device="meta")
    choice = measured(lambda: divprune(features, kept))["Global"] + 2 * batch * kept * image_tokens
    shape = dataclasses.replace(shape_of(llava_7b()), image_tokens=image_tokens)
    assert batch * image_tokens**2 * width <= choice <= 0.002 * batch * generation_cost(shape).macs


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_layers_decode_and_cache_by_hand() -> None:
    """Grouped queries, heads that do not divide the width, two stages: every number worked out in a loop."""
    text = LlamaConfig(
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)).to(
        torch.bfloat16
    )
    config = UniformConfig(layers=(0, 2), keep_ratios=(0.5, 0.25))
    report = cost(model, config, text_tokens=5, new_tokens=6)
    image = [16, 8, 8, 2, 2, 2]  # 16 patches; behind layers 0 and 2 a half, then a quarter of that stays
    width, queries, keys, mlp = 48, 6 * 16, 2 * 16, 70
    linear = width * queries + 2 * width * keys + queries * width + 3 * width * mlp

    def layer(new: int, held: int) -> int:
        return new * linear + 2 * new * held * queries

    expected, steps, cached = [], 0, 0
    for entering, leaving in pairwise(image):
        expected.append(BlockCost(entering + 5, leaving + 5, layer(entering + 5, entering + 5)))
        steps += sum(layer(1, entering + 5 + step) for step in range(1, 6))
        cached += 2 * keys * (entering + 5 + 5) * 2  # keys and values of 5 new tokens, 2 bytes a number
    assert report.pruned.layers == tuple(expected)
    assert report.pruned.head == 48 * 50
    assert report.pruned.decode_macs == steps + 5 * 48 * 50
    assert report.pruned.decode_macs_per_token == report.pruned.decode_macs / 5
    assert report.pruned.kv_bytes == cached
    assert report.dense.layers == (BlockCost(21, 21, layer(21, 21)),) * 5


@pytest.mark.parametrize(
    ("method", "fields", "entering"),
    [
        ("divprune", {}, 56),
        ("visionzip", {}, 64),
        ("cls_attention", {}, 64),
        ("visionzip", {"dominant": 162, "contextual": 30}, 192),
    ],
)
def test_tokens_chosen_in_front_of_the_decoder_enter_no_layer(method: str, fields: dict, entering: int) -> None:
    """The vision tower and the projector still run on all of them."""
    report = cost(llava_7b(), PruneConfig.for_method(method, **fields), text_tokens=10)
    assert {layer.tokens_in for layer in report.pruned.layers} == {entering + 10}
    assert report.pruned.vision_tower + report.pruned.projector == report.dense.vision_tower + report.dense.projector
    assert report.pruned.head == report.dense.head


def test_a_stack_counts_from_what_the_first_of_it_leaves() -> None:
    report = cost(llava_7b(), PruneConfig.for_method("stack"), text_tokens=0 + 1)
    tokens = [192] * 7 + [168] * 2 + [120] * 3 + [24] * 20
    assert [layer.tokens_in - 1 for layer in report.pruned.layers] == tokens


# -- cost() ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "case"), SUPPORTED, ids=str)
def test_a_pruned_model_costs_what_its_config_does(family: str, case: Case, tmp_path: Any) -> None:
    model = tiny_vlm(family)
    config = case.config(model)
    before = model.config.to_dict()
    expected = cost(model, config)
    assert isinstance(expected, GenerationCostReport)
    assert expected.pruned.macs < expected.dense.macs and expected.pruned.kv_bytes < expected.dense.kv_bytes
    assert cost(model, config.to_dict()) == cost(model, config.save_pretrained(tmp_path)) == expected
    assert model.config.to_dict() == before
    assert cost(prune(model, config)) == cost(model, config) == expected
    assert cost(unprune(model)).pruned == expected.dense


def test_ratios_a_dictionary_and_a_table() -> None:
    report = cost(llava_7b(), PruneConfig.for_method("transprune"), text_tokens=40, new_tokens=11)
    dense, pruned = report.dense, report.pruned
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["ratio"] == report.ratio == pruned.macs / dense.macs
    assert data["ideal_speedup"] == report.ideal_speedup == dense.macs / pruned.macs
    assert data["decode_ratio"] == report.decode_ratio == pruned.decode_macs / dense.decode_macs
    assert data["kv_ratio"] == report.kv_ratio == pruned.kv_bytes / dense.kv_bytes
    assert data["pruned_decode_macs_per_token"] * 10 == pytest.approx(pruned.decode_macs)
    assert (data["text_tokens"], data["new_tokens"], data["tokens_out"]) == (40, 11, 112)
    assert data["tokens_in"] == [layer.tokens_in for layer in pruned.layers]
    assert "causal attention as a full square" in data["counted"]

    lines = report.summary().splitlines()
    cells = {line[:14].strip(): line[14:].split() for line in lines[1:-3]}
    assert list(cells)[:3] == ["vision tower", "projector", "layer 0"]
    assert list(cells)[-5:] == ["head", "total", "prefill", "decode", "KV cache"]
    assert cells["layer 6"] == ["616", "544", f"{dense.layers[6].macs / 1e9:.4f}", f"{pruned.layers[6].macs / 1e9:.4f}"]
    for column in (-2, -1):
        parts = [
            float(row[column]) for name, row in cells.items() if name.split()[0] in ("vision", "projector", "layer")
        ]
        prefill = float(cells["prefill"][column - 1])
        assert sum(parts) + float(cells["head"][column]) == pytest.approx(prefill, abs=len(parts) * 5e-5)
    assert cells["KV cache"] == [
        "MiB",
        f"{dense.kv_bytes / 2**20:.4f}",
        f"{pruned.kv_bytes / 2**20:.4f}",
        f"{report.kv_ratio:.3f}",
    ]
    assert lines[-2] == "one image of 336x336 pixels (576 tokens) and 40 text tokens in, 11 new tokens out"
    assert lines[-1] == "image tokens 576 -> 504 -> 360 -> 72"
    assert len({len(line) for line in lines[:-3] if not line.startswith(("total", "prefill", "decode", "KV"))}) == 1


def test_the_cache_is_in_the_dtype_of_the_model() -> None:
    model = tiny_vlm("llava")
    assert 2 * cost(model.to(torch.bfloat16)).dense.kv_bytes == cost(model.float()).dense.kv_bytes


def test_bad_input() -> None:
    model, crops = tiny_vlm("llava"), tiny_vlm("llava_next")
    for arguments, words in (
        ({"text_tokens": 0}, "text_tokens=0: expected at least 1"),
        ({"new_tokens": 1}, "new_tokens=1: expected at least 2"),
        ({"image_size": (20, 20)}, "has no effect on this model, every image has 25 tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            cost(model, **arguments)
    for size in ((0, 9), (9,), (3, 9, 9)):
        with pytest.raises(ConfigError, match="expected \\(height, width\\) in pixels"):
            cost(crops, image_size=size)
    with pytest.raises(UnsupportedModelError, match="'zero_tprune' works on vision encoders"):
        cost(model, PruneConfig.for_method("zero_tprune"))


# -- a schedule for a budget -----------------------------------------------------------------------------------------

SCALABLE = [
    PruneConfig.for_method(name)
    for name in ("divprune", "cls_attention", "fastv", "pyramiddrop", "transprune", "random")
]


@pytest.mark.parametrize("config", SCALABLE, ids=lambda config: config.method)
@pytest.mark.parametrize("fraction", [0.9, 0.6])
def test_a_budget_is_met_from_below(config: PruneConfig, fraction: float) -> None:
    model = llava_7b()
    budget = fraction * cost(model).dense.macs
    found = config_for_macs(model, config, budget)
    report = cost(model, found)
    assert type(found) is type(config)
    one_token_more = dataclasses.replace(shape_of(model), image_tokens=577)
    of_a_token = generation_cost(one_token_more).macs - report.dense.macs
    assert report.pruned.macs <= budget < report.pruned.macs + 3 * of_a_token  # three stages round at most


def test_text_is_part_of_the_budget() -> None:
    model, config = llava_7b(), PruneConfig.for_method("divprune")
    budget = 0.5 * cost(model).dense.macs
    short, long = (config_for_macs(model, config, budget, text_tokens=n) for n in (16, 256))
    assert short.keep_ratio > long.keep_ratio
    assert cost(model, long, text_tokens=256).pruned.macs <= budget < cost(model, short, text_tokens=256).pruned.macs


def test_budgets_that_cannot_be_met() -> None:
    model = llava_7b()
    with pytest.raises(ConfigError, match="visionzip has no schedule that could be scaled; set the fields"):
        config_for_macs(model, PruneConfig.for_method("visionzip"), 1e12)
    with pytest.raises(UnsupportedModelError, match="'zero_tprune' works on vision encoders"):
        config_for_macs(model, PruneConfig.for_method("zero_tprune"), 1e12)
    with pytest.raises(ConfigError, match="less than the dense model's"):
        config_for_macs(model, PruneConfig.for_method("divprune"), 1e13)
    with pytest.raises(ConfigError, match="out of reach of this transprune schedule"):
        config_for_macs(model, PruneConfig.for_method("transprune"), 1e12)


def test_every_family_with_a_decoder_is_here() -> None:
    assert set(FAMILIES) <= set(list_adapters()) and len(FAMILIES) >= 4
