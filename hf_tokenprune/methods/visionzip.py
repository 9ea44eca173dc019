"""VisionZip: keep the patches that draw the most attention, and merge the others into a few.

Follows Senqiao Yang, Yukang Chen, Zhuotao Tian, Chengyao Wang, Jingyao Li, Bei Yu, Jiaya Jia, "VisionZip: Longer is
Better but Not Necessary in Vision Language Models", CVPR 2025 (arXiv 2412.04467), and its official code for what the
paper leaves open.

Axes: B images, H heads, T tokens of the tower, N of them patches, R patches that are not dominant, D width, d width of
a head.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_method
from ..signals import VISION_TOWER, DecoderShape, Reduction, Signals, Stage
from ..tokens import gather_tokens, top_tokens
from .decoderwise import DecoderConfig


@register_method("visionzip")
@dataclass(frozen=True)
class VisionZipConfig(DecoderConfig):
    """VisionZip, at the output of the vision tower. The default is the paper's 64 = 54 + 10 tokens.

    Args:
        dominant: tokens kept of every encoded image (of every crop) by the attention they draw.
        contextual: tokens that the other patches are merged into.
        keep_cls: CLS itself is one of the dominant tokens, in the place of the first patch that leaves. None: where the
            vision tower has one.
    """

    dominant: int = 54
    contextual: int = 10
    keep_cls: bool | None = None

    one_stage: ClassVar[bool] = True

    def validate(self) -> None:
        self.check(self.dominant >= 1, "dominant", "a count >= 1")
        self.check(self.contextual >= 1, "contextual", "a count >= 1 (to merge nothing, use cls_attention)")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        has_cls = shape.tower.has_cls
        self.check(has_cls or not self.keep_cls, "keep_cls", "None or False: this vision tower has no CLS token")
        keep_cls = has_cls if self.keep_cls is None else self.keep_cls
        stage = VisionZipStage(
            -1, "vision_tower", self.dominant, self.contextual, has_cls, keep_cls, budget="image", **self.shared(shape)
        )
        return (stage,)

    def by_rule(self, strength: float, shape: DecoderShape) -> "VisionZipConfig":
        """What is removed of every encoded image multiplied by ``strength``, dominant to contextual as they are."""
        tokens = shape.tower_tokens
        return self.with_total(round(tokens - (tokens - self.dominant - self.contextual) * strength))

    def search_places(self, shape: DecoderShape) -> tuple[int, ...]:
        return (VISION_TOWER,)

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "VisionZipConfig":
        return self.with_total(min(counts[VISION_TOWER] // shape.tower_images, shape.tower_tokens))

    def fewest(self, num_tokens: int) -> int:
        return 2

    def with_total(self, total: int) -> "VisionZipConfig":
        """So many tokens of every encoded image, at least 2, dominant to contextual as they are."""
        total = max(total, 2)
        share = self.contextual / (self.dominant + self.contextual)
        contextual = min(max(round(total * share), 1), total - 1)
        return dataclasses.replace(self, dominant=total - contextual, contextual=contextual)


@dataclass(frozen=True)
class VisionZipStage(Stage):
    dominant: int
    contextual: int
    has_cls: bool
    keep_cls: bool

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.scores, "keys"})

    @property
    def scores(self) -> str:
        """Whose attention counts: that of CLS, or of all tokens where there is none."""
        return "cls_attention" if self.has_cls else "received_attention"

    def num_kept(self, num_prunable: int) -> int:
        return min(self.dominant + self.contextual, num_prunable)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        num_protected = signals.num_protected
        patches = signals.tokens[:, num_protected:]
        scores = signals.need(self.scores)[..., num_protected:].sum(1)
        if n_keep == patches.shape[1]:
            return Reduction(top_tokens(scores, n_keep), importance=scores)
        metric = signals.need("keys").float().mean(1)[:, num_protected:]

        dominant = top_tokens(scores, self.dominant - self.keep_cls)
        others = complement(dominant, patches.shape[1])
        targets = uniform_targets(others.shape[1], self.contextual)
        merged = merge(gather_tokens(patches, others), gather_tokens(metric, others), targets)
        slots = others[:, targets]
        if self.keep_cls:
            first_merged = 1 if targets.step > 1 else self.contextual  # the first of the others that is no target
            slots = torch.cat([slots, others[:, first_merged, None]], 1)
            merged = torch.cat([merged, signals.tokens[:, :1]], 1)
        states = patches.scatter(1, slots.unsqueeze(-1).expand_as(merged), merged)
        keep = torch.cat([dominant, slots], 1).sort(1).values
        return Reduction(keep, tokens=gather_tokens(states, keep), importance=scores)


def complement(chosen: Tensor, num_tokens: int) -> Tensor:
    """(B, R) ascending: the positions of ``num_tokens`` that ``chosen`` (B, n) does not name."""
    rest = torch.ones(chosen.shape[0], num_tokens, device=chosen.device).scatter(1, chosen, 0.0)
    return top_tokens(rest, num_tokens - chosen.shape[1])


def uniform_targets(num_tokens: int, count: int) -> slice:
    """Which of ``num_tokens`` patches the others are merged into: ``count`` of them at even distances."""
    step = num_tokens // count
    return slice(0, count * step, step)


def merge(states: Tensor, metric: Tensor, targets: slice) -> Tensor:
    """Contextual tokens: every patch joins the target with the most similar metric (cosine).

    Args:
        states: (B, R, D) of the patches that are not dominant.
        metric: (B, R, d) float32.
        targets: which of the R.

    Returns:
        (B, contextual, D): each target plus the mean of those that joined it, as the official code does; a target that
        nobody joined stays as it is.
    """
    unit = F.normalize(metric, dim=-1)
    joined = (unit @ unit[:, targets].transpose(1, 2)).argmax(-1, keepdim=True)
    weight = metric.new_zeros(*metric.shape[:2], len(range(*targets.indices(metric.shape[1]))))
    weight.scatter_(2, joined, 1.0)
    weight[:, targets] = 0  # a target is not a member of its own group
    mean = (weight.transpose(1, 2) @ states.float()) / weight.sum(1).clamp_min(1).unsqueeze(-1)
    return (states[:, targets].float() + mean).to(states.dtype)
