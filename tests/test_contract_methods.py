"""What every registered method owes: counts, order, independence of the batch, and no surprises with odd numbers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from hf_tokenprune import PruneConfig, list_methods
from hf_tokenprune.registry import get_method
from hf_tokenprune.signals import ModelShape, Signals, Stage

SHAPE = ModelShape(
    depth=12,
    width=24,
    mlp_width=48,
    num_heads=3,
    head_dim=8,
    image_size=(24, 24),
    patch_size=(4, 4),
    num_channels=3,
    num_protected=1,
    has_cls=True,
    head_macs=0,
)


def all_stages() -> list[Stage]:
    """Every stage of every method's default config, in both places."""
    configs: list[PruneConfig] = [get_method(name)() for name in list_methods()]
    stages = [stage for config in configs for stage in config.stages(SHAPE)]
    return stages + [replace(stage, where="mid_block") for stage in stages]


def make_signals(batch: int, num_prunable: int, num_protected: int = 1, seed: int = 0, dtype=torch.float32) -> Signals:
    """All signals a family can offer, random but consistent; ``dtype`` is the model's, attention is float32."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_prunable + num_protected

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = (batch, SHAPE.num_heads, num_tokens, SHAPE.head_dim)
    queries, keys, values = rand(*heads), rand(*heads), rand(*heads)
    attention = (queries.float() @ keys.float().transpose(-1, -2)).softmax(-1)
    tokens, inputs = rand(batch, num_tokens, SHAPE.width), rand(batch, num_tokens, SHAPE.width)
    pieces = attention.split(2)
    return Signals(tokens, inputs, num_protected, num_protected > 0, pieces, queries, keys, values)


def select(signals: Signals, rows: slice | None = None, order: torch.Tensor | None = None) -> Signals:
    """Some samples of the batch, or all of them with their prunable tokens in another order."""

    def pick(x: torch.Tensor, token_dims: tuple[int, ...]) -> torch.Tensor:
        if rows is not None:
            return x[rows]
        for dim in token_dims:
            x = x.index_select(dim, order)
        return x

    assert signals.attention is not None and signals.queries is not None
    assert signals.keys is not None and signals.values is not None
    return replace(
        signals,
        tokens=pick(signals.tokens, (1,)),
        inputs=pick(signals.inputs, (1,)),
        attention=(pick(torch.cat(signals.attention), (2, 3)),),
        queries=pick(signals.queries, (2,)),
        keys=pick(signals.keys, (2,)),
        values=pick(signals.values, (2,)),
    )


def keep_of(stage: Stage, signals: Signals) -> torch.Tensor:
    num_prunable = signals.tokens.shape[1] - signals.num_protected
    return stage.reduce(signals, stage.num_kept(num_prunable)).keep


@pytest.fixture(params=all_stages(), ids=lambda s: f"{type(s).__name__}-{s.layer}-{s.where}")
def stage(request: pytest.FixtureRequest) -> Stage:
    return request.param


@pytest.mark.parametrize("num_protected", [0, 1, 2])
@pytest.mark.parametrize("num_prunable", [1, 2, 3, 7, 36, 61])
def test_counts_order_and_range(stage: Stage, num_prunable: int, num_protected: int) -> None:
    signals = make_signals(3, num_prunable, num_protected)
    keep = keep_of(stage, signals)
    assert keep.dtype == torch.int64
    assert keep.shape == (3, stage.num_kept(num_prunable))
    assert 1 <= keep.shape[1] <= num_prunable
    assert (keep[:, 1:] > keep[:, :-1]).all(), "ascending, hence unique"
    assert keep.min() >= 0 and keep.max() < num_prunable


def test_counts_grow_with_the_tokens_that_enter(stage: Stage) -> None:
    counts = [stage.num_kept(n) for n in range(200)]
    assert counts[0] == 0 and counts[1] == 1
    assert all(0 <= b - a <= 1 for a, b in pairwise(counts))


def test_a_batch_is_its_samples_alone(stage: Stage) -> None:
    signals = make_signals(4, 36)
    together = keep_of(stage, signals)
    alone = torch.cat([keep_of(stage, select(signals, rows=slice(i, i + 1))) for i in range(4)])
    assert torch.equal(together, alone)


def test_follows_a_permutation_or_ignores_the_content(stage: Stage) -> None:
    """A method sees tokens as a set; one that goes by position must not look at the content at all."""
    signals = make_signals(4, 36)
    permutation = torch.randperm(36)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), permutation + 1])
    keep = keep_of(stage, signals)
    if torch.equal(keep, keep_of(stage, make_signals(4, 36, seed=5))):
        assert torch.equal(keep, keep[:1].expand_as(keep))
    else:
        assert torch.equal(permutation[keep_of(stage, select(signals, order=order))].sort(1).values, keep)


def test_deterministic(stage: Stage) -> None:
    signals = make_signals(2, 36)
    assert torch.equal(keep_of(stage, signals), keep_of(stage, signals))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_chooses_what_its_float32_copy_does(stage: Stage, dtype: torch.dtype) -> None:
    half = make_signals(2, 36, dtype=dtype)
    full = replace(
        half,
        tokens=half.tokens.float(),
        inputs=half.inputs.float(),
        queries=half.queries.float(),
        keys=half.keys.float(),
        values=half.values.float(),
    )
    assert torch.equal(keep_of(stage, half), keep_of(stage, full))


def test_identical_tokens_and_zero_vectors_are_survived(stage: Stage) -> None:
    zero = torch.zeros_like
    s = make_signals(2, 36)
    attention = tuple(torch.full_like(piece, 1 / 37) for piece in s.attention)
    flat = Signals(zero(s.tokens), zero(s.inputs), 1, True, attention, zero(s.queries), zero(s.keys), zero(s.values))
    keep = keep_of(stage, flat)
    assert keep.shape == (2, stage.num_kept(36)) and (keep[:, 1:] > keep[:, :-1]).all()


@pytest.mark.parametrize("name", list_methods())
def test_strength_scales_what_is_removed(name: str) -> None:
    config = get_method(name)()

    def left(strength: float) -> int:
        remaining = SHAPE.num_patches
        for stage in config.scaled(strength).stages(SHAPE):
            remaining = stage.num_kept(remaining)
        return remaining

    assert left(0.0) == SHAPE.num_patches
    assert left(1.0) == left_after(config)
    assert left(0.0) > left(0.5) > left(1.0) > left(1.5)


def left_after(config: PruneConfig) -> int:
    remaining = SHAPE.num_patches
    for stage in config.stages(SHAPE):
        remaining = stage.num_kept(remaining)
    return remaining
