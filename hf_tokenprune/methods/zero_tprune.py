"""Zero-TPrune: token pruning on the attention graph, without training.

Follows the published description of Hongjie Wang, Bhishma Dedhia, Niraj K. Jha, "Zero-TPrune: Zero-Shot Token Pruning
through Leveraging of the Attention Graph in Pre-Trained Transformers", CVPR 2024 (arXiv 2305.17328). There is no
official code. One pruning layer runs I' → S → I:

- I': one round of voting on the attention graph ranks the tokens; nothing leaves.
- S:  of each pair of similar tokens the less important one leaves, so that a large group of look-alikes (background)
      cannot vote itself to the top.
- I:  weighted page rank on the graph of the remaining tokens; the least important ones leave.

Axes: B batch, H heads, T all tokens (protected ones first), P protected, N = T - P prunable, d head width.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_method
from ..signals import ModelShape, Reduction, Signals, Stage
from ..tokens import num_to_keep, position_noise, stable_order, top_tokens, with_protected
from .layerwise import LayerwiseConfig
from .similarity import shortened

Partition = Literal["sequential_unimportant", "sequential_important", "alternate", "random", "none"]
Feature = Literal["key", "key_mean", "query", "value", "input", "output"]
Metric = Literal["cosine", "dot", "manhattan", "euclidean", "minkowski3", "minkowski4", "minkowski5", "chebyshev"]
MINKOWSKI = {f"minkowski{order}": float(order) for order in (3, 4, 5)}
DISTANCE_ORDERS = {"manhattan": 1.0, "euclidean": 2.0, **MINKOWSKI, "chebyshev": math.inf}
MAX_ITERATIONS = 1000
MANY = 8  # rounds, from which on it pays to weigh the graph once
SIMILAR_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the tokens that leave: what a search lets the S-stage drop


@register_method("zero_tprune")
@dataclass(frozen=True)
class ZeroTPruneConfig(LayerwiseConfig):
    """Zero-TPrune. The defaults are the schedule known for DeiT-S at 3.1 GMACs, carried to other depths and sizes.

    Args:
        layers: 0-based blocks, ascending. None: where (0, 2, 5, 8, 10) lie in 12 blocks.
        keep_ratios: fraction kept by the I-stage, of what the similarity stage left; at 1 the I-stage is skipped.
            None: (1, 0.9, 0.8, 0.7, 1). At least one token stays.
        num_similar: tokens the S-stage drops at each layer: an int, or a fraction of the patches that the checkpoint's
            own image size has (so it does not grow with the image); one for all layers, or one a layer. At 0 the
            I'- and S-stages are skipped. Never more than half of the tokens that enter.
        num_iterations: rounds of weighted page rank in the I-stage, one for all layers or one a layer. None: 30 in the
            first quarter of the blocks, 1 in the last, 5 between (the paper: 30-50, 5-10, 1).
        cls_boost: CLS starts with sqrt(T) times the score of other tokens; False is the paper's "-uni".
        head_variance_range: heads whose scores, divided by their mean, have a variance outside this range are left out
            (if none is inside, all count). None: no head filter. The paper's range cannot be meant on raw scores, whose
            variance never reaches 0.01 for 99 tokens or more.
        where: "after_block" as in the paper, or "mid_block". Not "queries": page rank needs the queries of all tokens.
        partition: which tokens may leave in S and what they are compared with, by I' importance.
            "sequential_unimportant": the less important half leaves, compared with the other; "sequential_important":
            the reverse; "alternate": every second; "random": random halves; "none": every token, compared with all
            more important ones.
        similarity_feature: "key" (heads concatenated), "key_mean" (mean over heads), "query", "value", "input" (of the
            block) or "output" (where the tokens leave).
        similarity_metric: cosine, dot product, or the negative of a distance.
        renormalize: rows of the attention graph sum to 1 again after S.
    """

    where: Literal["after_block", "mid_block"] = "after_block"
    num_similar: int | float | tuple[int | float, ...] = 10 / 196
    num_iterations: int | tuple[int, ...] | None = None
    cls_boost: bool = True
    head_variance_range: tuple[float, float] | None = (0.01, 0.7)
    partition: Partition = "sequential_unimportant"
    similarity_feature: Feature = "key"
    similarity_metric: Metric = "cosine"
    renormalize: bool = True

    search_fields: ClassVar[tuple[str, ...]] = ("exact_last_block", "where", "num_similar")
    default_blocks: ClassVar[tuple[int, ...]] = (1, 3, 6, 9, 11)
    default_keep_ratios: ClassVar[tuple[float, ...]] = (1.0, 0.9, 0.8, 0.7, 1.0)

    def validate(self) -> None:
        super().validate()
        similar = self.num_similar if isinstance(self.num_similar, tuple) else (self.num_similar,)
        allowed = "a count >= 0 (integer) or a fraction of the patches (0 <= fraction < 1)"
        self.check(all(r >= 0 and (isinstance(r, int) or r < 1) for r in similar), "num_similar", allowed)
        rounds = self.num_iterations if isinstance(self.num_iterations, tuple) else (self.num_iterations,)
        allowed = f"1 to {MAX_ITERATIONS} rounds"
        self.check(all(t is None or 1 <= t <= MAX_ITERATIONS for t in rounds), "num_iterations", allowed)
        if self.layers is not None:
            for field in ("num_similar", "num_iterations"):
                self._per_layer(field, len(self.layers))
        if self.head_variance_range is not None:
            low, high = self.head_variance_range
            self.check(0 <= low < high, "head_variance_range", "(low, high) with 0 <= low < high, or None")
        if not any(similar):
            for field, default in self._similarity_defaults().items():
                unused = "its default: it has no effect with num_similar=0"
                self.check(getattr(self, field) == default, field, unused)

    def stages_for(self, shape: ModelShape) -> tuple[Stage, ...]:
        plan = self.plan(shape)
        similar = self._per_layer("num_similar", len(plan))
        rounds = self._per_layer("num_iterations", len(plan))
        return tuple(
            ZeroTPruneStage(
                layer=layer,
                where=self.where,
                keep_ratio=ratio,
                num_similar=r if isinstance(r, int) else round(r * shape.num_patches),
                num_iterations=default_iterations(layer, shape.depth) if t is None else t,
                config=self,
            )
            for (layer, ratio), r, t in zip(plan, similar, rounds, strict=True)
        )

    def scaled(self, strength: float) -> "ZeroTPruneConfig":
        def scale(r: int | float) -> int | float:
            return int(r * strength + 0.5) if isinstance(r, int) else min(r * strength, 0.99)

        given = self.num_similar
        similar = tuple(map(scale, given)) if isinstance(given, tuple) else scale(given)
        unused = {} if any(similar if isinstance(similar, tuple) else (similar,)) else self._similarity_defaults()
        return dataclasses.replace(super().scaled(strength), num_similar=similar, **unused)

    def with_counts(self, shape: Any, counts: Mapping[int, int]) -> "ZeroTPruneConfig":
        """S drops the same part of what leaves as in this config's own schedule, all layers together."""
        steps = self._steps(shape)
        removed = sum(entering - left for _, entering, _, left in steps)
        similar = sum(entering - dissimilar for _, entering, dissimilar, _ in steps)
        return self._with_share(counts, shape.num_prunable, similar / max(removed, 1))

    def choices(self, name: str, shape: Any) -> tuple["ZeroTPruneConfig", ...]:
        """Of ``num_similar``: as many tokens leave, and S drops none of them, a quarter, half, three quarters, all."""
        if name != "num_similar":
            return super().choices(name, shape)
        counts = {layer: left for layer, _, _, left in self._steps(shape)}
        return tuple(self._with_share(counts, shape.num_prunable, share) for share in SIMILAR_SHARES)

    def _steps(self, shape: Any) -> list[tuple[int, int, int, int]]:
        """(layer, tokens that enter, that S leaves, that I leaves) of each pruned layer."""
        steps, entering = [], shape.num_prunable
        for stage in self.stages_for(shape):
            assert isinstance(stage, ZeroTPruneStage)
            left = stage.num_kept(entering)
            steps.append((stage.layer, entering, stage.num_dissimilar(entering), left))
            entering = left
        return steps

    def _with_share(self, counts: Mapping[int, int], entering: int, share: float) -> "ZeroTPruneConfig":
        """With ``counts`` left at each layer, where S drops this part of what leaves."""
        ratios, by_similarity = [], list[int]()
        for n_keep in counts.values():
            by_similarity.append(min(int(share * (entering - n_keep) + 0.5), entering // 2))
            ratios.append(n_keep / (entering - by_similarity[-1]))
            entering = n_keep
        unused = {} if any(by_similarity) else self._similarity_defaults()
        return dataclasses.replace(
            self,
            layers=tuple(counts),
            keep_ratios=tuple(ratios),
            num_similar=tuple(by_similarity),
            num_iterations=self.num_iterations if isinstance(self.num_iterations, int) else None,
            **unused,
        )

    @classmethod
    def _similarity_defaults(cls) -> dict[str, Any]:
        """The fields that have an effect on the S-stage only, with their defaults."""
        names = ("partition", "similarity_feature", "similarity_metric", "renormalize")
        return {f.name: f.default for f in dataclasses.fields(cls) if f.name in names}

    def _per_layer(self, field: str, count: int) -> tuple:
        value = getattr(self, field)
        if not isinstance(value, tuple):
            return (value,) * count
        self.check(len(value) == count, field, f"{count} values, one for each pruned layer")
        return value


@dataclass(frozen=True)
class ZeroTPruneStage(Stage):
    keep_ratio: float
    num_similar: int
    num_iterations: int
    config: ZeroTPruneConfig

    @property
    def needs(self) -> frozenset[str]:
        feature = {"key": "keys", "key_mean": "keys", "query": "queries", "value": "values"}
        used = feature.get(self.config.similarity_feature)
        return frozenset({"attention"} | ({used} if used and self.num_similar else set()))

    @property
    def reads_tokens(self) -> bool:
        return self.config.similarity_feature == "output"

    def num_kept(self, num_prunable: int) -> int:
        return num_to_keep(self.num_dissimilar(num_prunable), self.keep_ratio)

    def num_dissimilar(self, num_prunable: int) -> int:
        """Tokens that the S-stage leaves: at most half can go, and none of one."""
        return num_prunable - min(self.num_similar, (num_prunable + 1) // 2) if num_prunable > 1 else num_prunable

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        config, num_protected = self.config, signals.num_protected
        num_tokens = signals.num_prunable
        options: dict[str, Any] = {"cls_boost": config.cls_boost and signals.has_cls, "renormalize": config.renormalize}

        def rank(num_iterations: int, *kept: Tensor) -> Tensor:
            vote = partial(weighted_page_rank, num_iterations=num_iterations, **options)
            scores = signals.map_attention(vote, *kept)
            return importance(scores[..., num_protected:], config.head_variance_range)

        n_dissimilar = self.num_dissimilar(num_tokens)
        if n_dissimilar == num_tokens:
            scores = rank(self.num_iterations)
            return Reduction(top_tokens(scores, n_keep), importance=scores)
        scores = rank(1)
        features = similarity_features(signals, config.similarity_feature)
        candidates = least_similar(features, scores, n_dissimilar, config.partition, config.similarity_metric)
        if n_keep == n_dissimilar:
            return Reduction(candidates, importance=scores)
        best = top_tokens(rank(self.num_iterations, with_protected(candidates, num_protected)), n_keep)
        return Reduction(candidates.gather(1, best), importance=scores)


def default_iterations(layer: int, depth: int) -> int:
    """Rounds by depth: 30 in the first quarter of the blocks, 1 in the last, 5 between (3, 6 and 3 of 12)."""
    edge = max(1, int(depth / 4 + 0.5))
    return 30 if layer < edge else 1 if layer >= depth - edge else 5


def weighted_page_rank(
    attention: Tensor, kept: Tensor | None = None, *, num_iterations: int, cls_boost: bool, renormalize: bool = True
) -> Tensor:
    """Importance a head gives each token: ``s ← Aᵀ s`` on the attention graph, a fixed number of rounds (Algorithm 1).

    Args:
        attention: (B, H, T, T) float32, rows sum to 1; row i is what token i attends to, so it votes by its row.
        kept: (B, n) positions of the tokens in the graph; None: all T. The other tokens neither vote nor are voted for.
        cls_boost: token 0 starts with sqrt(n) times the score 1 / n of the others.
        renormalize: rows of the remaining graph are divided by their sum.

    Returns:
        (B, H, n) scores, in the order of ``kept``.
    """
    batch, heads, num_tokens, _ = attention.shape
    n = num_tokens if kept is None else kept.shape[1]
    if kept is None:
        scores = attention.mean(2)  # first round: all start with 1 / n
        if cls_boost:
            scores.add_(attention[:, :, 0], alpha=(math.sqrt(n) - 1) / n)
        return _rounds(scores, attention, num_iterations - 1)
    # The graph is not cut out: a token outside it gets weight 0 as voter and as candidate.
    voter = attention.new_zeros(batch, 1, num_tokens).scatter_(2, kept.unsqueeze(1), 1.0)
    if renormalize:
        sums = torch.bmm(attention.flatten(1, 2), voter.mT).view(batch, heads, num_tokens)
        voter = voter / sums.clamp_min_(1e-12)
    scores = (voter / n).expand(-1, heads, -1)
    if cls_boost:
        scores = torch.cat([scores[..., :1] * math.sqrt(n), scores[..., 1:]], dim=2)
    if num_iterations > MANY:
        scores = _rounds(scores, attention * voter.unsqueeze(2), num_iterations - 1)
    else:
        for _ in range(num_iterations - 1):
            scores = _rounds(scores, attention, 1).mul_(voter)
    return _rounds(scores, attention, 1).gather(2, kept.unsqueeze(1).expand(-1, heads, -1))


def _rounds(scores: Tensor, attention: Tensor, count: int) -> Tensor:
    """``count`` times ``s ← Aᵀ s``, in the row form s A, several times faster: (B, H, T) as such."""
    row, graph = scores.flatten(0, 1).unsqueeze(1), attention.flatten(0, 1)
    for _ in range(count):
        row = torch.bmm(row, graph)
    return row.view(scores.shape)


def importance(scores: Tensor, head_variance_range: tuple[float, float] | None) -> Tensor:
    """Join the heads: variance-based head filter, then root mean square (emphasising informative region).

    Args:
        scores: (B, H, N) of the prunable tokens only, so that a CLS sink does not decide which heads count.
        head_variance_range: of the variance of a head's scores divided by their mean; None: all heads count.

    Returns:
        (B, N) float32.
    """
    if head_variance_range is None:
        return scores.square().mean(1).sqrt()
    variance, mean = torch.var_mean(scores, -1, correction=0)
    variance = variance / mean.square()  # of scores divided by their mean
    informative = variance.clamp(*head_variance_range) == variance
    weight = (informative / informative.sum(1, keepdim=True)).nan_to_num(1 / scores.shape[1])  # where none is, all
    return torch.bmm(weight.unsqueeze(1), scores.square()).squeeze(1).sqrt()


def similarity_features(signals: Signals, feature: Feature) -> Tensor:
    """(B, N, features) of the prunable tokens, heads concatenated unless averaged."""
    if feature in ("input", "output"):
        states = signals.inputs if feature == "input" else signals.tokens
    else:
        name = {"key": "keys", "key_mean": "keys", "query": "queries", "value": "values"}[feature]
        per_head = signals.need(name).transpose(1, 2)
        states = per_head.mean(2, dtype=torch.float32) if feature == "key_mean" else per_head.flatten(2)
    return states[:, signals.num_protected :]


def least_similar(features: Tensor, importance: Tensor, n_keep: int, partition: Partition, metric: Metric) -> Tensor:
    """S-stage: every candidate is matched with its most similar partner; the most similar candidates leave.

    Args:
        features: (B, N, F).
        importance: (B, N) from the I'-stage.
        n_keep: tokens that stay, at least half of them.

    Returns:
        (B, n_keep) int64, ascending. Ties: lower position stays.
    """
    num_tokens, half = importance.shape[1], importance.shape[1] // 2
    order = stable_order(importance, descending=True)
    # Partners are brought in front of those that may leave.
    if partition == "sequential_important":
        order = order.roll(half, dims=1)
    elif partition == "alternate":
        order = torch.cat([order[:, : 2 * half : 2], order[:, 1::2], order[:, 2 * half :]], dim=1)
    elif partition == "random":
        order = stable_order(position_noise(num_tokens, 0, order.device)).expand_as(order)
    ranked = features[torch.arange(order.shape[0], device=order.device).unsqueeze(1), order].float()
    ranked = shortened(ranked) if metric == "cosine" else ranked
    if partition == "none":
        less_important = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=order.device).tril(-1)
        nearest = similarity(ranked, ranked, metric).masked_fill(~less_important, -math.inf).amax(-1)
    else:
        nearest = F.pad(similarity(ranked[:, half:], ranked[:, :half], metric).amax(-1), (half, 0), value=-math.inf)
    redundancy = torch.empty_like(nearest).scatter_(1, order, nearest)
    return stable_order(redundancy)[:, :n_keep].sort(dim=1).values


def similarity(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """(B, n, m) similarity of ``a`` (B, n, F) and ``b`` (B, m, F), higher = more alike; for cosines both shortened."""
    if metric in DISTANCE_ORDERS:
        return -torch.cdist(a, b, p=DISTANCE_ORDERS[metric], compute_mode="donot_use_mm_for_euclid_dist")
    return torch.bmm(a, b.mT)
