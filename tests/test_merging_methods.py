"""ToMe, EViT, ATS, PiToMe and salience-weighted merging: against plain loops, their schedules, and published work."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel, ViTForImageClassification, ViTModel

from hf_tokenprune import PruneConfig, ZeroTPruneConfig, prune, record
from hf_tokenprune.adapters.vision._block import merge_tokens
from hf_tokenprune.cost.vision import model_cost
from hf_tokenprune.engine import options, plan
from hf_tokenprune.errors import ConfigError, UnsupportedModelError
from hf_tokenprune.methods.ats import ATSConfig, ATSStage
from hf_tokenprune.methods.evit import EViTConfig, EViTStage
from hf_tokenprune.methods.exact import ExactConfig
from hf_tokenprune.methods.layerwise import BaselineConfig
from hf_tokenprune.methods.merging import MergingConfig, even
from hf_tokenprune.methods.pitome import PiToMeConfig, PiToMeStage
from hf_tokenprune.methods.random import RandomConfig
from hf_tokenprune.methods.salience_merge import SalienceMergeConfig, SalienceMergeStage
from hf_tokenprune.methods.tome import ToMeConfig, ToMeStage
from hf_tokenprune.methods.visionwise import VisionConfig
from hf_tokenprune.registry import get_adapter, get_method, list_methods
from hf_tokenprune.signals import Merging, ModelShape, Reduction, Signals, Stage

from .families import images, inputs_for, refused, supported_classes, tiny_model
from .reference_merging import Groups, naive_ats, naive_evit, naive_pitome, naive_salience_merge, naive_tome
from .test_contract_methods import DECODER_SHAPE, SHAPE, make_signals

BATCH = 3
MERGING = [ToMeConfig, SalienceMergeConfig]


@pytest.fixture(params=["vit", "boosted", "distilled", "no_cls", "first"])
def signals(request: pytest.FixtureRequest) -> Signals:
    """One, two or no protected tokens; CLS that attends to a few tokens only; no token merged yet."""
    made = make_signals(BATCH, 25, {"distilled": 2, "no_cls": 0}.get(request.param, 1))
    if request.param == "boosted":
        made = replace(made, cls_attention=(20 * made.cls_attention).softmax(-1))
    return replace(made, sizes=None) if request.param == "first" else made


def groups_of(reduction: Reduction | Merging, signals: Signals, row: int) -> Groups:
    """Each token that stays, with the weights of all that its state is made of: what merging does to unit vectors."""
    keep, num_tokens = reduction.keep[row].tolist(), signals.tokens.shape[1]
    if isinstance(reduction, Reduction):
        return {token: {token: 1.0} for token in keep}
    units = torch.eye(num_tokens).expand(len(signals.tokens), -1, -1)
    states = merge_tokens(units, signals.sizes, reduction)[0][row]
    assert torch.equal(states[: signals.num_protected], torch.eye(num_tokens)[: signals.num_protected])
    patches = states[signals.num_protected :, signals.num_protected :]
    return {
        token: {i: weight for i, weight in enumerate(weights.tolist()) if weight}
        for token, weights in zip(keep, patches, strict=True)
    }


def check(stage: Stage, signals: Signals, expected: list[Groups]) -> None:
    """The stage merges the same tokens, with the same weights, to the same states in the same order."""
    patches = signals.tokens[:, signals.num_protected :]
    reduction = stage.reduce(signals, stage.num_kept(patches.shape[1]))
    states = patches.gather(1, reduction.keep.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    if isinstance(reduction, Merging):
        states = merge_tokens(signals.tokens, signals.sizes, reduction)[0][:, signals.num_protected :]
    for row, groups in enumerate(expected):
        found = groups_of(reduction, signals, row)
        assert [(token, set(members)) for token, members in found.items()] == [(t, set(m)) for t, m in groups.items()]
        for token, members in groups.items():
            assert found[token] == pytest.approx(members, rel=1e-5)
        means = [sum(w * patches[row, i].double() for i, w in groups[token].items()) for token in groups]
        torch.testing.assert_close(states[row].double(), torch.stack(means), rtol=1e-4, atol=1e-5)


# -- against plain loops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4, 12])
def test_tome_is_its_description(signals: Signals, r: int) -> None:
    expected = [naive_tome(signals, row, r) for row in range(BATCH)]
    check(ToMeStage(2, "mid_block", r, True), signals, expected)


@pytest.mark.parametrize("r", [1, 4, 12])
@pytest.mark.parametrize("similarity", ["per_head", "mean_key"])
@pytest.mark.parametrize("salience", ["cls", "contrast"])
def test_salience_merge_is_its_description(signals: Signals, r: int, similarity: str, salience: str) -> None:
    expected = [naive_salience_merge(signals, row, r, similarity, salience) for row in range(BATCH)]
    check(SalienceMergeStage(2, "queries", r, True, similarity, salience), signals, expected)


@pytest.mark.parametrize("keep_ratio", [0.96, 0.8, 0.5])
@pytest.mark.parametrize("margin", [0.9, 0.3, 0.0])
def test_pitome_is_its_description(signals: Signals, keep_ratio: float, margin: float) -> None:
    stage = PiToMeStage(2, "mid_block", keep_ratio, margin, True)
    expected = [naive_pitome(signals, row, 25 - stage.num_kept(25), margin) for row in range(BATCH)]
    check(stage, signals, expected)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("keep_ratio", [0.93, 0.7, 0.1])
def test_evit_is_its_description(signals: Signals, keep_ratio: float, fuse: bool) -> None:
    expected = [naive_evit(signals, row, keep_ratio, fuse) for row in range(BATCH)]
    check(EViTStage(2, "mid_block", keep_ratio, fuse), signals, expected)


@pytest.mark.parametrize("sampling", ["top_k", "inverse_transform"])
@pytest.mark.parametrize("keep_ratio", [0.9, 0.5, 0.1])
def test_ats_is_its_description(signals: Signals, keep_ratio: float, sampling: str) -> None:
    stage = ATSStage(2, "after_block", keep_ratio, sampling)
    keep = stage.reduce(signals, stage.num_kept(25)).keep
    assert keep.tolist() == [naive_ats(signals, row, stage.num_kept(25), sampling) for row in range(BATCH)]


def test_the_two_samplings_of_ats_differ() -> None:
    """Otherwise the test above would not tell them apart."""
    signals = make_signals(BATCH, 25)
    top, drawn = (ATSStage(2, "after_block", 0.5, sampling) for sampling in ("top_k", "inverse_transform"))
    assert not torch.equal(top.reduce(signals, 12).keep, drawn.reduce(signals, 12).keep)


def test_pitome_sees_tokens_as_a_set() -> None:
    """Its partition goes by energy, not by position: whoever is merged into whom does not depend on the order."""
    signals = make_signals(1, 25)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.zeros(1, dtype=torch.int64), order + 1])
    permuted = replace(
        signals,
        keys=signals.keys[:, :, positions],
        tokens=signals.tokens[:, positions],
        sizes=signals.sizes[:, positions],
    )
    stage = PiToMeStage(2, "mid_block", 0.7, 0.5, True)
    groups = {frozenset(members) for members in groups_of(stage.reduce(signals, 17), signals, 0).values()}
    moved = groups_of(stage.reduce(permuted, 17), permuted, 0)
    assert {frozenset(order[list(members)].tolist()) for members in moved.values()} == groups


@pytest.mark.parametrize(
    "stage",
    [
        ToMeStage(0, "mid_block", 0, True),
        SalienceMergeStage(0, "mid_block", 0, True),
        PiToMeStage(0, "mid_block", 1.0, 0.9, True),
        EViTStage(0, "mid_block", 1.0, True),
        EViTStage(0, "mid_block", 1.0, False),
        ATSStage(0, "after_block", 1.0, "top_k"),
        ATSStage(0, "after_block", 1.0, "inverse_transform"),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_keeping_all_is_the_identity(signals: Signals, stage: Stage) -> None:
    assert stage.num_kept(25) == 25
    reduction = stage.reduce(signals, 25)
    assert torch.equal(reduction.keep, torch.arange(25).expand(BATCH, -1)) and isinstance(reduction, Reduction)


def test_tokens_that_nothing_speaks_for_are_averaged_evenly() -> None:
    signals = make_signals(1, 25)
    signals = replace(signals, values=torch.zeros_like(signals.values))
    stage = SalienceMergeStage(0, "mid_block", 12, True)
    for members in groups_of(stage.reduce(signals, 13), signals, 0).values():
        assert list(members.values()) == pytest.approx([1 / len(members)] * len(members))


def test_stages_ask_for_no_more_than_they_read() -> None:
    """None needs the full attention, so the fused kernel stays."""
    needs = {
        "tome": {"keys"},
        "pitome": {"keys"},
        "evit": {"cls_attention"},
        "ats": {"cls_attention", "values"},
        "salience_merge": {"cls_attention", "keys", "values"},
    }
    cases = [(get_method(name)(), expected) for name, expected in needs.items()]
    cases.append((SalienceMergeConfig(salience="contrast"), {"keys", "values"}))
    for config, expected in cases:
        for stage in config.stages_for(SHAPE):
            assert stage.needs == expected
            signals = make_signals(1, 36)
            unasked = {"attention", "queries", "keys", "values", "cls_attention"} - expected
            stage.reduce(replace(signals, **dict.fromkeys(unasked)), stage.num_kept(36))


# -- schedules -------------------------------------------------------------------------------------------------------


def deit(width: int, depth: int = 12, patches: int = 14) -> ModelShape:
    """A ViT with patches of 16 and an MLP of four widths: DeiT and the ViTs of ToMe's tables."""
    return ModelShape(
        depth=depth,
        width=width,
        mlp_width=4 * width,
        num_heads=width // 64,
        head_dim=64,
        image_size=(16 * patches, 16 * patches),
        patch_size=(16, 16),
        num_channels=3,
        num_protected=1,
        has_cls=True,
        head_macs=1000 * width,
    )


TINY, SMALL = deit(192), deit(384)


def tokens_left(config: PruneConfig, shape: ModelShape) -> list[int]:
    cost = model_cost(shape, plan(config, shape), **({"exact_last_block": True} if options(config, shape) else {}))
    return [block.tokens_in for block in cost.blocks]


def test_the_defaults_are_those_of_the_papers() -> None:
    assert tokens_left(ToMeConfig(), TINY) == [197 - 13 * layer for layer in range(12)]
    assert tokens_left(ToMeConfig(r=13), TINY) == tokens_left(ToMeConfig(), TINY)
    assert [(s.layer, s.where, s.num_kept(196)) for s in EViTConfig().stages_for(TINY)] == [
        (layer, "mid_block", 138 + 1) for layer in (3, 6, 9)
    ]
    assert [(s.layer, s.where, s.num_kept(196)) for s in ATSConfig().stages_for(TINY)] == [
        (layer, "after_block", 137) for layer in (2, 5, 8)
    ]
    stages = PiToMeConfig().stages_for(TINY)
    assert [stage.layer for stage in stages] == list(range(12))
    assert [stage.margin for stage in stages] == pytest.approx([0.9 - 0.9 * layer / 12 for layer in range(12)])
    for config, place in (
        (PiToMeConfig(), "mid_block"),
        (ToMeConfig(), "mid_block"),
        (SalienceMergeConfig(), "queries"),
    ):
        assert {stage.where for stage in config.stages_for(TINY)} == {place}


@pytest.mark.parametrize(
    ("r", "first"), [(0.1, 6), (0.25, 6), (0.4, 5), (0.5, 5), (0.7, 4), (0.75, 4), (0.9, 3), (12, 4)]
)
def test_salience_merge_starts_earlier_the_more_it_merges(r: float, first: int) -> None:
    """At block 7 - 4 r, counted from 1; the last block is left to `exact_last_block`."""
    layers = [stage.layer + 1 for stage in SalienceMergeConfig(r=r).stages_for(TINY)]
    assert layers == list(range(first, 12))
    assert SalienceMergeConfig().exact_last_block and options(SalienceMergeConfig(), TINY) == {"exact_last_block": True}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 12, 24, 32])
@pytest.mark.parametrize("config_class", [ToMeConfig, SalienceMergeConfig, PiToMeConfig, EViTConfig, ATSConfig])
def test_defaults_fit_every_depth(config_class: type[PruneConfig], depth: int) -> None:
    stages = config_class().stages_for(deit(192, depth))
    layers = [stage.layer for stage in stages]
    assert stages and all(a < b for a, b in pairwise(layers)) and layers[0] >= 0 and layers[-1] < depth


@pytest.mark.parametrize("layers", [(3, 5, 6, 9), (0, 1)])
@pytest.mark.parametrize("total", [1, 40, 100, 140])
def test_a_proportional_spread_keeps_the_same_part_at_each_layer(layers: tuple[int, ...], total: int) -> None:
    config = ToMeConfig(r=total / 196, spread="proportional", layers=layers)
    part, exact, left = (1 - total / 196) ** (1 / len(layers)), 196.0, 196
    stages = config.stages_for(TINY)
    assert [stage.layer for stage in stages] == list(layers)
    for stage in stages:
        exact, left = exact * part, stage.num_kept(left)
        assert abs(left - exact) <= 0.5 + 1e-9
    assert left == 196 - total


@pytest.mark.parametrize("depth", [12, 24, 31])
def test_the_rule_has_no_steps(depth: int) -> None:
    """Work falls with the fraction as smoothly as whole tokens allow, whatever block merging starts in."""
    shape, token = deit(192, depth), 12 * 192 * 192 + 4 * 197 * 192  # of one token in one block, at most
    last = model_cost(shape).macs
    for thousandth in range(5, 950):
        config = SalienceMergeConfig(r=thousandth / 1000, exact_last_block=False)
        found = model_cost(shape, plan(config, shape)).macs
        assert 0 <= last - found <= depth * token
        last = found


def test_spread_is_even_and_exact() -> None:
    for total in range(60):
        for count in range(1, 14):
            for more in (0, 0.2, 0.45):
                parts = even(total + more, count)
                assert len(parts) == count and sum(parts) == total and max(parts) - min(parts) <= 1
    assert even(119, 12) == (10, 10, 10, 10, 10, 10, 9, 10, 10, 10, 10, 10)
    assert even(118.6, 12) == (10, 10, 10, 10, 9, 10, 10, 10, 10, 10, 10, 10), "as many, but one sooner"


@pytest.mark.parametrize("config_class", MERGING)
def test_a_fraction_is_of_the_checkpoints_patches(config_class: type[MergingConfig]) -> None:
    """Strength can then be scaled in steps of one token, which a budget of MACs needs."""
    for total in range(1, 190):
        config = config_class(r=total / 196)
        assert sum(stage.r for stage in config.stages_for(TINY)) == total
    config = config_class(r=100 / 196).scaled(1.01)
    assert sum(stage.r for stage in config.stages_for(TINY)) == 101
    assert sum(stage.r for stage in config.stages_for(deit(192, patches=24))) == round(1.01 * 100 * 576 / 196)


@pytest.mark.parametrize("config_class", MERGING)
def test_counts_and_their_scaling(config_class: type[MergingConfig]) -> None:
    config = config_class(r=(3, 0, 8), layers=(1, 2, 5))
    assert [(stage.layer, stage.r) for stage in config.stages_for(TINY)] == [(1, 3), (2, 0), (5, 8)]
    assert [stage.layer for stage in plan(config, TINY)] == [1, 5], "a layer that merges nothing is not touched"
    assert config.scaled(0.5).r == (2, 0, 4)
    assert config_class(r=9, layers=(2, 4)).scaled(0.5).r == 5
    assert config_class().scaled(100).r == 0.99
    assert PruneConfig.from_dict(config.to_dict()) == config


def test_no_more_than_half_is_merged() -> None:
    stage = ToMeStage(0, "mid_block", 13, True)
    assert [stage.num_kept(n) for n in (0, 1, 2, 3, 25, 26, 27)] == [0, 1, 1, 2, 13, 13, 14]
    stage = PiToMeStage(0, "mid_block", 0.5, 0.9, True)
    assert [stage.num_kept(n) for n in (0, 1, 2, 3, 25)] == [0, 1, 1, 2, 13]


def test_evit_rounds_up_and_adds_the_fused_token() -> None:
    for n, attentive in ((10, 7), (11, 8), (196, 138), (1, 1), (0, 0)):
        assert EViTStage(0, "mid_block", 0.7, False).num_kept(n) == attentive
        assert EViTStage(0, "mid_block", 0.7, True).num_kept(n) == min(attentive + 1, n)


def test_only_merging_methods_keep_sizes() -> None:
    for name in ("tome", "pitome", "salience_merge"):
        for on in (True, False):
            stages = PruneConfig.for_method(name, proportional_attention=on).stages_for(TINY)
            assert all(stage.merges and stage.proportional is on for stage in stages)
    for name in ("evit", "ats"):
        assert not any(stage.merges or stage.proportional for stage in get_method(name)().stages_for(TINY))


# -- published work --------------------------------------------------------------------------------------------------

# ToMe, GFLOPs as listed for the paper's DeiT-T, DeiT-S and ViT-L (MAE): the same multiply-adds that `cost` counts.
TOME_GFLOPS = [
    (192, 12, 8, 0.9),
    (192, 12, 12, 0.8),
    (192, 12, 16, 0.6),
    (384, 12, 8, 3.4),
    (384, 12, 13, 2.7),
    (384, 12, 16, 2.3),
    (1024, 24, 8, 31.0),
]
# EViT-DeiT-S with the fused token, "MACs (G)" in the official README, to one decimal.
EVIT_GMACS = [(0.9, 4.0), (0.8, 3.5), (0.7, 3.0), (0.6, 2.6), (0.5, 2.3)]


def gmacs(config: PruneConfig, shape: ModelShape) -> float:
    return model_cost(shape, plan(config, shape)).macs / 1e9


@pytest.mark.parametrize(("width", "depth", "r", "published"), TOME_GFLOPS)
def test_work_of_tome_is_as_published(width: int, depth: int, r: int, published: float) -> None:
    assert round(gmacs(ToMeConfig(r=r), deit(width, depth)), 1) == published


@pytest.mark.parametrize("r", [8, 13])
def test_work_of_tome_on_vit_b_is_the_formula(r: int) -> None:
    """The tables give it no GFLOPs: block by block, attention of all tokens that enter and the MLP of those left."""
    width, patches = 768, 196
    expected, tokens = patches * 3 * 16 * 16 * width + 1000 * width, patches + 1
    for _ in range(12):
        expected += 4 * tokens * width**2 + 2 * tokens**2 * width
        tokens -= min(r, (tokens - 1) // 2)
        expected += 8 * tokens * width**2
    assert gmacs(ToMeConfig(r=r), deit(width)) * 1e9 == expected


@pytest.mark.parametrize(("keep_ratio", "published"), EVIT_GMACS)
def test_work_of_evit_is_as_published(keep_ratio: float, published: float) -> None:
    assert round(gmacs(EViTConfig(keep_ratios=keep_ratio), SMALL), 1) == published


# -- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", MERGING)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": -1}, "r=-1 .*a count >= 0"),
        ({"r": 1.0}, r"r=1\.0 .*0 <= fraction < 1"),
        ({"r": -0.1}, r"r=-0\.1 .*0 <= fraction < 1"),
        ({"r": (1, -2), "layers": (0, 1)}, "a count >= 0"),
        ({"r": (1, 2, 3), "layers": (0, 1)}, r"r=\(1, 2, 3\) .*2 values"),
        ({"r": (1, 0.5)}, "r="),
        ({"r": 5, "spread": "no default"}, "spread="),
        ({"layers": ()}, "layers="),
        ({"layers": (3, 3)}, "ascending"),
        ({"layers": (-1, 3)}, "ascending"),
        ({"proportional_attention": 1}, "true or false"),
        ({"exact_last_block": True, "restore": True}, "restore=True .*False with exact_last_block"),
    ],
)
def test_what_a_merging_config_refuses(config_class: type[MergingConfig], fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_class(**fields)


@pytest.mark.parametrize("config_class", MERGING)
def test_what_does_not_fit_the_model_is_refused(config_class: type[MergingConfig]) -> None:
    with pytest.raises(ConfigError, match=r"layers=\(3, 12\) .*this model has 12 blocks"):
        config_class(layers=(3, 12)).stages_for(TINY)
    with pytest.raises(ConfigError, match=r"r=\(1, 2\) .*\d+ values, one for each default layer"):
        config_class(r=(1, 2)).stages_for(TINY)


def test_what_pitome_refuses() -> None:
    for fields, message in (
        ({"keep_ratios": 0.4}, "0.5 <= ratio"),
        ({"layers": (1, 2)}, "keep_ratios=None .*one ratio a layer"),
        ({"keep_ratios": (0.9, 0.3)}, "0.5 <= ratio"),
        ({"margin": 1.5}, "a cosine"),
    ):
        with pytest.raises(ConfigError, match=message):
            PiToMeConfig(**fields)


VISION_METHODS = [name for name in list_methods("vision") if issubclass(get_method(name), VisionConfig)]


@pytest.mark.parametrize("name", VISION_METHODS)
def test_fields_of_every_config_for_vision_encoders(name: str) -> None:
    config_class = get_method(name)
    with pytest.raises(ConfigError, match=r"restore=True .*False with exact_last_block=True"):
        config_class(exact_last_block=True, restore=True)
    for fields in ({"exact_last_block": True}, {"exact_last_block": False, "restore": True}):
        config = config_class(**fields)
        assert options(config, TINY) == {key: True for key, value in fields.items() if value}
        assert options(config.scaled(0.5), TINY) == options(config, TINY)
        assert PruneConfig.from_dict(config.to_dict()) == config
    with pytest.raises(TypeError):
        config_class(*[None] * 20)


@pytest.mark.parametrize("field", ["exact_last_block", "restore"])
@pytest.mark.parametrize("name", [n for n in list_methods() if issubclass(get_method(n), BaselineConfig)])
def test_a_decoder_has_no_use_for_them(name: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}=True .*vision encoders"):
        PruneConfig.for_method(name, **{field: True}).stages_for(DECODER_SHAPE)


def test_exact_is_a_config_without_fields() -> None:
    config = ExactConfig()
    assert config.to_dict() == {"method": "exact", "format_version": 1}
    assert PruneConfig.from_dict(config.to_dict()) == config
    assert options(config, TINY) == {"exact_last_block": True} and plan(config, TINY) == ()
    with pytest.raises(ConfigError, match="no field 'exact_last_block'"):
        PruneConfig.for_method("exact", exact_last_block=True)
    with pytest.raises(UnsupportedModelError, match="works on vision encoders"):
        plan(config, DECODER_SHAPE)


# -- in a model ------------------------------------------------------------------------------------------------------

PROTECTED_HEADS = [(family, cls) for family, cls in supported_classes() if cls in get_adapter(family).protected_heads]


def what_heads_read(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits or embeddings of the images: what an exact last block must not change."""
    with torch.no_grad():
        found = model(**inputs_for(model, images()))
    names = ("logits", "logits_per_image", "image_embeds", "pooler_output")
    return [value for name in names if (value := getattr(found, name, None)) is not None]


@pytest.mark.parametrize(("family", "cls"), PROTECTED_HEADS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("config", [ExactConfig(), RandomConfig(), ToMeConfig(), ATSConfig()], ids=lambda c: c.method)
def test_the_exact_last_block_changes_no_logit(family: str, cls: type[PreTrainedModel], config: PruneConfig) -> None:
    """Without stages in the last block, whose work it takes over."""
    layers = tuple(range(7))
    if isinstance(config, ToMeConfig):
        config = ToMeConfig(layers=layers)
    model = tiny_model(family, cls)
    exact = config if isinstance(config, ExactConfig) else replace(config, exact_last_block=True)
    if refused(model, exact):
        pytest.skip("blocks take no keyword arguments in this version of Transformers")
    expected = what_heads_read(model if isinstance(config, ExactConfig) else prune(model, config))
    found = what_heads_read(prune(tiny_model(family, cls), exact))
    assert expected
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "cls"), PROTECTED_HEADS, ids=lambda value: getattr(value, "__name__", value))
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_the_last_block_is_whole_where_more_than_the_head_is_read(family: str, cls: type, name: str) -> None:
    """Where the call or the model's config asks for it, and in training, where dropout in the block would differ."""
    model = tiny_model(family, cls, attention="eager")
    if refused(model, ExactConfig()):
        pytest.skip("blocks take no keyword arguments in this version of Transformers")
    adapter, lengths = get_adapter(family), []
    shape, inputs = adapter.shape(model), inputs_for(model, images())
    few, all_tokens = shape.num_protected, shape.num_protected + shape.num_patches
    adapter.blocks(model)[-1].register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    prune(model, ExactConfig())
    with torch.no_grad():
        model(**inputs)
        model(**inputs, **{name: True})
        setattr(adapter.encoder(model).config, name, True)
        model(**inputs)
        setattr(adapter.encoder(model).config, name, False)
        model.train()(**inputs)
        model.eval()(**inputs)
    assert lengths == [few, all_tokens, all_tokens, all_tokens, few]


@pytest.mark.parametrize("config", [SalienceMergeConfig(), ExactConfig(), ZeroTPruneConfig(exact_last_block=True)])
def test_a_head_that_reads_patches_is_refused(config: PruneConfig) -> None:
    model = tiny_model("vit", ViTModel)
    with pytest.raises(UnsupportedModelError, match="exact_last_block: ViTModel"):
        prune(model, config)


@pytest.mark.parametrize(
    "config",
    [ToMeConfig(), PiToMeConfig(), EViTConfig(), ATSConfig(), SalienceMergeConfig(exact_last_block=False)],
    ids=lambda c: c.method,
)
@pytest.mark.parametrize("restore", [False, True])
def test_tokens_leave_as_planned(config: PruneConfig, restore: bool) -> None:
    config = replace(config, restore=restore)
    model = tiny_model("vit", ViTModel)
    with torch.no_grad():
        dense = model(images()).last_hidden_state
        prune(model, config)
        with record(model) as rec:
            states = model(images()).last_hidden_state
    shape = replace(SHAPE, depth=8, image_size=(32, 32))
    assert list(rec.tokens.values()) == tokens_left(replace(config, restore=False), shape)
    assert states.shape == dense.shape if restore else states.shape[1] < dense.shape[1]


def test_equal_patches_merge_without_a_trace() -> None:
    """Merged copies with their sizes in the attention compute what the copies did: so it is proportional."""
    torch.manual_seed(0)
    model = tiny_model("vit", ViTForImageClassification).double()
    pixels = torch.randn(1, 3, 4, 4, dtype=torch.float64).repeat(1, 1, 8, 8)
    model.vit.embeddings.position_embeddings.data.zero_()
    with torch.no_grad():
        expected = model(pixels).logits
        merged = prune(model, ToMeConfig(r=20))(pixels).logits
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)
