"""Zero-TPrune against golden vectors, a naive loop written from the equations, and worked numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_tokenprune import ZeroTPruneConfig
from hf_tokenprune.methods.zero_tprune import (
    ZeroTPruneStage,
    default_iterations,
    importance,
    least_similar,
    weighted_page_rank,
)

from .reference_zero_tprune import naive_kept, naive_page_rank
from .test_contract_methods import SHAPE, keep_of, make_signals


def golden_case(golden: np.lib.npyio.NpzFile, case: str):
    """Attention (1, H, T, T), keys (1, H, T, d) and the settings of a golden case, made as golden/README.md says."""
    seed, heads, tokens, width, similar, rounds, protected = (int(v) for v in golden[f"{case}_meta"])
    temperature, keep_ratio = (float(v) for v in golden[f"{case}_temp_keep"])
    random = np.random.RandomState(seed)
    q = random.standard_normal((heads, tokens, width)).astype(np.float32).astype(np.float64)
    k = random.standard_normal((heads, tokens, width)).astype(np.float32)
    logits = temperature * (q @ k.astype(np.float64).transpose(0, 2, 1)) / math.sqrt(width)
    attention = np.exp(logits - logits.max(-1, keepdims=True))
    attention /= attention.sum(-1, keepdims=True)
    stage = make_stage(keep_ratio, similar, rounds)
    return torch.tensor(attention, dtype=torch.float32)[None], torch.tensor(k)[None], stage, protected


def make_stage(keep_ratio: float, num_similar: int, num_iterations: int, **fields) -> ZeroTPruneStage:
    config = ZeroTPruneConfig(layers=(0,), keep_ratios=keep_ratio, num_similar=num_similar, **fields)
    return ZeroTPruneStage(0, "after_block", keep_ratio, num_similar, num_iterations, config)


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest):
    from .conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip(f"golden vectors are not at {SHARED}")
    return np.load(SHARED / "golden" / "zero_tprune.npz")


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_golden_scores(golden, case: str) -> None:
    attention, _, stage, protected = golden_case(golden, case)
    scores = weighted_page_rank(attention, num_iterations=stage.num_iterations, cls_boost=True)
    np.testing.assert_allclose(scores[0].numpy(), golden[f"{case}_wpr"], atol=1e-5, rtol=1e-5)
    joined = importance(scores[..., protected:], (0.01, 0.7))
    np.testing.assert_allclose(joined[0].numpy(), golden[f"{case}_importance"][protected:], atol=1e-5, rtol=1e-5)
    one_round = importance(
        weighted_page_rank(attention, num_iterations=1, cls_boost=True)[..., protected:], (0.01, 0.7)
    )
    expected = golden[f"{case}_importance_one_round"][protected:]
    np.testing.assert_allclose(one_round[0].numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["a", "b", "c", "d"])
def test_golden_kept_sets(golden, case: str) -> None:
    attention, keys, stage, protected = golden_case(golden, case)
    num_prunable = attention.shape[-1] - protected
    signals = replace(make_signals(1, num_prunable, protected), attention=(attention,), keys=keys)
    for keep_all_of_s, name in ((True, "kept_after_similarity"), (False, "kept")):
        this = replace(stage, keep_ratio=1.0) if keep_all_of_s else stage
        expected = golden[f"{case}_{name}"]
        assert np.array_equal(expected[:protected], np.arange(protected))
        assert np.array_equal(keep_of(this, signals)[0].numpy() + protected, expected[protected:])


OPTIONS = [
    {},
    {"cls_boost": False},
    {"head_variance_range": None},
    {"head_variance_range": (0.5, 3.0)},
    {"renormalize": False},
    {"partition": "sequential_important"},
    {"partition": "alternate"},
    {"partition": "none"},
    {"similarity_feature": "key_mean"},
    {"similarity_feature": "query"},
    {"similarity_feature": "value"},
    {"similarity_feature": "input"},
    {"similarity_feature": "output"},
    *({"similarity_metric": m} for m in ("dot", "manhattan", "euclidean", "minkowski3", "minkowski4", "minkowski5")),
    {"similarity_metric": "chebyshev"},
]


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "protected", "similar", "ratio", "rounds"), [(31, 1, 5, 0.6, 4), (20, 2, 99, 0.5, 1)]
)
def test_equals_a_naive_loop(fields, tokens, protected, similar, ratio, rounds) -> None:
    stage = make_stage(ratio, similar, rounds, **fields)
    signals = make_signals(3, tokens, protected)
    keep = keep_of(stage, signals)
    for row in range(3):
        assert keep[row].tolist() == naive_kept(signals, row, stage)


def test_without_cls_nothing_is_boosted() -> None:
    boosted, plain = make_stage(0.5, 3, 1), make_stage(0.5, 3, 1, cls_boost=False)
    no_cls = replace(make_signals(2, 30, 0), has_cls=False)
    assert torch.equal(keep_of(boosted, no_cls), keep_of(plain, no_cls))


# Worked numbers of spec/zero_tprune.md, section 12: token 0 is CLS.
WORKED = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2]])[None, None]


@pytest.mark.parametrize(
    ("rounds", "uniform", "boosted"),
    [
        (1, [0.3333, 0.5, 0.1667], [0.4553, 0.5732, 0.2155]),
        (2, [0.2833, 0.5667, 0.15], [0.3712, 0.6814, 0.1915]),
        (50, [0.2353, 0.6275, 0.1373], [0.2927, 0.7806, 0.1707]),
    ],
)
def test_worked_numbers(rounds: int, uniform: list[float], boosted: list[float]) -> None:
    for cls_boost, expected in ((False, uniform), (True, boosted)):
        scores = weighted_page_rank(WORKED, num_iterations=rounds, cls_boost=cls_boost)[0, 0]
        torch.testing.assert_close(scores, torch.tensor(expected), atol=5e-5, rtol=0)


def test_converges_to_the_left_eigenvector() -> None:
    values, vectors = np.linalg.eig(WORKED[0, 0].numpy().T.astype(np.float64))
    stationary = np.real(vectors[:, np.argmax(np.real(values))])
    scores = weighted_page_rank(WORKED, num_iterations=100, cls_boost=False)[0, 0].numpy()
    np.testing.assert_allclose(scores, stationary / stationary.sum(), atol=1e-6)


def test_mass_is_constant() -> None:
    (attention,) = make_signals(2, 40).attention
    for rounds in (1, 50):
        total = weighted_page_rank(attention, num_iterations=rounds, cls_boost=False).sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))
        boosted = weighted_page_rank(attention, num_iterations=rounds, cls_boost=True).sum(-1)
        torch.testing.assert_close(boosted, torch.full_like(boosted, (40 + math.sqrt(41)) / 41))


def test_subgraph_equals_a_gathered_and_renormalised_one() -> None:
    (attention,) = make_signals(2, 40).attention
    kept = torch.stack([torch.randperm(41)[:25].sort().values for _ in range(2)])
    scores = weighted_page_rank(attention, kept, num_iterations=7, cls_boost=True)
    for b in range(2):
        for h in range(attention.shape[1]):
            sub = attention[b, h][kept[b]][:, kept[b]].double()
            expected = naive_page_rank(sub / sub.sum(-1, keepdim=True), 7, cls_boost=True)
            torch.testing.assert_close(scores[b, h].double(), expected, atol=1e-6, rtol=1e-5)


def test_the_token_everyone_attends_to_ranks_first() -> None:
    """The direction of the graph: with A instead of Aᵀ all scores would be equal."""
    attention = torch.full((1, 1, 6, 6), 0.5 / 5)
    attention[..., 3] = 0.5
    scores = weighted_page_rank(attention, num_iterations=3, cls_boost=False)[0, 0]
    assert scores.argmax() == 3 and scores[3] > 2 * scores[0]


def test_uninformative_heads_are_left_out() -> None:
    good = torch.tensor([1.0, 1.4, 0.6, 1.0])  # variance of mean-1 scores .08
    flat, spiky = torch.ones(4), torch.tensor([0.0, 4.0, 0.0, 0.0])  # 0 and 3
    joined = importance(torch.stack([flat, good, spiky])[None], (0.01, 0.7))
    torch.testing.assert_close(joined[0], good)
    all_heads = importance(torch.stack([flat, spiky])[None], (0.01, 0.7))
    torch.testing.assert_close(all_heads[0], torch.stack([flat, spiky]).square().mean(0).sqrt())


def test_the_less_important_twin_leaves_and_the_better_half_is_safe() -> None:
    features = torch.randn(1, 10, 8)
    scores = torch.arange(10, 0, -1.0)[None]
    features[0, 7] = features[0, 2]
    keep = least_similar(features, scores, 9, "sequential_unimportant", "cosine")
    assert keep[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    half = least_similar(features, scores, 5, "sequential_unimportant", "cosine")
    assert half[0].tolist() == [0, 1, 2, 3, 4]


def test_similarity_stage_stops_the_major_group() -> None:
    """40 background tokens that attend to each other outvote 8 objects, unless S thins them out first."""
    generator = torch.Generator().manual_seed(3)
    logits = 0.1 * torch.randn(1, 2, 49, 49, generator=generator)
    logits[..., 1:41, 1:41] += 2.5
    logits[..., 41:, 41:] += 4.0
    keys = torch.randn(1, 2, 49, 16, generator=generator)
    keys[:, :, 1:41] = keys[:, :, 1:2] + 0.01 * keys[:, :, 1:41]
    signals = replace(make_signals(1, 48), attention=(logits.softmax(-1),), keys=keys)
    without = keep_of(make_stage(0.5, 0, 30, head_variance_range=None), signals)[0]
    with_s = keep_of(make_stage(0.86, 20, 30, head_variance_range=None), signals)[0]
    assert len(with_s) == len(without)
    assert (without >= 40).sum() == 0, "all objects are gone"
    assert (with_s >= 40).sum() == 8, "all objects are there"


def test_smaller_ratios_keep_subsets() -> None:
    signals = make_signals(1, 60)
    sets = [set(keep_of(make_stage(q, 0, 5), signals)[0].tolist()) for q in (0.9, 0.6, 0.3, 0.1)]
    assert all(small < large for large, small in pairwise(sets))


@pytest.mark.parametrize("similar", [0, 1, 7, 16, 99])
@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("tokens", [1, 2, 5, 196])
def test_keep_count_formula(tokens: int, similar: int, ratio: float) -> None:
    left = tokens if tokens == 1 else tokens - min(similar, math.ceil(tokens / 2))
    assert make_stage(ratio, similar, 1).num_kept(tokens) == max(1, math.floor(left * ratio + 1e-9))


def test_default_schedules() -> None:
    stages = ZeroTPruneConfig().stages_for(replace(SHAPE, depth=12, image_size=(224, 224), patch_size=(16, 16)))
    assert [s.layer for s in stages] == [0, 2, 5, 8, 10]
    assert [s.keep_ratio for s in stages] == [1.0, 0.9, 0.8, 0.7, 1.0]
    assert [s.num_similar for s in stages] == [10] * 5
    assert [s.num_iterations for s in stages] == [30, 30, 5, 5, 1]
    deep = ZeroTPruneConfig().stages_for(replace(SHAPE, depth=24, image_size=(336, 336), patch_size=(14, 14)))
    assert [s.layer for s in deep] == [1, 5, 11, 17, 21] and deep[0].num_similar == 29
    coarse = ZeroTPruneConfig().stages_for(replace(SHAPE, depth=12, image_size=(224, 224), patch_size=(32, 32)))
    assert [s.num_similar for s in coarse] == [2] * 5, "2.5 of 49 patches; the published table of shapes has 2"
    assert [default_iterations(layer, 12) for layer in range(12)] == [30] * 3 + [5] * 6 + [1] * 3
    for depth in range(1, 9):
        layers = [s.layer for s in ZeroTPruneConfig().stages_for(replace(SHAPE, depth=depth))]
        assert layers == sorted(set(layers)) and layers[-1] <= max(depth - 2, 0)
