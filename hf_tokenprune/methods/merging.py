"""What methods share that merge tokens: schedules of counts, and matching tokens in pairs.

Axes: B batch, P protected tokens, N prunable tokens, H heads, d head width, m tokens merged into others.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..signals import Merging, ModelShape, Reduction, Signals, Stage
from .similarity import SHORT, products, shortened
from .visionwise import VisionConfig

C = TypeVar("C", bound="MergingConfig")
Spread = Literal["even", "proportional"]


@dataclass(frozen=True)
class MergingConfig(VisionConfig):
    """Fields of every config that merges a number of tokens at each of several layers, between attention and MLP.

    Args:
        r: tokens that are merged into others. An integer: at every layer; several: one a layer; a fraction (below 1):
            of the patches that the checkpoint's own image size has, at all layers together. Never more than half of the
            tokens that enter a layer.
        spread: how a fraction ``r`` is spread over the layers. "even": as many at each. "proportional": the same part
            of the tokens that enter each; where ``layers`` is None, from a block that lies the later the less is
            merged (``late_layers``) to the last but one.
        layers: 0-based blocks, ascending. None: the method's default for the model's depth.
        where: "mid_block": states are merged between attention and MLP. "queries": before the queries, so that the
            attention of the block still reads keys and values of all tokens, but is computed for the merged ones.
        proportional_attention: in later blocks a token draws attention in proportion to its size, the number of patches
            it stands for.
    """

    r: int | float | tuple[int, ...]
    spread: Spread = "even"
    layers: tuple[int, ...] | None = None
    where: Literal["mid_block", "queries"] = "mid_block"
    proportional_attention: bool = True

    search_fields: ClassVar[tuple[str, ...]] = ("exact_last_block", "where")

    def validate(self) -> None:
        super().validate()
        counts = self.r if isinstance(self.r, tuple) else (self.r,)
        self.check(
            all(r >= 0 and (isinstance(r, int) or r < 1) for r in counts),
            "r",
            "a count >= 0 (integer), one a layer, or a fraction of the patches (0 <= fraction < 1)",
        )
        if not isinstance(self.r, float):
            default = type(self).spread
            self.check(self.spread == default, "spread", f"{default!r}, its default: it has no effect on counts r")
        if self.layers is not None:
            ascending = all(a < b for a, b in pairwise((-1, *self.layers)))
            self.check(bool(self.layers) and ascending, "layers", "ascending block numbers >= 0")
            if isinstance(self.r, tuple):
                allowed = f"{len(self.layers)} values, one for each of layers={self.layers}"
                self.check(len(self.r) == len(self.layers), "r", allowed)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Where the method merges in a model of ``depth`` blocks."""
        return tuple(range(depth))

    def counts(self, shape: ModelShape) -> list[tuple[int, int]]:
        """(layer, tokens to merge there) of each stage; fields that do not fit the shape raise ConfigError."""
        layers = self.default_layers(shape.depth) if self.layers is None else self.layers
        allowed = f"blocks 0..{shape.depth - 1}: this model has {shape.depth} blocks"
        self.check(max(layers) < shape.depth, "layers", allowed)
        if isinstance(self.r, float) and self.spread == "proportional":
            weights = late_layers(self.r, shape.depth) if self.layers is None else dict.fromkeys(layers, 1.0)
            return list(proportional(self.r, shape.num_patches, weights).items())
        if isinstance(self.r, float):
            counts = even(self.r * shape.num_patches, len(layers))
        else:
            counts = self.r if isinstance(self.r, tuple) else (self.r,) * len(layers)
            self.check(len(counts) == len(layers), "r", f"{len(layers)} values, one for each default layer")
        return list(zip(layers, counts, strict=True))

    def scaled(self: C, strength: float) -> C:
        """Every count multiplied by ``strength`` and rounded. Only a fraction can be scaled finely, up to 0.99."""
        if isinstance(self.r, float):
            return dataclasses.replace(self, r=min(self.r * strength, 0.99))
        if isinstance(self.r, tuple):
            return dataclasses.replace(self, r=tuple(int(r * strength + 0.5) for r in self.r))
        return dataclasses.replace(self, r=int(self.r * strength + 0.5))

    def fewest(self, num_tokens: int) -> int:
        return num_tokens - num_tokens // 2

    def with_counts(self: C, shape: ModelShape, counts: Mapping[int, int]) -> C:
        left = (shape.num_prunable, *counts.values())
        merged = tuple(before - after for before, after in pairwise(left))
        return dataclasses.replace(self, layers=tuple(counts), r=merged, spread=type(self).spread)

    def by_rule(self: C, strength: float, shape: ModelShape) -> C:
        """Merging costs least late, and where many tokens are left."""
        scaled = self.scaled(strength)
        if self.layers is not None or not isinstance(scaled.r, float):
            return scaled
        return dataclasses.replace(scaled, spread="proportional")


def late_layers(fraction: float, depth: int) -> dict[int, float]:
    """0-based layers, up to the last but one, in which ``fraction`` of the patches is best merged, and their weights.

    They start at block 7 - 4 · fraction of 12, counted from 1. Where that is not a whole number, the block in front of
    it counts for the rest, so that work changes smoothly with the fraction.
    """
    first = min(max(depth * (7 - 4 * fraction) / 12, 1.0), max(depth - 1.0, 1.0))
    weights = {layer: min(layer + 2 - first, 1.0) for layer in range(max(depth - 1, 1))}
    return {layer: weight for layer, weight in weights.items() if weight > 0}


def proportional(fraction: float, num_patches: int, weights: Mapping[int, float]) -> dict[int, int]:
    """Tokens to merge at each layer, in all ``fraction`` of the patches: layers of equal weight merge the same part.

    Of what enters a layer of weight w, out of W together, (1 - fraction)^(w / W) stays, rounded.
    """
    total, done, entering, counts = sum(weights.values()), 0.0, num_patches, {}
    for layer, weight in weights.items():
        done += weight
        left = math.floor(num_patches * (1 - fraction) ** (done / total) + 0.5)
        counts[layer], entering = entering - left, left
    return counts


def even(total: float, count: int) -> tuple[int, ...]:
    """``count`` integers whose running sum is that of ``total / count``, rounded; they differ by at most one."""
    sums = [math.floor(total * i / count + 0.5) for i in range(count + 1)]
    return tuple(b - a for a, b in pairwise(sums))


@dataclass(frozen=True)
class MergeStage(Stage):
    """Merges ``r`` tokens; a method adds which, and how their features are averaged."""

    r: int
    proportional_attention: bool

    merges: ClassVar[bool] = True

    @property
    def proportional(self) -> bool:
        return self.proportional_attention

    def num_kept(self, num_prunable: int) -> int:
        return num_prunable - min(self.r, num_prunable // 2)


def mean_keys(signals: Signals) -> Tensor:
    """(B, P + N, d) float32: the keys, averaged over heads."""
    return signals.need("keys").mean(1, dtype=torch.float32)


def keys_by_head(signals: Signals) -> Tensor:
    """(B, P + N, H · d) float32: the keys, each head's of length ``SHORT``, side by side.

    The cosine of two of them is the mean over heads of the cosines of their keys.
    """
    return shortened(signals.need("keys").transpose(1, 2).float()).flatten(2)


class Matching(NamedTuple):
    """Each of the tokens that look, with the most similar one of those that are sought.

    Attributes:
        looking, sought: of the positions in the whole sequence.
        found: (B, a) int64, places in ``sought``.
        similarity: (B, a).
    """

    looking: slice
    sought: slice
    found: Tensor
    similarity: Tensor


def match_alternate(metric: Tensor, num_protected: int, parts: int = 1) -> Matching:
    """Bipartite matching: every second token of the sequence looks for the most similar one of the others.

    Args:
        metric: (B, P + N, parts · d) float32, vectors that are ``shortened``, so many side by side; similarity is
            the mean of their cosines.
        num_protected: protected tokens stand in front and count in the alternation, but take no part.
    """
    looking, sought = (slice(num_protected + (num_protected + turn) % 2, None, 2) for turn in (0, 1))
    nearest = products(metric[:, looking], metric[:, sought], SHORT**-2 / parts).max(-1)
    return Matching(looking, sought, nearest.indices, nearest.values)


def merge_first(
    signals: Signals, matching: Matching, order: Tensor, n_keep: int, weights: Tensor | None = None
) -> Merging:
    """Merge the first pairs of a matching, in the ``order`` (B, a), until ``n_keep`` prunable tokens are left.

    Features are averaged with ``weights`` (B, P + N); None: sizes. As in the published algorithm of ToMe, the tokens
    that looked and were not merged go on in front of those that were sought: the next layer deals them out in that
    order.
    """
    count, num_protected, rows = signals.num_prunable - n_keep, signals.num_protected, signals.rows
    ordered = rows[:, matching.looking].gather(1, order)
    merged, unmerged = ordered[:, :count], ordered[:, count:].sort(dim=1).values
    into = matching.found.gather(1, order[:, :count]) + (num_protected + unmerged.shape[1])
    moved = torch.cat([rows[:, :num_protected], unmerged, rows[:, matching.sought], merged], dim=1)
    return Merging(moved, into, rows[:, :1], num_protected, weights)


def in_place(
    signals: Signals,
    staying: Tensor,
    merged: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    average: bool = True,
) -> Merging:
    """Tokens ``merged`` (B, m) into ``targets`` (B, m or 1), while those that stay keep their order.

    Positions are in the whole sequence; ``staying`` (B, P + n) are ascending, with the protected tokens in front.
    """
    into = (staying.unsqueeze(1) < targets.unsqueeze(2)).sum(2).expand_as(merged)
    first = signals.rows[:, :1]
    rows = torch.cat([staying, merged], dim=1) + first
    return Merging(rows, into, first, signals.num_protected, weights, average)


def everything(signals: Signals) -> Reduction:
    """All tokens stay."""
    return Reduction(signals.rows[0, : signals.num_prunable].expand(signals.tokens.shape[0], -1))
