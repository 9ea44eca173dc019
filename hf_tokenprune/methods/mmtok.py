"""MMTok: keep the image tokens that cover both the question and the image.

Follows the equations of Sixun Dong, Juhua Hu, Mian Zhang, Ming Yin, Yanjie Fu, Qi Qian, "MMTok: Multimodal Coverage
Maximization for Efficient Inference of VLMs", ICLR 2026 (arXiv 2508.18264), without its adaptive variants. Written from
the paper.

Axes: B batch, N image tokens, D width, R rows of text, k kept.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage, TextRows
from .decoderwise import RatioConfig, RatioStage
from .similarity import cosines, maximize_coverage, unit

SCALES = (1e-3, 1000)
"""Temperatures and weights outside are mistakes: all that is covered would be rounding, or more than float32 holds."""


@register_method("mmtok")
@dataclass(frozen=True)
class MMTokConfig(RatioConfig):
    """MMTok at the entrance of the decoder. The default is the paper's 64 of 576 tokens.

    Args:
        keep_ratio: fraction of the image tokens kept, in (0, 1]; ``max(1, round(keep_ratio · N))`` stay.
        tau_text: temperature of the softmax that says how well each image token covers a token of text.
        tau_image: the same of image tokens.
        alpha: weight of covering the image, against 1 of covering the text.
        text: what is covered: the "question" behind the last image, or "all" text of the prompt.
        budget: the ratio holds in every "image", or in all images of a "sample" together.
    """

    tau_text: float = 0.02
    tau_image: float = 0.2
    alpha: float = 0.5
    text: Literal["question", "all"] = "question"
    budget: Literal["image", "sample"] = "image"

    def validate(self) -> None:
        super().validate()
        for name in ("tau_text", "tau_image", "alpha"):
            low, high = SCALES
            self.check(low <= getattr(self, name) <= high, name, f"{low} <= {name} <= {high}")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        shared = {"budget": self.budget, **self.shared(shape)}
        stage = MMTokStage(
            -1, "entrance", self.keep_ratio, self.tau_text, self.tau_image, self.alpha, self.text, **shared
        )
        return (stage,)


@dataclass(frozen=True)
class MMTokStage(RatioStage):
    tau_text: float
    tau_image: float
    alpha: float
    text: Literal["question", "all"]

    @property
    def text_rows(self) -> TextRows:
        return TextRows(self.text)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text"})

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        projected = signals.tokens[:, signals.num_protected :]
        text, mask = signals.need("text"), signals.need("text_mask")
        rows = coverage(projected, projected, text, mask, self.tau_text, self.tau_image, self.alpha)
        return Reduction(maximize_coverage(rows, n_keep).sort(dim=1).values)


def coverage(
    visual: Tensor,
    tower: Tensor,
    text: Tensor,
    text_mask: Tensor,
    tau_text: float = 0.02,
    tau_image: float = 0.2,
    alpha: float = 0.5,
) -> Tensor:
    """How well each image token covers each row of text and each image token, for ``maximize_coverage``.

    Args:
        visual: (B, N, D) image tokens in the space of the text.
        tower: (B, N, D') the same tokens in the space in which the image is covered.
        text: (B, R, D); where ``text_mask`` (B, R) is False, it may be anything. A sample without any text has the part
            of the image alone.
        tau_text, tau_image: temperatures of both.
        alpha: weight of the image.

    Returns:
        (B, N, R + N) float32, not negative; rows of text add up to 1 over all tokens, those of the image to ``alpha``.
    """
    unmasked = (unit(text) @ unit(visual).transpose(1, 2) / tau_text).softmax(-1)  # (B, R, N)
    of_text = unmasked.masked_fill(~text_mask.unsqueeze(-1), 0.0)
    count = text_mask.sum(1).clamp_min(1).view(-1, 1, 1)
    of_image = (cosines(tower) / tau_image).softmax(-1)
    rows = torch.cat([of_text / count, of_image * (alpha / visual.shape[1])], dim=1)
    return rows.transpose(1, 2).contiguous()
