"""Methods for vision-language models against golden vectors, naive loops, and the bugs of their official codes."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_tokenprune import ConfigError, PruneConfig, RandomConfig, TokenPruneError, UniformConfig
from hf_tokenprune.methods.cls_attention import ClsAttentionConfig
from hf_tokenprune.methods.decoderwise import num_rounded
from hf_tokenprune.methods.divprune import DivPruneConfig, divprune
from hf_tokenprune.methods.fastv import FastVConfig
from hf_tokenprune.methods.pyramiddrop import PyramidDropConfig
from hf_tokenprune.methods.stack import StackConfig
from hf_tokenprune.methods.tome import ToMeConfig
from hf_tokenprune.methods.transprune import (
    TransPruneConfig,
    TransPruneStage,
    instruction_guided_attention,
    transition_variation,
)
from hf_tokenprune.methods.visionzip import VisionZipConfig, merge, uniform_targets
from hf_tokenprune.signals import Reduction, Signals, Stage, TextRows, Transition
from hf_tokenprune.tokens import gather_tokens

from .reference_llava_methods import (
    best,
    naive_divprune,
    naive_guided,
    naive_received,
    naive_transition,
    naive_transprune,
    naive_visionzip,
    rotary_causal_attention,
)
from .test_contract_methods import DECODER_SHAPE, SHAPE, keep_of, make_decoder_signals, make_signals, make_transition

NO_CLS = replace(DECODER_SHAPE, tower=replace(DECODER_SHAPE.tower, num_protected=0, has_cls=False))
NEWLINES = replace(DECODER_SHAPE, newline_tokens=48, image_tokens=2880, tower_images=5)


def rn(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(scope="module")
def golden():
    from .conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip(f"golden vectors are not at {SHARED}")
    return np.load(SHARED / "golden" / "llava_methods.npz")


def one_stage(config: PruneConfig, shape=DECODER_SHAPE) -> Stage:
    (stage,) = config.stages_for(shape)
    return stage


def text_signals(text_attention: torch.Tensor, mask: torch.Tensor | None = None, **more) -> Signals:
    """Signals of a stage inside the decoder: (B, H, R, N) attention, by default all rows count."""
    batch, _, rows, num_tokens = text_attention.shape
    tokens = torch.zeros(batch, num_tokens, 4)
    mask = torch.ones(batch, rows, dtype=torch.bool) if mask is None else mask
    return Signals(tokens, tokens, 0, False, text_attention=text_attention.float(), text_mask=mask, **more)


# -- golden vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["b", "d"])
def test_divprune_golden(golden, case: str) -> None:
    seed, num_tokens, width, n_keep = (int(v) for v in golden[f"divprune_{case}_meta"])
    order = divprune(rn(seed, num_tokens, width)[None], n_keep)
    assert order[0].tolist() == golden[f"divprune_{case}_order"].tolist()


def test_divprune_golden_clusters(golden) -> None:
    features = rn(21, 24, 64).repeat_interleave(24, 0) + 0.3 * rn(22, 576, 64)
    assert divprune(features[None], 64)[0].tolist() == golden["divprune_cl_order"].tolist()


def test_transition_variation_golden(golden) -> None:
    states = (rn(31, 1, 96, 32), 0.7 * rn(32, 1, 96, 32), rn(33, 1, 96, 32), 1.3 * rn(34, 1, 96, 32))
    everything = torch.ones(1, 96, dtype=torch.bool)
    stage = TransPruneConfig().stages_for(DECODER_SHAPE)[0]
    scores = stage.observe(Transition(*states, valid=everything, image=~everything))
    torch.testing.assert_close(scores, torch.from_numpy(golden["ttv_layer_code"]), atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def next_attention(golden) -> torch.Tensor:
    """(1, H, L, L) attention of the layer behind the pruning point, worked out from the golden weights."""
    x, norm, q, k = (torch.from_numpy(golden[f"tp_{name}"]) for name in ("x", "norm", "q", "k"))
    return rotary_causal_attention(x[0], norm, q, k, heads=4)[None]


def test_transprune_golden(golden, next_attention) -> None:
    ttv = torch.from_numpy(golden["tp_ttv"])[None, :, 10:74]
    signals = text_signals(next_attention[:, :, 74:, 10:74], layer_scores=ttv)
    stage = TransPruneStage(8, "after_block", 0.875, (6, 7, 8), 0.5, "signed", "sequence")
    assert stage.num_kept(64) == 56
    assert stage.reduce(signals, 56).keep[0].tolist() == sorted(golden["tp_keep"].tolist())


def test_pyramiddrop_golden(golden, next_attention) -> None:
    stage = PyramidDropConfig().stages_for(DECODER_SHAPE)[0]
    assert stage.num_kept(64) == 32 and stage.text_rows == TextRows("last", "next")
    keep = stage.reduce(text_signals(next_attention[:, :, 82:, 10:74]), 32).keep
    assert keep[0].tolist() == sorted(golden["pdrop_keep"].tolist())


def test_fastv_golden(golden) -> None:
    attention = rn(51, 1, 4, 120, 120).softmax(-1)
    stage = one_stage(FastVConfig())
    assert stage.num_kept(64) == 32 and stage.text_rows == TextRows("last", "own")
    keep = stage.reduce(text_signals(attention[:, :, -1:, 35:99]), 32).keep
    assert keep[0].tolist() == sorted(golden["fastv_keep"].tolist())


@pytest.fixture(scope="module")
def tower() -> Signals:
    """The golden vision tower: two images, four heads, CLS and 576 patches."""
    attention = rn(61, 2, 4, 577, 577).softmax(-1)
    hidden, metric = rn(62, 2, 577, 32), rn(63, 2, 577, 16)
    return Signals(hidden, hidden, 1, True, cls_attention=attention[:, :, 0], keys=metric[:, None])


def test_cls_attention_golden(golden, tower) -> None:
    stage = one_stage(ClsAttentionConfig())
    keep = stage.reduce(tower, stage.num_kept(576)).keep
    assert keep.tolist() == np.sort(golden["fastervlm_64"], 1).tolist()


def test_visionzip_golden(golden, tower) -> None:
    """The official output is CLS and the dominant patches, then the contextual tokens; ours is in raster order."""
    reduction = one_stage(VisionZipConfig()).reduce(tower, 64)
    assert reduction.tokens is not None
    for i in range(2):
        dominant = sorted(golden["vz_idx"][i].tolist())
        assert dominant[0] == 0 and len(dominant) == 54
        keep = reduction.keep[i].tolist()
        position_of = dict(zip(keep, reduction.tokens[i], strict=True))
        dominant_patches = [token - 1 for token in dominant[1:]]
        others = [p for p in range(576) if p not in dominant_patches]
        targets = others[:: len(others) // 10][:10]
        (place_of_cls,) = set(keep) - set(dominant_patches) - set(targets)
        assert place_of_cls == others[1], "the first patch that leaves"
        assert torch.equal(position_of[place_of_cls], tower.tokens[i, 0])
        for patch in dominant_patches:
            assert torch.equal(position_of[patch], tower.tokens[i, patch + 1])
        official = torch.from_numpy(golden["vz_tokens"][i])
        assert torch.equal(official[:2], tower.tokens[i, dominant[-2:]]), "the last two dominant ones"
        ours = torch.stack([position_of[target] for target in targets])
        torch.testing.assert_close(ours, official[2:], atol=1e-5, rtol=1e-5)


# -- naive loops -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_divprune_is_the_naive_loop(seed: int) -> None:
    features = rn(seed, 3, 40, 5)
    order = divprune(features, 17)
    assert [row.tolist() for row in order] == [naive_divprune(sample, 17) for sample in features]


@pytest.mark.parametrize("direction", ["signed", "absolute"])
@pytest.mark.parametrize("softmax_over", ["sequence", "image"])
def test_transitions_are_the_naive_loop(direction, softmax_over) -> None:
    transition = make_transition(3, 40)
    config = TransPruneConfig(direction=direction, softmax_over=softmax_over)
    scores = config.stages_for(DECODER_SHAPE)[0].observe(transition)
    counted = transition.image if softmax_over == "image" else transition.valid
    for i in range(3):
        halves = (("attention_in", "attention_out"), ("mlp_in", "mlp_out"))
        expected = [0.0] * 40
        for names in halves:
            before, after = (getattr(transition, name)[i] for name in names)
            half = naive_transition(before, after, counted[i].tolist(), direction == "absolute")
            expected = [a + b for a, b in zip(expected, half, strict=True)]
        torch.testing.assert_close(scores[i], torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 0.0])
def test_transprune_is_the_naive_loop(alpha: float) -> None:
    accumulate = () if alpha == 0 else (1, 2, 4)
    config = TransPruneConfig(accumulate_layers=accumulate, layers=(2, 5), keep_ratios=(0.75, 0.25), alpha=alpha)
    for stage in config.stages_for(DECODER_SHAPE):
        signals = make_decoder_signals(stage, 3, 48)
        # What is not asked for is absent, so a weight of 0 costs nothing.
        assert (signals.text_attention is None) == (alpha == 1) and (signals.layer_scores is None) == (alpha == 0)
        keep = stage.reduce(signals, stage.num_kept(48)).keep
        for i in range(3):
            ttv, guided = [[1.0] * 48], [1.0] * 48
            if signals.layer_scores is not None:
                assert signals.layer_scores.shape[1] == len([layer for layer in accumulate if layer <= stage.layer])
                ttv = signals.layer_scores[i].double().tolist()
            if signals.text_attention is not None:
                assert signals.text_mask is not None
                rows = signals.text_mask[i].nonzero().flatten().tolist()
                guided = naive_guided(signals.text_attention[i], rows)
            assert keep[i].tolist() == naive_transprune(ttv, guided, alpha, stage.num_kept(48))


@pytest.mark.parametrize("config", [FastVConfig(), PyramidDropConfig()], ids=lambda c: c.method)
def test_the_last_row_decides(config: PruneConfig) -> None:
    for stage in config.stages_for(DECODER_SHAPE):
        signals = make_decoder_signals(stage, 3, 50)
        assert signals.text_attention is not None
        keep = keep_of(stage, signals)
        for row, attention in zip(keep, signals.text_attention, strict=True):
            assert row.tolist() == best(naive_guided(attention, [0]), stage.num_kept(50))


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("num_patches", [37, 48])
@pytest.mark.parametrize(("dominant", "contextual"), [(1, 1), (2, 20), (9, 4), (25, 11)])
def test_visionzip_is_the_naive_loop(dominant: int, contextual: int, num_patches: int, has_cls: bool) -> None:
    stage = one_stage(VisionZipConfig(dominant, contextual), DECODER_SHAPE if has_cls else NO_CLS)
    first = int(has_cls)
    signals = make_signals(3, num_patches, first)
    reduction = stage.reduce(signals, dominant + contextual)
    assert signals.attention is not None and signals.keys is not None and reduction.tokens is not None
    for i, attention in enumerate(torch.cat(signals.attention)):
        tokens, metric = signals.tokens[i, first:], signals.keys[i].double().mean(0)[first:]
        columns = range(first, first + num_patches)
        scores = naive_received(attention, range(1) if has_cls else range(num_patches), columns)
        chosen, targets, merged = naive_visionzip(tokens, scores, metric, dominant - has_cls, contextual)
        expected = {p: tokens[p] for p in chosen} | dict(zip(targets, merged, strict=True))
        if has_cls:
            expected[min(set(range(num_patches)) - set(expected))] = signals.tokens[i, 0]
        assert reduction.keep[i].tolist() == sorted(expected)
        states = torch.stack([expected[p].float() for p in sorted(expected)])
        torch.testing.assert_close(reduction.tokens[i], states, atol=1e-5, rtol=1e-5)


def test_cls_attention_is_the_naive_loop() -> None:
    stage = one_stage(ClsAttentionConfig(keep_ratio=0.25))
    signals = make_signals(3, 48)
    assert signals.attention is not None
    keep = keep_of(stage, signals)
    for row, attention in zip(keep, torch.cat(signals.attention), strict=True):
        assert row.tolist() == best(naive_received(attention, range(1), range(1, 49)), 12)


# -- bugs of the official codes ----------------------------------------------------------------------------------------


def test_divprune_never_chooses_a_token_twice() -> None:
    """Of 24 tokens 6 are distinct: the official code chooses a chosen one again from the seventh on."""
    features = rn(3, 6, 8).repeat(4, 1)[None]
    order = divprune(features, 12)[0].tolist()
    assert len(set(order)) == 12
    assert {i % 6 for i in order[:6]} == set(range(6)), "the distinct ones come first"
    exact = torch.eye(3).repeat(3, 1)[None]  # cosines are 0 and 1 without rounding
    assert divprune(exact, 9)[0].tolist() == list(range(9)), "ties: the lower position first"


def test_divprune_takes_zero_vectors_as_different_from_everything() -> None:
    features = rn(4, 1, 12, 6).abs()  # all cosines positive, so distance 1 is the largest there is
    features[0, 5] = 0
    order = divprune(features, 12)[0].tolist()
    assert order[0] == 5 and sorted(order) == list(range(12))
    assert order == naive_divprune(features[0], 12)
    assert sorted(divprune(torch.zeros(2, 4, 3), 4)[1].tolist()) == list(range(4))


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_divprune_of_very_few_tokens(num_tokens: int) -> None:
    assert sorted(divprune(rn(5, 1, num_tokens, 4), num_tokens)[0].tolist()) == list(range(num_tokens))


@pytest.mark.parametrize("n_keep", [0, 11, -1])
def test_divprune_refuses_counts_that_cannot_be(n_keep: int) -> None:
    with pytest.raises(TokenPruneError, match=rf"n_keep={n_keep}: expected 1 <= n_keep <= 10"):
        divprune(rn(5, 1, 10, 4), n_keep)


def test_divprune_scores_every_sample_itself() -> None:
    features = rn(6, 3, 60, 8)
    order = divprune(features, 20)
    assert all(torch.equal(order[i], divprune(features[i : i + 1], 20)[0]) for i in range(3))
    assert len({tuple(row) for row in order.sort(1).values.tolist()}) == 3


def test_divprune_keeps_one_of_many_equal_newlines_while_others_are_left() -> None:
    features = rn(7, 1, 40, 16)
    features[0, ::10] = features[0, 0]
    newlines = {0, 10, 20, 30}
    assert len(newlines & set(divprune(features, 30)[0].tolist())) <= 1
    assert set(divprune(features, 37)[0].tolist()) >= set(range(40)) - newlines


def test_divprune_in_half_precision_scores_in_float32() -> None:
    """Many tokens in many dimensions are all nearly orthogonal: in bfloat16 their distances would tie."""
    half = rn(8, 1, 300, 512).bfloat16()
    assert torch.equal(divprune(half, 40), divprune(half.float(), 40))
    assert divprune(half.float(), 40)[0].tolist() == naive_order_by_matrix(half[0].double(), 40)


@pytest.mark.gpu
def test_divprune_never_waits_for_the_device() -> None:
    features = rn(8, 2, 576, 64).cuda()
    divprune(features, 2)  # the first call loads kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        order = divprune(features, 56)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(order.cpu(), divprune(features.cpu(), 56))


def naive_order_by_matrix(features: torch.Tensor, n_keep: int) -> list[int]:
    unit = features / features.norm(dim=-1, keepdim=True)
    distance = 1 - unit @ unit.T
    without_self = distance.clone().fill_diagonal_(math.inf)
    chosen = [int(without_self.amin(1).argmax())]
    while len(chosen) < n_keep:
        nearest = distance[:, chosen].amin(1)
        nearest[chosen] = -math.inf
        chosen.append(int(nearest.argmax()))
    return chosen


def test_transitions_of_a_zero_vector_are_finite() -> None:
    zero = torch.zeros(1, 6, 4)
    everything = torch.ones(1, 6, dtype=torch.bool)
    for before, after in ((zero, zero), (rn(1, 1, 6, 4), zero), (zero, rn(1, 1, 6, 4))):
        assert transition_variation(before, after, everything, "signed").isfinite().all()
    assert transition_variation(rn(1, 1, 6, 4), rn(2, 1, 6, 4), ~everything, "signed").eq(0).all(), "nothing to weigh"


def test_a_token_turned_around_scores_highest_in_the_code_and_low_in_the_paper() -> None:
    before = rn(9, 1, 8, 64)
    after = rn(10, 1, 8, 64)
    after[0, 3] = -before[0, 3]
    after = after / after.norm(dim=-1, keepdim=True) * before.norm(dim=-1, keepdim=True)
    everything = torch.ones(1, 8, dtype=torch.bool)
    assert transition_variation(before, after, everything, "signed").argmax() == 3
    assert transition_variation(before, after, everything, "absolute").argmin() == 3


def test_rows_that_are_not_text_do_not_count() -> None:
    attention = torch.rand(2, 3, 5, 7)
    mask = torch.tensor([[False, False, True, True, True], [False] * 5])
    filled = attention.masked_fill(~mask[:, None, :, None], math.nan)
    score = instruction_guided_attention(filled, mask)
    torch.testing.assert_close(score[0], attention[0, :, 2:].mean((0, 1)))
    assert score[1].eq(0).all(), "a sample without text behind its image"


def test_transprune_without_text_goes_by_transitions() -> None:
    stage = TransPruneConfig().stages_for(DECODER_SHAPE)[0]
    signals = make_decoder_signals(stage, 2, 40)
    assert signals.layer_scores is not None and signals.text_mask is not None
    silent = replace(signals, text_mask=torch.zeros_like(signals.text_mask))
    expected = [best(scores.sum(0).tolist(), 35) for scores in signals.layer_scores]
    assert stage.reduce(silent, 35).keep.tolist() == expected


def test_visionzip_of_a_target_that_nobody_joins() -> None:
    """All metrics point to the first target: the mean over nobody would be 0 / 0."""
    states, metric = rn(11, 1, 12, 4), torch.ones(1, 12, 3)
    targets = uniform_targets(12, 3)
    assert list(range(12))[targets] == [0, 4, 8]
    merged = merge(states, metric, targets)
    members = [i for i in range(12) if i not in (0, 4, 8)]
    torch.testing.assert_close(merged[0, 0], states[0, 0] + states[0, members].mean(0))
    assert torch.equal(merged[0, 1:], states[0, [4, 8]])
    assert merge(states, torch.zeros(1, 12, 3), targets).isfinite().all()


def test_visionzip_adds_the_mean_without_the_target() -> None:
    states = torch.tensor([[[1.0], [10.0], [20.0], [100.0]]])
    metric = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]])
    assert merge(states, metric, uniform_targets(4, 2)).flatten().tolist() == [11.0, 120.0]


def test_visionzip_gives_back_the_dtype_and_what_is_aligned() -> None:
    stage = one_stage(VisionZipConfig(20, 6, keep_cls=False))
    signals = make_signals(2, 64, dtype=torch.bfloat16)
    reduction = stage.reduce(signals, 26)
    assert reduction.tokens is not None and reduction.tokens.dtype == torch.bfloat16
    same = (reduction.tokens == gather_tokens(signals.tokens[:, 1:], reduction.keep)).all(-1)
    assert (same.sum(1) >= 20).all(), "all but the contextual ones are what they were"


# -- schedules ---------------------------------------------------------------------------------------------------------


def counts(config: PruneConfig, num_tokens: int, shape=DECODER_SHAPE) -> list[tuple[int, int]]:
    """(layer, tokens left) of each stage."""
    left, result = num_tokens, []
    for stage in config.stages_for(shape):
        left = min(left, stage.num_kept(num_tokens if stage.counts_from == "original" else left))
        result.append((stage.layer, left))
    return result


@pytest.mark.parametrize(
    ("config", "num_tokens", "expected"),
    [
        (DivPruneConfig(), 576, [(-1, 56)]),
        (DivPruneConfig(), 2340, [(-1, 229)]),
        (DivPruneConfig(keep_ratio=1 / 9), 576, [(-1, 64)]),
        (DivPruneConfig(keep_ratio=0.001), 576, [(-1, 1)]),
        (TransPruneConfig(), 576, [(6, 504), (8, 360), (11, 72)]),
        (TransPruneConfig(), 2880, [(6, 2520), (8, 1800), (11, 360)]),
        (FastVConfig(), 576, [(1, 288)]),
        (FastVConfig(layer=2, keep_ratio=0.25), 576, [(2, 144)]),
        (FastVConfig(), 5, [(1, 2)]),
        (PyramidDropConfig(), 576, [(7, 288), (15, 144), (23, 72)]),
        (PyramidDropConfig(layers=(3,), keep_ratios=(0.5,)), 7, [(3, 3)]),
        (PyramidDropConfig(keep_ratios=(0.3,)), 10, [(15, 3)]),
        (VisionZipConfig(), 576, [(-1, 64)]),
        (VisionZipConfig(dominant=162, contextual=30), 576, [(-1, 192)]),
        (ClsAttentionConfig(), 576, [(-1, 64)]),
        (RandomConfig(), 576, [(-1, 56)]),
        (UniformConfig(layers=(3, 9), keep_ratios=0.5), 576, [(3, 288), (9, 144)]),
        (StackConfig(), 192, [(-1, 192), (6, 168), (8, 120), (11, 24)]),
    ],
    ids=lambda v: v.method if isinstance(v, PruneConfig) else None,
)
def test_counts(config: PruneConfig, num_tokens: int, expected: list[tuple[int, int]]) -> None:
    assert counts(config, num_tokens) == expected


def test_halves_are_rounded_to_the_even_number() -> None:
    assert [num_rounded(n, 0.5) for n in range(8)] == [0, 1, 1, 2, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("depth", "layers"), [(32, [7, 15, 23]), (40, [9, 19, 29]), (4, [0, 1, 2]), (3, [0, 1]), (2, [0])]
)
def test_pyramiddrop_divides_the_depth(depth: int, layers: list[int]) -> None:
    shape = replace(DECODER_SHAPE, depth=depth)
    found = counts(PyramidDropConfig(), 576, shape)
    assert [layer for layer, _ in found] == layers and found[-1][1] == 72


def test_transprune_accumulates_up_to_each_stage() -> None:
    stages = TransPruneConfig().stages_for(DECODER_SHAPE)
    assert [stage.observes for stage in stages] == [(6,), (6, 7, 8), (6, 7, 8, 9, 10, 11)]
    assert {stage.text_rows for stage in stages} == {TextRows("text", "next")}
    assert {stage.counts_from for stage in stages} == {"original"}


def test_places_and_what_stages_carry() -> None:
    divprune_stage = one_stage(DivPruneConfig(budget="sample", positions="original", newlines="protect"), NEWLINES)
    assert (divprune_stage.where, divprune_stage.budget) == ("entrance", "sample")
    assert (divprune_stage.positions, divprune_stage.newlines) == ("original", "protect")
    assert one_stage(DivPruneConfig()).budget == "image"
    assert one_stage(FastVConfig()).positions == "original"
    assert one_stage(VisionZipConfig()).where == one_stage(ClsAttentionConfig()).where == "vision_tower"
    assert {stage.positions for stage in TransPruneConfig().stages_for(DECODER_SHAPE)} == {"contiguous"}


def test_visionzip_keeps_cls_where_there_is_one() -> None:
    assert one_stage(VisionZipConfig()).keep_cls
    assert not one_stage(VisionZipConfig(), NO_CLS).keep_cls
    assert not one_stage(VisionZipConfig(keep_cls=False)).keep_cls


@pytest.mark.parametrize("config_class", [RandomConfig, UniformConfig])
def test_baselines_on_decoders(config_class) -> None:
    entrance = one_stage(config_class(keep_ratios=0.25))
    assert (entrance.layer, entrance.where, entrance.budget, entrance.num_kept(576)) == (-1, "entrance", "image", 144)
    assert one_stage(config_class(keep_ratios=(0.25,))) == entrance
    assert entrance.positions == "contiguous"
    for fields in ({}, {"layers": (3,)}):
        assert one_stage(config_class(keep_ratios=0.25, positions="original", **fields)).positions == "original"
    with pytest.raises(ConfigError, match=r"positions='original'.*about decoders"):
        config_class(positions="original").stages_for(SHAPE)
    inside = config_class(layers=(1, 4), keep_ratios=(0.5, 0.25)).stages_for(DECODER_SHAPE)
    assert [(s.layer, s.where, s.budget) for s in inside] == [
        (1, "after_block", "sample"),
        (4, "after_block", "sample"),
    ]
    assert [s.budget for s in config_class().stages_for(SHAPE)] == ["sample"] * 3
    assert one_stage(config_class(keep_ratios=0.5).scaled(1.5)).num_kept(100) == 25
    assert one_stage(config_class(keep_ratios=(0.5, 0.5, 1))).num_kept(100) == 25, "ratios that meet are multiplied"


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DivPruneConfig(keep_ratio=0), r"keep_ratio=0\.0 in DivPruneConfig: expected 0 < ratio <= 1"),
        (lambda: DivPruneConfig(keep_ratio=1.1), r"keep_ratio=1\.1.*0 < ratio <= 1"),
        (lambda: DivPruneConfig(budget="crop"), r"budget='crop'.*'image' or 'sample'"),
        (lambda: DivPruneConfig(positions="mrope"), r"positions='mrope'.*'contiguous' or 'original'"),
        (lambda: DivPruneConfig(newlines="drop"), r"newlines='drop'.*'prune' or 'protect'"),
        (lambda: FastVConfig(layer=-1), r"layer=-1.*>= 0"),
        (lambda: FastVConfig(keep_ratio=-0.5), r"keep_ratio=-0\.5"),
        (lambda: PyramidDropConfig(keep_ratios=()), r"keep_ratios=\(\).*at least one"),
        (lambda: PyramidDropConfig(keep_ratios=(0.5, 0.6)), r"keep_ratios=\(0\.5, 0\.6\).*never increasing"),
        (lambda: PyramidDropConfig(layers=(7, 15)), r"layers=\(7, 15\).*one for each of \(0\.5, 0\.25, 0\.125\)"),
        (lambda: PyramidDropConfig(layers=(7, 7, 9)), r"layers=\(7, 7, 9\).*ascending"),
        (lambda: PyramidDropConfig(layers=()), r"layers=\(\)"),
        (lambda: TransPruneConfig(layers=()), r"layers=\(\).*at least one"),
        (lambda: TransPruneConfig(layers=(-1, 8, 11)), r"layers=\(-1, 8, 11\).*ascending"),
        (lambda: TransPruneConfig(layers=(6, 8)), r"keep_ratios=.*2 values, one for each of layers=\(6, 8\)"),
        (lambda: TransPruneConfig(keep_ratios=(0.5, 0.6, 0.1)), r"keep_ratios=.*never increasing"),
        (lambda: TransPruneConfig(alpha=1.5), r"alpha=1\.5.*0 <= alpha <= 1"),
        (lambda: TransPruneConfig(accumulate_layers=(8, 6)), r"accumulate_layers=\(8, 6\).*ascending"),
        (lambda: TransPruneConfig(accumulate_layers=()), r"accumulate_layers=\(\).*up to 11.*one up to 6"),
        (lambda: TransPruneConfig(accumulate_layers=(7, 8)), r"accumulate_layers=\(7, 8\).*one up to 6"),
        (lambda: TransPruneConfig(accumulate_layers=(6, 12)), r"accumulate_layers=\(6, 12\).*up to 11"),
        (lambda: TransPruneConfig(alpha=0), r"accumulate_layers=.*with alpha=0 no transition"),
        (lambda: TransPruneConfig(alpha=0, accumulate_layers=(), direction="absolute"), r"direction=.*no effect"),
        (lambda: TransPruneConfig(alpha=0, accumulate_layers=(), softmax_over="image"), r"softmax_over=.*no effect"),
        (lambda: VisionZipConfig(dominant=0), r"dominant=0.*>= 1"),
        (lambda: VisionZipConfig(contextual=0), r"contextual=0.*cls_attention"),
        (lambda: VisionZipConfig(dominant=1.5), r"dominant=1\.5.*an integer"),
        (lambda: ClsAttentionConfig(keep_ratio=0), r"keep_ratio=0\.0"),
    ],
)
def test_fields_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (TransPruneConfig(), replace(DECODER_SHAPE, depth=8), r"layers=\(6, 8, 11\).*0\.\.6.*has 8 layers"),
        (TransPruneConfig(), replace(DECODER_SHAPE, depth=12), r"layers=.*each with a layer behind it"),
        (FastVConfig(layer=31), DECODER_SHAPE, r"layer=31.*0\.\.30"),
        (PyramidDropConfig(layers=(31,), keep_ratios=(0.5,)), DECODER_SHAPE, r"layers=\(31,\).*0\.\.30"),
        (PyramidDropConfig(), replace(DECODER_SHAPE, depth=1), r"layers=None.*has 1 layer"),
        (DivPruneConfig(newlines="protect"), DECODER_SHAPE, r"newlines='protect'.*no newline tokens"),
        (FastVConfig(newlines="protect"), DECODER_SHAPE, r"newlines='protect'"),
        (TransPruneConfig(newlines="protect"), DECODER_SHAPE, r"newlines='protect'"),
        (VisionZipConfig(keep_cls=True), NO_CLS, r"keep_cls=True.*no CLS token"),
        (ClsAttentionConfig(), NO_CLS, r"vision tower of this model has none; use visionzip or divprune"),
        (RandomConfig(where="mid_block"), DECODER_SHAPE, r"where='mid_block'.*'after_block'"),
        (UniformConfig(layers=(40,), keep_ratios=0.5), DECODER_SHAPE, r"layers=\(40,\).*0\.\.31"),
    ],
)
def test_configs_that_do_not_fit_the_model(config: PruneConfig, shape, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.stages_for(shape)


# -- stacks ------------------------------------------------------------------------------------------------------------


def test_a_stack_runs_in_the_order_of_places() -> None:
    config = StackConfig((FastVConfig(), DivPruneConfig(), VisionZipConfig()))
    places = [(stage.where, stage.layer) for stage in config.stages_for(DECODER_SHAPE)]
    assert places == [("vision_tower", -1), ("entrance", -1), ("after_block", 1)]
    scaled = StackConfig((DivPruneConfig(keep_ratio=0.5), FastVConfig())).scaled(0.5)
    assert [config.keep_ratio for config in scaled.stages] == [0.75, 0.75]


def test_a_stack_is_a_list_of_configs_in_a_file(tmp_path) -> None:
    config = StackConfig((DivPruneConfig(keep_ratio=0.5), TransPruneConfig(alpha=1)))
    data = config.to_dict()
    assert data["method"] == "stack" and data["format_version"] == 1
    assert [part["method"] for part in data["stages"]] == ["divprune", "transprune"]
    assert not any("format_version" in part for part in data["stages"])
    assert PruneConfig.from_dict(data) == config
    data["stages"][0]["format_version"] = 1
    assert PruneConfig.from_dict(data) == config, "a file of its own may be pasted in"
    config.save_pretrained(tmp_path)
    assert PruneConfig.from_pretrained(tmp_path) == config
    assert hash(config) == hash(PruneConfig.from_dict(data))


DIVPRUNE, FASTV = {"method": "divprune"}, {"method": "fastv"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], r"stages=\(\).*two to 3"),
        ([DIVPRUNE], r"stages=.*two to 3"),
        ([DIVPRUNE] * 4, r"stages=.*two to 3"),
        ([DIVPRUNE, *[{"method": "zero_tprune"}] * 2], r"at most one method that prunes vision encoders only, not 2"),
        ([DIVPRUNE, {"method": "salience_merge"}], r"exact_last_block=False in the vision tower"),
        ([DIVPRUNE, {"method": "stack"}], r"no stack inside a stack"),
        ([DIVPRUNE, StackConfig()], r"no stack inside a stack"),
        ([DIVPRUNE, FASTV | {"newlines": "protect"}], r"the same newlines"),
        ([DIVPRUNE, FASTV | {"layr": 3}], r"method 'fastv' has no field 'layr'.*did you mean 'layer'"),
        ([DIVPRUNE, FASTV | {"keep_ratio": 2}], r"keep_ratio=2\.0 in FastVConfig"),
        ([DIVPRUNE, FASTV | {"format_version": 99}], r"format_version=99 is newer"),
        ([DIVPRUNE, {"method": "os"}], r"method='os': no such method"),
        ([DIVPRUNE, {}], r"stages=.*a prune config, such as {'method': 'divprune'}"),
        ([DIVPRUNE, "fastv"], r"stages=.*a list of at most \d+ values, each a prune config, such as {'method'"),
        ("divprune", r"stages='divprune'.*a prune config"),
    ],
)
def test_stacks_that_cannot_be(parts, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_dict({"method": "stack", "stages": parts})


def test_a_file_cannot_nest_stacks_without_end() -> None:
    data: dict = {"method": "stack"}
    for _ in range(5000):
        data = {"method": "stack", "stages": [data, DIVPRUNE]}
    with pytest.raises(ConfigError, match="no stack inside a stack"):
        PruneConfig.from_dict(data)


@pytest.mark.parametrize(
    ("configs", "place"),
    [
        ((DivPruneConfig(), RandomConfig()), "at the decoder's entrance"),
        ((FastVConfig(), TransPruneConfig()), "inside it"),
        ((VisionZipConfig(), ClsAttentionConfig()), "in or at the vision tower"),
        ((VisionZipConfig(), ToMeConfig()), "in or at the vision tower"),
        ((ToMeConfig(), ClsAttentionConfig()), "in or at the vision tower"),
    ],
)
def test_one_method_a_place(configs, place: str) -> None:
    named = re.escape(f"stages=({configs[0].method}, {configs[1].method}) in StackConfig")
    with pytest.raises(ConfigError, match=f"{named}: expected at most one method that prunes {place}, not 2"):
        StackConfig(configs).stages_for(DECODER_SHAPE)


def test_newlines_of_a_stack() -> None:
    both = StackConfig((DivPruneConfig(newlines="protect"), FastVConfig(newlines="protect")))
    assert {stage.newlines for stage in both.stages_for(NEWLINES)} == {"protect"}
    with pytest.raises(ConfigError, match="the same newlines"):
        StackConfig((RandomConfig(), FastVConfig(newlines="protect")))


def test_a_reduction_that_keeps_all_merges_nothing() -> None:
    reduction = one_stage(VisionZipConfig()).reduce(make_signals(2, 40), 40)
    assert isinstance(reduction, Reduction) and reduction.tokens is None
