"""MACs of vision encoders: against published figures, against PyTorch's own counter on real forwards, and by hand."""

import dataclasses
import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokenprune import PruneConfig, RandomConfig, UniformConfig, ZeroTPruneConfig, list_methods, prune, unprune
from hf_tokenprune.cost import config_for_macs, cost
from hf_tokenprune.cost.vision import BlockCost, CostReport, ModelCost, model_cost
from hf_tokenprune.engine import find_adapter, options, plan
from hf_tokenprune.errors import ConfigError, UnsupportedModelError
from hf_tokenprune.registry import get_adapter, get_method

from .families import TINY, fitting, images, supported_classes, tiny_model

DEFAULTS = [get_method(name)() for name in list_methods("vision")]
DROP_WITHOUT_LOOKING = [
    RandomConfig(),
    RandomConfig(where="queries"),
    UniformConfig(),
]  # no products of their own: a forward costs what the model does
EVERY_CLASS = pytest.mark.parametrize(
    ("family", "cls"), supported_classes(), ids=lambda value: getattr(value, "__name__", value)
)
EVERY_METHOD = pytest.mark.parametrize("config", DEFAULTS, ids=lambda config: config.method)


def has_a_schedule(config: PruneConfig) -> bool:
    try:
        config.scaled(1.0)
    except NotImplementedError:
        return False
    return True


SCALABLE = [config for config in DEFAULTS if has_a_schedule(config)]
EVERY_SCHEDULE = pytest.mark.parametrize("config", SCALABLE, ids=lambda config: config.method)


def on_meta(width: int, patch: int = 16, image: int = 224, depth: int = 12, heads: int | None = None) -> nn.Module:
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=heads or width // 64,
        num_hidden_layers=depth,
        image_size=image,
        patch_size=patch,
        num_labels=1000,
    )
    with torch.device("meta"):
        return ViTForImageClassification(config)


def measured_macs(model: Any, pixels: torch.Tensor) -> int:
    """What PyTorch counts in one forward, in multiply-adds. Its table lacks the CPU's attention kernel."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    kernel = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=kernel) as counter, torch.no_grad():
        run = getattr(model, "get_image_features", model)  # of a model with a text tower, what images pass
        run(**get_adapter(model.config.model_type).image_inputs(model, pixels))
    total = counter.get_total_flops()
    counts = {name: sum(kinds.values()) for name, kinds in counter.get_flop_counts().items()}
    for name, flops in counts.items():
        if name.endswith("embeddings"):  # SigLIP 2 resizes position embeddings by products, which images do not pass
            total -= flops - counts.get(f"{name}.patch_embedding", flops)
    assert total % 2 == 0
    return total // 2


# -- published figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "dense", "pruned"),
    [
        pytest.param({"width": 192}, "1.25", "0.84", id="DeiT-T"),
        pytest.param({"width": 384}, "4.60", "3.12", id="DeiT-S"),
        pytest.param({"width": 768}, "17.56", "11.98", id="ViT-B/16"),
        pytest.param({"width": 1024, "depth": 24}, "61.55", "41.99", id="ViT-L/16"),
    ],
)
def test_zero_tprune_on_published_sizes(model: dict, dense: str, pruned: str) -> None:
    """Dense: what the models' papers print. Pruned: worked out from the paper's schedule, see ``test_deit_small``."""
    report = cost(on_meta(**model), ZeroTPruneConfig())
    assert f"{report.dense.macs / 1e9:.2f}" == dense
    assert f"{report.pruned.macs / 1e9:.2f}" == pruned


def test_deit_small() -> None:
    report = cost(on_meta(384), ZeroTPruneConfig())
    assert f"{report.dense.macs / 1e9:.3f}" == "4.599"
    assert f"{report.pruned.macs / 1e9:.3f}" == "3.117"
    assert f"{report.ratio:.4f}" == "0.6777"
    # The paper counts 4.55 for the dense model and 3.08 for this schedule.
    assert f"{report.ratio * 4.55:.2f}" == "3.08"
    tokens = [197, 187, 187, 159, 159, 159, 119, 119, 119, 76, 76, 66]  # 10 of each, then 1, .9, .8, .7, 1 of the rest
    assert [block.tokens_in for block in report.pruned.blocks] == tokens
    assert report.pruned.blocks[-1].tokens_out == 66
    assert {block.tokens_in for block in report.dense.blocks} == {197}


# -- PyTorch's counter -----------------------------------------------------------------------------------------------


@EVERY_CLASS
def test_dense_models_cost_what_pytorch_counts(family: str, cls: type) -> None:
    model = tiny_model(family, cls)
    assert cost(model).dense.macs == measured_macs(model, images(1))
    assert 2 * cost(model).dense.macs == measured_macs(model, images(2))


@EVERY_CLASS
@pytest.mark.parametrize("where", ["after_block", "mid_block"])
@pytest.mark.parametrize("config", DROP_WITHOUT_LOOKING, ids=lambda config: config.method)
def test_pruned_models_cost_what_pytorch_counts(family: str, cls: type, config: PruneConfig, where: str) -> None:
    config = dataclasses.replace(config, where=where)
    model = prune(tiny_model(family, cls), config)
    assert cost(model).pruned.macs == measured_macs(model, images(1)) < cost(model).dense.macs


@pytest.mark.parametrize("config", [RandomConfig(), RandomConfig(where="mid_block"), None], ids=str)
@pytest.mark.parametrize("size", [(64, 64), (20, 44), (33, 47)], ids=str)
def test_other_image_sizes_cost_what_pytorch_counts(config: PruneConfig | None, size: tuple[int, int]) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    if config is not None:
        prune(model, config)
    pixels = torch.randn(1, 3, *size)
    expected = measured_macs(model, pixels)
    assert cost(model, image_size=size).pruned.macs == expected
    assert cost(unprune(model) if config else model, config, size).pruned.macs == expected


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_attention_heads": 2},
        {"num_labels": 17},
        {"num_channels": 1},
        {"patch_size": 8, "intermediate_size": 48},
        {"pooler_output_size": 11},
    ],
    ids=str,
)
def test_other_sizes_cost_what_pytorch_counts(overrides: dict) -> None:
    for cls in (ViTForImageClassification, ViTModel):
        model = tiny_model("vit", cls, **overrides)
        pixels = torch.randn(1, model.config.num_channels, 32, 32)
        assert cost(model).dense.macs == measured_macs(model, pixels)


def test_a_model_without_pooler_costs_what_pytorch_counts() -> None:
    config = tiny_model("vit", ViTModel).config
    model = ViTModel(config, add_pooling_layer=False)
    assert cost(model).dense.macs == measured_macs(model, images(1))
    assert cost(model).dense.head == 0


@EVERY_METHOD
def test_nothing_but_the_choice_is_left_out(config: PruneConfig) -> None:
    """The products a method makes to choose are not counted; methods that do not look at the image make none."""
    model = prune(tiny_model("vit", ViTForImageClassification), config)
    left_out = measured_macs(model, images(1)) - cost(model).pruned.macs
    assert left_out >= 0
    stages = plan(config, find_adapter(model).shape(model))
    assert (left_out > 0) == any(stage.needs for stage in stages)


# -- by hand ---------------------------------------------------------------------------------------------------------


def block_macs(tokens: int, mlp_tokens: int, width: int = 32, mlp: int = 64) -> int:
    projections = 4 * tokens * width * width
    products = 2 * tokens * tokens * width
    return projections + products + 2 * mlp_tokens * width * mlp


@pytest.mark.parametrize("where", ["after_block", "mid_block"])
def test_blocks_by_hand(where: str) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    report = cost(model, RandomConfig(layers=(1, 4), keep_ratios=(0.75, 0.5), where=where))
    tokens = [65, 65, 49, 49, 49, 25, 25, 25, 25]  # 64 patches and CLS; 48, then 24 stay
    mid = where == "mid_block"
    blocks = tuple(BlockCost(n, after, block_macs(n, after if mid else n)) for n, after in pairwise(tokens))
    patches, head = 64 * (3 * 4 * 4) * 32, 32 * 5
    assert report.pruned == ModelCost(patches, blocks, head)
    assert report.dense == ModelCost(patches, (BlockCost(65, 65, block_macs(65, 65)),) * 8, head)
    assert report.pruned.macs == patches + sum(block.macs for block in blocks) + head
    assert report.ratio == report.pruned.macs / report.dense.macs
    assert report.ideal_speedup == report.dense.macs / report.pruned.macs


def test_the_formula_with_an_mlp_four_times_as_wide() -> None:
    (block, *_) = cost(on_meta(384)).dense.blocks
    assert block.macs == 12 * 197 * 384**2 + 2 * 197**2 * 384


def test_mid_block_costs_less_and_the_same_where_nothing_is_pruned() -> None:
    model = on_meta(384)
    after, mid = (cost(model, ZeroTPruneConfig(where=where)).pruned for where in ("after_block", "mid_block"))
    pruned = [i for i, block in enumerate(after.blocks) if block.tokens_in != block.tokens_out]
    for i, (a, m) in enumerate(zip(after.blocks, mid.blocks, strict=True)):
        assert (a.tokens_in, a.tokens_out) == (m.tokens_in, m.tokens_out)
        assert a.macs - m.macs == 2 * (a.tokens_in - a.tokens_out) * 384 * 1536
        assert (m.macs < a.macs) == (i in pruned)


@pytest.mark.parametrize("cls", [ViTForImageClassification, DeiTForImageClassificationWithTeacher])
@pytest.mark.parametrize(
    "config",
    [RandomConfig(exact_last_block=True), UniformConfig(exact_last_block=True), get_method("exact")()],
    ids=lambda config: config.method,
)
def test_an_exact_last_block_costs_what_pytorch_counts(config: PruneConfig, cls: type) -> None:
    """In it, only keys and values are of all tokens; the products with them are of CLS (and the distillation token)."""
    model = tiny_model("vit" if cls is ViTForImageClassification else "deit", cls)
    report = cost(model, config)
    tokens, protected = report.pruned.blocks[-1].tokens_in, find_adapter(model).shape(model).num_protected
    linear = 2 * (tokens + protected) * 32 * 32 + 2 * protected * 32 * 64
    assert report.pruned.blocks[-1] == BlockCost(tokens, protected, linear + 2 * protected * tokens * 32)
    assert report.pruned.macs == measured_macs(prune(model, config), images(1)) < report.dense.macs


# -- cost() ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "config"),
    fitting(supported_classes(), DEFAULTS),
    ids=lambda value: value[1].__name__ if isinstance(value, tuple) else value.method,
)
def test_a_pruned_model_costs_what_its_config_does(pair: Any, config: PruneConfig, tmp_path) -> None:
    model = tiny_model(*pair)
    expected = cost(model, config)
    assert expected.pruned.macs < expected.dense.macs
    assert cost(model, config.to_dict()) == cost(model, config.save_pretrained(tmp_path)) == expected
    prune(model, config)
    assert cost(model) == cost(model, config) == expected
    other = RandomConfig(layers=(0,), keep_ratios=0.5)
    assert cost(model, other) == cost(unprune(model), other)
    dense = cost(model)
    assert dense.pruned == dense.dense == expected.dense
    assert (dense.ratio, dense.ideal_speedup) == (1, 1)


def test_cost_changes_nothing() -> None:
    model = on_meta(192)
    before = model.config.to_dict()
    cost(model, ZeroTPruneConfig())
    assert model.config.to_dict() == before
    assert not any("token_prune" in vars(module) for module in model.modules())


def test_a_dictionary_and_a_table() -> None:
    report = cost(on_meta(384), ZeroTPruneConfig())
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["dense_macs"] == report.dense.macs
    assert data["pruned_macs"] == report.pruned.macs
    assert data["ratio"] * data["ideal_speedup"] == pytest.approx(1)
    assert data["tokens_in"] == [block.tokens_in for block in report.pruned.blocks]
    assert data["tokens_out"] == 66
    assert "patch embedding + blocks + head" in data["counted"]
    header, *rows, last = report.summary().splitlines()
    assert header.split() == ["part", "tokens", "in", "out", "dense", "GMACs", "pruned", "GMACs"]
    assert len({len(row) for row in (header, *rows)}) == 1
    cells = {row[:16].strip(): row[16:].split() for row in rows}
    assert list(cells) == ["patch embedding", *(f"block {i}" for i in range(12)), "head", "total"]
    assert cells["block 11"][:2] == ["66", "66"]
    assert cells["block 10"] == ["76", "66", "0.3784", f"{report.pruned.blocks[10].macs / 1e9:.4f}"]
    assert cells["total"] == ["4.5989", "3.1166"]
    for column in (-2, -1):
        parts = [float(row[column]) for name, row in cells.items() if name != "total"]
        assert sum(parts) == pytest.approx(float(cells["total"][column]), abs=len(parts) * 5e-5)  # each was rounded
    assert last.startswith("0.678 of the dense MACs, ideal speed-up 1.48x (patch embedding")


def test_bad_input() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    swin = SwinModel(SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1], num_heads=[1], window_size=4))
    for call in (lambda: cost(swin), lambda: config_for_macs(swin, RandomConfig(), 1e6)):
        with pytest.raises(UnsupportedModelError, match="no adapter for model_type='swin'"):
            call()
    with pytest.raises(UnsupportedModelError, match=r"pass model\.module"):
        cost(nn.DataParallel(model))
    with pytest.raises(ConfigError, match="block 8 does not exist"):
        cost(model, RandomConfig(layers=(8,), keep_ratios=0.5))
    with pytest.raises(ConfigError, match="prunes nothing"):
        cost(model, RandomConfig(keep_ratios=1))
    for size in ((0, 32), (32, 3), (-32, -32), (32,), (3, 32, 32)):
        with pytest.raises(ConfigError) as error:
            cost(model, image_size=size)
        assert f"image_size={size}: expected (height, width) in pixels, at least one patch (4, 4)" in str(error.value)
    for name in ("text_tokens", "new_tokens"):
        with pytest.raises(ConfigError, match=f"{name}=3: has no effect on a vision encoder, leave it out"):
            cost(model, **{name: 3})
    with pytest.raises(ConfigError, match="text_tokens=3: has no effect"):
        config_for_macs(model, RandomConfig(), 1e6, text_tokens=3)
    for call in (cost, lambda *args: config_for_macs(*args, 1e6)):
        with pytest.raises(UnsupportedModelError, match="'divprune' works on vision-language models"):
            call(model, get_method("divprune")())


@pytest.mark.parametrize("config", [c for c in DEFAULTS if c not in SCALABLE], ids=lambda config: config.method)
def test_a_method_without_a_schedule_meets_no_budget(config: PruneConfig) -> None:
    with pytest.raises(ConfigError, match=f"macs=1e\\+08: {config.method} has no schedule that could be scaled; set"):
        config_for_macs(on_meta(192), config, 1e8)


# -- a schedule for a budget -----------------------------------------------------------------------------------------


def one_token_more(report: CostReport, width: int, mlp: int) -> int:
    """MACs of the pruned model if each count were as much larger as rounding can make it.

    A stage rounds at most twice (tokens that are alike, then the ratio of the rest), and its surplus goes through all
    later stages, so after the k-th stage at most 2k tokens.
    """
    surplus, total = 0, report.pruned.patch_embedding + report.pruned.head
    for block in report.pruned.blocks:
        after = surplus + 2 * (block.tokens_in != block.tokens_out)
        total += block_macs(block.tokens_in + surplus, block.tokens_in + surplus, width, mlp)
        surplus = after
    return total


@EVERY_SCHEDULE
@pytest.mark.parametrize("fraction", [0.999, 0.9, 0.75, 0.6, 0.5, 0.4])
def test_a_budget_is_met_from_below(config: PruneConfig, fraction: float) -> None:
    model = on_meta(384)
    budget = fraction * cost(model).dense.macs
    if cost(model, config.scaled(1e3)).pruned.macs > budget:
        with pytest.raises(ConfigError, match="out of reach"):
            config_for_macs(model, config, budget)
        return
    found = config_for_macs(model, config, budget)
    report = cost(model, found)
    assert type(found) is type(config)
    assert report.pruned.macs <= budget < one_token_more(report, 384, 1536)
    for name, value in vars(config).items():
        assert getattr(found, name) == value or getattr(config.scaled(0.5), name) != value, "part of the schedule"


@pytest.mark.parametrize("config", [c for c in SCALABLE if hasattr(c, "keep_ratios")], ids=lambda config: config.method)
@pytest.mark.parametrize("fraction", [0.9, 0.75, 0.6])
def test_any_weaker_schedule_is_over_the_budget(config: PruneConfig, fraction: float) -> None:
    model = on_meta(384)
    budget = fraction * cost(model).dense.macs
    found = config_for_macs(model, config, budget)
    many = isinstance(found.keep_ratios, tuple)
    weaker = tuple(1 - (1 - ratio) * (1 - 1e-9) for ratio in (found.keep_ratios if many else [found.keep_ratios]))
    assert cost(model, found).pruned.macs <= budget
    assert cost(model, dataclasses.replace(found, keep_ratios=weaker if many else weaker[0])).pruned.macs > budget


def test_the_budget_of_a_config_gives_it_back() -> None:
    model = on_meta(384)
    config = ZeroTPruneConfig()
    shape = find_adapter(model).shape(model)
    found = config_for_macs(model, config, cost(model, config).pruned.macs)
    counts = [model_cost(shape, c.stages_for(shape)).blocks for c in (config, found)]
    assert counts[0] == counts[1]


def test_budgets_for_other_forms_of_a_config(tmp_path) -> None:
    model = on_meta(192)
    budget = 0.7 * cost(model).dense.macs
    one = config_for_macs(model, RandomConfig(keep_ratios=0.9, layers=(1, 5)), budget)
    assert isinstance(one.keep_ratios, float)
    assert cost(model, one).pruned.macs <= budget
    expected = config_for_macs(model, ZeroTPruneConfig(), budget)
    for like in (ZeroTPruneConfig().to_dict(), ZeroTPruneConfig().save_pretrained(tmp_path)):
        assert config_for_macs(model, like, budget) == expected
    counted = config_for_macs(model, ZeroTPruneConfig(num_similar=(2, 4, 6, 8, 10)), budget)
    assert all(isinstance(r, int) for r in counted.num_similar)


@pytest.mark.parametrize(
    "settings", [{"partition": "alternate"}, {"similarity_metric": "dot", "renormalize": False}], ids=str
)
def test_a_budget_so_large_that_no_token_is_similar_enough_to_leave(settings: dict) -> None:
    """The counts round to 0 on the way, where settings of the similarity stage would have no effect and are refused."""
    model = on_meta(192)
    budget = 0.999 * cost(model).dense.macs
    found = config_for_macs(model, ZeroTPruneConfig(num_similar=10, **settings), budget)
    assert cost(model, found).pruned.macs <= budget
    nothing = ZeroTPruneConfig(num_similar=10, **settings).scaled(0)
    assert set(nothing.keep_ratios) == {1.0}
    assert nothing.num_similar == 0


@EVERY_SCHEDULE
def test_budgets_out_of_reach(config: PruneConfig) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    dense = cost(model).dense.macs
    for macs in (0, -1.0, dense, 2 * dense, float("nan"), float("inf")):
        with pytest.raises(ConfigError) as error:
            config_for_macs(model, config, macs)
        assert f"macs={macs:.4g}: expected more than 0 and less than the dense model's {dense:.4g}" in str(error.value)
    least = cost(model, config.scaled(1e6)).pruned.macs
    with pytest.raises(ConfigError) as error:
        config_for_macs(model, config, least - 1)
    assert f"macs={least - 1:.4g} is out of reach of this {config.method} schedule" in str(error.value)
    assert f"which ends at {least:.4g} MACs; prune in more or earlier layers" in str(error.value)
    assert cost(model, config_for_macs(model, config, least)).pruned.macs == least
    if not options(config, find_adapter(model).shape(model)):  # which save something at any strength
        with pytest.raises(ConfigError, match="out of reach"):
            config_for_macs(model, config.scaled(0), dense - 1)


def test_scaled_schedules_keep_at_least_one_token() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    for config in SCALABLE:
        report = cost(model, config.scaled(1e6))
        assert report.pruned.blocks[-1].tokens_in >= 2  # CLS and one patch
        assert len(report.pruned.blocks) == TINY["num_hidden_layers"]
