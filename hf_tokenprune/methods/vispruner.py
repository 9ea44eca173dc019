"""VisPruner: the patches that draw the most attention, and of the others those that are left when look-alikes leave.

Follows Qizhe Zhang, Aosong Cheng, Ming Lu, Renrui Zhang, Zhiyong Zhuo, Jiajun Cao, Shaobo Guo, Qi She, Shanghang Zhang,
"Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025 (arXiv
2412.01818), and its official code for what the paper leaves open.

Axes: B images, H heads, N tokens, D width, R tokens that are not decided on, E of them at even places, k kept.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TokenPruneError
from ..registry import register_method
from ..signals import VISION_TOWER, DecoderShape, Reduction, Signals, Stage
from ..tokens import gather_tokens, stable_order
from .decoderwise import RatioConfig, RatioStage

ROUND = 8
"""Tokens that leave in one round of removing look-alikes; the official code's."""


@register_method("vispruner")
@dataclass(frozen=True)
class VisPrunerConfig(RatioConfig):
    """VisPruner, at the output of the vision tower. The default keeps 64 of 576 tokens.

    Args:
        keep_ratio: fraction of the tokens of every encoded image (of every crop) kept, in (0, 1];
            ``max(1, round(keep_ratio · N))`` stay.
        important: share of what is kept that is chosen by attention, 0 to 1; the others by how much they differ.
    """

    important: float = 0.5

    @property
    def place(self) -> int:
        return VISION_TOWER

    def validate(self) -> None:
        super().validate()
        self.check(0 <= self.important <= 1, "important", "0 <= important <= 1")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        attention = "cls_attention" if shape.tower.has_cls else "received_attention"
        stage = VisPrunerStage(
            -1, "vision_tower", self.keep_ratio, self.important, attention, budget="image", **self.shared(shape)
        )
        return (stage,)


@dataclass(frozen=True)
class VisPrunerStage(RatioStage):
    important: float
    attention: str
    """Whose attention counts: that of CLS, or of all tokens where there is none."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.attention})

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        tokens = signals.tokens[:, signals.num_protected :]
        attention = signals.need(self.attention)[..., signals.num_protected :].mean(1)
        keep = vispruner(tokens, attention, n_keep, self.important).sort(dim=1).values
        return Reduction(keep, importance=attention)


def vispruner(features: Tensor, attention: Tensor, n_keep: int, important: float = 0.5) -> Tensor:
    """The ``floor(k · important)`` tokens that draw the most attention, and the others by ``diverse``.

    Args:
        features: (B, N, D); scores are float32 whatever its dtype. A zero vector has cosine 0 with every token.
        attention: (B, N) float32 that the tokens draw.
        n_keep: 1 <= k <= N.

    Returns:
        (B, k) int64 positions, the important ones first. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    num_tokens = features.shape[1]
    if not 1 <= n_keep <= num_tokens:
        raise TokenPruneError(f"n_keep={n_keep}: expected 1 <= n_keep <= {num_tokens}, the number of tokens")
    order = stable_order(attention, descending=True)
    num_important = math.floor(n_keep * important + 1e-9)  # the epsilon keeps 0.7 · 10 at 7
    if num_important == n_keep:
        return order[:, :n_keep]
    rest = diverse(features, order[:, num_important:], n_keep - num_important)
    return torch.cat([order[:, :num_important], rest], 1)


def diverse(features: Tensor, order: Tensor, n_keep: int) -> Tensor:
    """What is left of a list of tokens when look-alikes have left it, round by round.

    In a round the tokens at even places are compared with those at odd ones (cosine), and the 8 of them that are most
    like one leave, fewer in the last round. The list of the next round has the others, most like one first, and behind
    them those of odd places.

    Args:
        features: (B, N, D).
        order: (B, R) int64, positions of the tokens in the list, in its order.
        n_keep: 1 <= n <= R.

    Returns:
        (B, n) int64 positions.
    """
    unit = F.normalize(features.float(), dim=-1)
    similarity = unit @ unit.mT
    while order.shape[1] > n_keep:  # sizes alone decide on the rounds
        even, odd = order[:, ::2], order[:, 1::2]
        nearest = gather_tokens(similarity, odd).amax(1).gather(1, even)  # (B, E); whole rows are copied fast
        leaving = min(ROUND, order.shape[1] - n_keep)
        staying = stable_order(nearest, descending=True)[:, leaving:]
        order = torch.cat([even.gather(1, staying), odd], 1)
    return order
