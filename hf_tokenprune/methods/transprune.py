"""TransPrune: keep the image tokens that the decoder's layers change most, and that the instruction attends to.

Follows Ao Li, Yuxiang Duan, Jinghui Zhang, Congbo Ma, Yutong Xie, Gustavo Carneiro, Mohammad Yaqub, Hu Wang,
"TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", CVPR 2026 (arXiv 2507.20630),
and its official code for what the paper leaves open.

Axes: B batch, T all tokens, N image tokens, H heads, R rows of text, K layers, D width.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage, TextRows, Transition
from ..tokens import num_to_keep, top_tokens
from .decoderwise import DecoderConfig, scaled_ratio

Direction = Literal["signed", "absolute"]
Domain = Literal["sequence", "image"]
EPSILON = 1e-8  # the official code's


@register_method("transprune")
@dataclass(frozen=True)
class TransPruneConfig(DecoderConfig):
    """TransPrune. The defaults are the official scripts' ("TransPrune-High"), made for decoders of 32 layers.

    Args:
        accumulate_layers: 0-based decoder layers, ascending, whose token transition variation (TTV) is summed; a stage
            uses those up to its own layer.
        layers: 0-based decoder layers behind which tokens leave, ascending.
        keep_ratios: fractions of the original image tokens kept, one a layer, never increasing;
            ``max(1, floor(N · ratio))`` stay.
        alpha: weight of TTV against instruction-guided attention (IGA), 0 to 1. At 1 no attention is read; at 0 there
            is nothing to accumulate.
        direction: a token's change of direction is 1 − cos ("signed", the official code) or 1 − |cos| ("absolute", the
            paper's eq. 2).
        softmax_over: the tokens whose changes of direction are weighed against each other: all of the "sequence" (the
            official code) or those of the "image" (the paper).
    """

    accumulate_layers: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    layers: tuple[int, ...] = (6, 8, 11)
    keep_ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    alpha: float = 0.5
    direction: Direction = "signed"
    softmax_over: Domain = "sequence"

    def validate(self) -> None:
        self.check(bool(self.layers), "layers", "at least one layer")
        self.check_ascending("layers")
        self.check_ratios_of_original("keep_ratios")
        one_each = f"{len(self.layers)} values, one for each of layers={self.layers}"
        self.check(len(self.keep_ratios) == len(self.layers), "keep_ratios", one_each)
        self.check(0 <= self.alpha <= 1, "alpha", "0 <= alpha <= 1")
        self.check_ascending("accumulate_layers")
        if self.alpha == 0:
            self.check(not self.accumulate_layers, "accumulate_layers", "(): with alpha=0 no transition is looked at")
            self.check(self.direction == "signed", "direction", "'signed': another has no effect with alpha=0")
            self.check(
                self.softmax_over == "sequence", "softmax_over", "'sequence': another has no effect with alpha=0"
            )
        else:
            first, last = self.layers[0], self.layers[-1]
            accumulated = self.accumulate_layers
            allowed = f"layers up to {last}, the last that prunes, and one up to {first}, the first that prunes"
            self.check(bool(accumulated) and accumulated[0] <= first, "accumulate_layers", allowed)
            self.check(accumulated[-1] <= last, "accumulate_layers", allowed)

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        self.check_followed("layers", self.layers, shape)
        shared = self.shared(shape)
        return tuple(
            TransPruneStage(
                layer,
                "after_block",
                keep_ratio=ratio,
                accumulated=tuple(earlier for earlier in self.accumulate_layers if earlier <= layer),
                alpha=self.alpha,
                direction=self.direction,
                softmax_over=self.softmax_over,
                **shared,
            )
            for layer, ratio in zip(self.layers, self.keep_ratios, strict=True)
        )

    def scaled(self, strength: float) -> "TransPruneConfig":
        return dataclasses.replace(self, keep_ratios=tuple(scaled_ratio(r, strength) for r in self.keep_ratios))

    def search_places(self, shape: DecoderShape) -> tuple[int, ...]:
        """From the first layer on whose transition is accumulated: in front of it there is nothing to score by."""
        first = self.accumulate_layers[0] if self.accumulate_layers else 0
        return tuple(range(first, shape.depth - 1))

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "TransPruneConfig":
        return dataclasses.replace(
            self,
            accumulate_layers=tuple(layer for layer in self.accumulate_layers if layer <= max(counts)),
            layers=tuple(counts),
            keep_ratios=self.ratios_of_original(shape, counts),
        )


@dataclass(frozen=True)
class TransPruneStage(Stage):
    keep_ratio: float
    accumulated: tuple[int, ...]
    alpha: float
    direction: Direction
    softmax_over: Domain

    counts_from: ClassVar[Literal["entering", "original"]] = "original"
    text_rows: ClassVar[TextRows] = TextRows("text", "next")

    @property
    def needs(self) -> frozenset[str]:
        weights = {"layer_scores": self.alpha, "text_attention": 1 - self.alpha}
        return frozenset(name for name, weight in weights.items() if weight > 0)

    @property
    def observes(self) -> tuple[int, ...]:
        return self.accumulated

    def observe(self, transition: Transition) -> Tensor:
        mask = transition.image if self.softmax_over == "image" else transition.valid
        attention = transition_variation(transition.attention_in, transition.attention_out, mask, self.direction)
        return attention + transition_variation(transition.mlp_in, transition.mlp_out, mask, self.direction)

    def num_kept(self, num_prunable: int) -> int:
        return num_to_keep(num_prunable, self.keep_ratio)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        terms = []
        if "layer_scores" in self.needs:
            terms.append(self.alpha * share(signals.need("layer_scores").sum(1)))
        if "text_attention" in self.needs:
            guided = instruction_guided_attention(signals.need("text_attention"), signals.need("text_mask"))
            terms.append((1 - self.alpha) * share(guided))
        importance = torch.stack(terms).sum(0)
        return Reduction(top_tokens(importance, n_keep), importance=importance)


def transition_variation(before: Tensor, after: Tensor, mask: Tensor, direction: Direction) -> Tensor:
    """TTV of one half of a layer: change of magnitude, times the softmax of the change of direction (eq. 2).

    Args:
        before, after: (B, T, D) what entered the attention or the MLP, and what it returned, without the residual.
        mask: (B, T) bool, the tokens of each sample that the softmax runs over.
        direction: "signed": 1 − cos; "absolute": 1 − |cos|.

    Returns:
        (B, T) float32, 0 outside the mask. Each sample has its own softmax, so a batch equals its samples alone.
    """
    before, after = before.float(), after.float()
    magnitude = after.norm(dim=-1) / before.norm(dim=-1).clamp_min(EPSILON)
    cosine = F.cosine_similarity(before, after, dim=-1)
    change = 1 - (cosine.abs() if direction == "absolute" else cosine)
    weight = change.exp().masked_fill(~mask, 0)
    return magnitude * weight / weight.sum(-1, keepdim=True).clamp_min(EPSILON)


def instruction_guided_attention(text_attention: Tensor, text_mask: Tensor) -> Tensor:
    """IGA: how much the rows of text attend to each image token, mean over heads and rows.

    Args:
        text_attention: (B, H, R, N) float32, softmax over all keys.
        text_mask: (B, R) bool, rows that are text; a sample without any scores 0.

    Returns:
        (B, N) float32.
    """
    rows = text_attention.mean(1).masked_fill(~text_mask.unsqueeze(-1), 0)
    return rows.sum(1) / text_mask.sum(1, keepdim=True).clamp_min(1)


def share(score: Tensor) -> Tensor:
    """(B, N) scores as shares of their sum, so that alpha weighs like with like."""
    return score / (score.sum(-1, keepdim=True) + EPSILON)
