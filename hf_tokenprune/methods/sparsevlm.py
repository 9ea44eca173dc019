"""SparseVLM: words that speak of the image rate its tokens; in a few stages, the best rated stay.

Follows Yuan Zhang, Chun-Kai Fan, Junpeng Ma, Wenzhao Zheng, Tao Huang, Kuan Cheng, Denis Gudovskiy, Tomoyuki Okuno,
Yohei Nakata, Kurt Keutzer, Shanghang Zhang, "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model
Inference", ICML 2025 (arXiv 2410.04417), and its official code for what the paper leaves open.

Axes: B batch, H heads, R rows of text, N image tokens, D width, m tokens of a pool, c clusters, n kept.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage, TextRows
from ..tokens import gather_tokens, num_to_keep, stable_order, top_tokens
from .decoderwise import DecoderConfig, Positions, scaled_ratio
from .layerwise import at_depth

LAYERS_OF_32 = (3, 7, 16)
"""The official code's pruning points: 1-based layers of 32."""
NEIGHBOURS = 5
"""Of a token, counting itself, by whose distances its density is estimated."""


@register_method("sparsevlm")
@dataclass(frozen=True)
class SparseVLMConfig(DecoderConfig):
    """SparseVLM. The default is the official code's table for 192 tokens, without recycling: 300, 200, 118 of 576.

    Args:
        layers: 0-based decoder layers whose attention decides and behind which tokens leave, ascending, one a ratio.
            None: those that lie where 2, 6 and 15 lie among 32.
        keep_ratios: fractions of the original image tokens kept, one a stage, never increasing;
            ``max(1, floor(N · ratio))`` stay.
        heads: how many heads rate, those in which the raters attend to the image most. None: all.
        recycle: the best rated of the tokens that leave are clustered, and each cluster becomes one of those that stay.
    """

    layers: tuple[int, ...] | None = None
    keep_ratios: tuple[float, ...] = (300 / 576, 200 / 576, 118 / 576)
    heads: int | None = None
    recycle: bool = False

    usual_positions: ClassVar[Positions] = "original"

    def validate(self) -> None:
        self.check_ratios_of_original("keep_ratios")
        count = len(LAYERS_OF_32 if self.layers is None else self.layers)
        if self.layers is not None:
            self.check_ascending("layers")
        each = "each default layer (or give layers too)" if self.layers is None else f"each of layers={self.layers}"
        self.check(len(self.keep_ratios) == count, "keep_ratios", f"{count} values, one for {each}")
        self.check(self.heads is None or self.heads >= 1, "heads", "a count >= 1, or None for all")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        layers = tuple(at_depth(LAYERS_OF_32, shape.depth, of=32)) if self.layers is None else self.layers
        self.check_followed("layers", layers, shape)
        heads = shape.num_heads if self.heads is None else self.heads
        self.check(heads <= shape.num_heads, "heads", f"at most {shape.num_heads}, which a decoder layer has")
        ratios = dict(zip(layers, self.keep_ratios, strict=True))  # in a shallow model the last of a layer counts
        shared = self.shared(shape)
        return tuple(
            SparseVLMStage(layer, "after_block", ratio, heads, self.recycle, **shared)
            for layer, ratio in ratios.items()
        )

    def scaled(self, strength: float) -> "SparseVLMConfig":
        return dataclasses.replace(self, keep_ratios=tuple(scaled_ratio(r, strength) for r in self.keep_ratios))

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "SparseVLMConfig":
        return dataclasses.replace(self, layers=tuple(counts), keep_ratios=self.ratios_of_original(shape, counts))


@dataclass(frozen=True)
class SparseVLMStage(Stage):
    keep_ratio: float
    heads: int
    recycle: bool

    counts_from: ClassVar[Literal["entering", "original"]] = "original"
    text_rows: ClassVar[TextRows] = TextRows("text", "own")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text_attention", "text_scores"})

    def rate_text(self, images: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return text_relevance(images, text, text_mask)

    def num_kept(self, num_prunable: int) -> int:
        return num_to_keep(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        rows = raters(signals.need("text_scores"), signals.need("text_mask"))
        scores = rated(signals.need("text_attention"), rows, self.heads)
        num_clustered, num_clusters = recycled(scores.shape[1] - n_keep, n_keep) if self.recycle else (0, 0)
        if num_clusters == 0:
            return Reduction(top_tokens(scores, n_keep), importance=scores)
        states = signals.tokens[:, signals.num_protected :]
        order = stable_order(scores, descending=True)
        best, pool = order[:, : n_keep - num_clusters], order[:, n_keep - num_clusters :][:, :num_clustered]
        centres, merged = cluster_and_merge(gather_tokens(states, pool), num_clusters)
        slots = pool.gather(1, centres)
        states = states.scatter(1, slots.unsqueeze(-1).expand_as(merged), merged)
        keep = torch.cat([best, slots], 1).sort(dim=1).values
        return Reduction(keep, tokens=gather_tokens(states, keep), importance=scores)


def text_relevance(images: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """How much the image speaks of each token of the text: softmax over the text of inner products, mean over images.

    Args:
        images: (B, N, D) embeddings of the image tokens.
        text: (B, R, D) embeddings of the text; ``text_mask`` (B, R) bool: not filling.

    Returns:
        (B, R) float32, 0 for filling.
    """
    logits = images.float() @ text.float().mT
    shares = logits.masked_fill(~text_mask.unsqueeze(1), torch.finfo(torch.float32).min).softmax(-1)
    return shares.mean(1).masked_fill(~text_mask, 0)


def raters(text_scores: Tensor, text_mask: Tensor) -> Tensor:
    """Which rows rate: those of the text that score above its mean; all of it where none does.

    Args:
        text_scores: (B, R) float32; ``text_mask`` (B, R) bool: rows that are text of this sample.

    Returns:
        (B, R) bool.
    """
    mean = text_scores.masked_fill(~text_mask, 0).sum(1, keepdim=True) / text_mask.sum(1, keepdim=True).clamp_min(1)
    above = (text_scores > mean) & text_mask
    return torch.where(above.any(1, keepdim=True), above, text_mask)


def rated(text_attention: Tensor, rows: Tensor, num_heads: int) -> Tensor:
    """(B, N) float32: the mean share of each image token in the attention of the raters, 0 where there is none.

    Args:
        text_attention: (B, H, R, N) float32, softmax over all keys.
        rows: (B, R) bool, the raters.
        num_heads: those count in which the raters attend to the image most; ties: lower head first.
    """
    of_heads = text_attention.masked_fill(~rows[:, None, :, None], 0).sum(2)  # (B, H, N)
    if num_heads < of_heads.shape[1]:
        of_heads = gather_tokens(of_heads, top_tokens(of_heads.sum(2), num_heads))
    return of_heads.mean(1) / rows.sum(1, keepdim=True).clamp_min(1)


def recycled(num_leaving: int, num_kept: int) -> tuple[int, int]:
    """(tokens that are clustered, clusters among the ``num_kept`` that stay), the official code's shares of both.

    At least one token stays for its own sake, and nothing is clustered where nothing leaves.
    """
    if num_leaving == 0:
        return 0, 0
    num_clustered = 3 * num_leaving // 10 + 1
    return num_clustered, min(num_clustered // 10 + 1, num_kept - 1)


def cluster_and_merge(states: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Density peaks clustering (DPC-kNN): tokens join the nearest of those that are dense and far from denser ones.

    Distances are Euclidean, over √D. Density is exp(−mean of the squared distances to the nearest ``NEIGHBOURS``
    tokens, itself among them); a centre has the largest product of its density and its distance to the nearest denser
    token, or to the farthest of all where none is denser. Ties: lower position first.

    Args:
        states: (B, m, D), m > 0.
        num_clusters: 1 <= c <= m.

    Returns:
        (B, c) int64 positions of the centres, and (B, c, D) the mean state of each one's cluster.
    """
    exact = states.float()
    distance = torch.cdist(exact, exact) / states.shape[2] ** 0.5
    nearest = distance.topk(min(NEIGHBOURS, states.shape[1]), largest=False).values
    density = nearest.square().mean(-1).neg()  # its logarithm: float32 has no number for that of large states
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # (B, m, m): is that one denser than this?
    farthest = distance.amax((1, 2), keepdim=True)
    apart = torch.where(denser, distance, farthest).amin(2)
    centres = stable_order(density + apart.log(), descending=True)[:, :num_clusters]
    to_centres = distance.gather(2, centres.unsqueeze(1).expand(-1, states.shape[1], -1))
    numbers = torch.arange(num_clusters, device=states.device).expand_as(centres)
    cluster = to_centres.argmin(2).scatter(1, centres, numbers)  # a centre is in its own, and in no equal token's
    member = torch.zeros_like(to_centres).scatter(2, cluster.unsqueeze(2), 1.0)
    mean = (member.mT @ exact) / member.sum(1).unsqueeze(-1)
    return centres, mean.to(states.dtype)
