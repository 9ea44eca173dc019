"""HiPrune: objects of the middle of the vision tower with their surroundings, and what its end attends to.

Follows Jizhihui Liu, Feiyi Du, Guangdao Zhu, Niu Lian, Jun Li, Bin Chen, "HiPrune: Training-Free Visual Token Pruning
via Hierarchical Attention in Vision-Language Models" (arXiv 2508.00553), and its official code for what the paper
leaves open.

Axes: B images, H heads, N tokens, a anchors, k kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TokenPruneError
from ..registry import register_method
from ..signals import VISION_TOWER, DecoderShape, Reduction, Signals, Stage
from ..tokens import stable_order
from .decoderwise import RatioConfig, RatioStage

OBJECT_DEPTH = 9 / 24
"""Where the paper finds objects: in the ninth block of CLIP ViT-L's 24."""


@register_method("hiprune")
@dataclass(frozen=True)
class HiPruneConfig(RatioConfig):
    """HiPrune, at the output of the vision tower. The default keeps 192 of 576 tokens, 4 of them anchors.

    Args:
        keep_ratio: fraction of the tokens of every encoded image (of every crop) kept, in (0, 1];
            ``max(1, round(keep_ratio · N))`` stay.
        alpha: share of anchors and their four neighbours in what is kept, 0 to 1.
        object_layer: 0-based block of the vision tower that anchors are chosen by, in front of the one whose output
            the features are. None: at 9/24 of the depth; where most blocks attend within windows, the nearest one that
            attends to the whole image.
    """

    keep_ratio: float = 1 / 3
    alpha: float = 0.1
    object_layer: int | None = None

    @property
    def place(self) -> int:
        return VISION_TOWER

    def validate(self) -> None:
        super().validate()
        self.check(0 <= self.alpha <= 1, "alpha", "0 <= alpha <= 1")
        self.check(self.object_layer is None or self.object_layer >= 0, "object_layer", "a block number >= 0, or None")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        stage = HiPruneStage(
            -1, "vision_tower", self.keep_ratio, self.alpha, self.block(shape), budget="image", **self.shared(shape)
        )
        return (stage,)

    def block(self, shape: DecoderShape) -> int:
        """The block that anchors are chosen by; raises where ``object_layer`` names none that can be."""
        depth, windows = shape.tower.depth, shape.tower.windows
        possible = [block for block in range(depth) if not windows or windows[block] == 0][:-1]
        allowed = "a block of the vision tower that attends to the whole image, in front of the last such one"
        wanted = round(depth * OBJECT_DEPTH) - 1 if self.object_layer is None else self.object_layer
        fits = bool(possible) if self.object_layer is None else wanted in possible
        self.check(fits, "object_layer", f"{allowed}: {', '.join(map(str, possible)) or 'there is none'}")
        return min(possible, key=lambda block: (abs(block - wanted), -block))


@dataclass(frozen=True)
class HiPruneStage(RatioStage):
    alpha: float
    object_layer: int

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"earlier_attention", "received_attention"})

    @property
    def earlier_block(self) -> int:
        return self.object_layer

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        objects, deep = (
            signals.need(name)[..., signals.num_protected :].mean(1)
            for name in ("earlier_attention", "received_attention")
        )
        assert signals.columns is not None, "tokens of a vision tower have a grid"
        return Reduction(hiprune(objects, deep, n_keep, self.alpha, signals.columns), importance=deep)


def hiprune(objects: Tensor, deep: Tensor, n_keep: int, alpha: float, columns: int) -> Tensor:
    """Anchors, their neighbours, and of the others those that the deep block attends to most.

    ``round(k · alpha / 5)`` anchors draw the most attention in the object block. Their neighbours are the tokens one
    place before and behind, and one row above and below: by position, so that a row's end is next to the next row's
    begin, and no further than the first and the last token. Where k is too small for all neighbours, the deep block
    attends to those that stay.

    Args:
        objects: (B, N) attention that the tokens receive in the object block.
        deep: (B, N) the same in the block whose output the features are.
        n_keep: 1 <= k <= N.
        columns: of the grid of the N tokens.

    Returns:
        (B, k) int64 positions, ascending. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    num_tokens = objects.shape[1]
    if not 1 <= n_keep <= num_tokens:
        raise TokenPruneError(f"n_keep={n_keep}: expected 1 <= n_keep <= {num_tokens}, the number of tokens")
    anchors = stable_order(objects, descending=True)[:, : round(n_keep * alpha / 5)]
    buffers = torch.cat([anchors + step for step in (-1, 1, -columns, columns)], 1).clamp(0, num_tokens - 1)
    rank = torch.zeros_like(objects).scatter(1, buffers, 1.0).scatter(1, anchors, 2.0)
    order = stable_order(deep, descending=True)
    order = order.gather(1, stable_order(rank.gather(1, order), descending=True))
    return order[:, :n_keep].sort(dim=1).values
