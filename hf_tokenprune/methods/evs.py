"""EVS: keep what differs from the same place of the frame before.

Efficient Video Sampling, as vLLM, SGLang and TensorRT-LLM serve it: Natan Bagrov, Eugene Khvedchenia, Borys Tymchenko,
Shay Aharon, Lior Kadoch, Tomer Keren, Ofri Masad, Yonatan Geifman, Ran Zilberstein, Tuomas Rintamaki, Matthieu Le,
Andrew Tao, "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference" (arXiv 2510.14624).

Axes: B videos, F frames, P tokens of a frame, N = F · P, D width, k kept.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage
from ..tokens import top_tokens
from .videowise import VideoConfig, VideoStage


@register_method("evs")
@dataclass(frozen=True)
class EvsConfig(VideoConfig):
    """EVS at the entrance of the decoder, on projected features of every video.

    Args:
        keep_ratio: fraction of the tokens of a video that stays, in (0, 1]: 1 − q, where q is the pruning rate of other
            implementations. ``max(P, floor(keep_ratio · N))`` stay, so that the first frame is always whole.
    """

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        return (EvsStage(-1, "entrance", self.keep_ratio, budget="image", **self.shared(shape)),)


@dataclass(frozen=True)
class EvsStage(VideoStage):
    def num_kept_of(self, num_prunable: int, frames: int) -> int:
        return max(num_prunable // frames, math.floor(num_prunable * self.keep_ratio))

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        frames = signals.tokens[:, signals.num_protected :].unflatten(1, (signals.frames, -1))
        return Reduction(top_tokens(dissimilarity(frames).flatten(1), n_keep))


def dissimilarity(features: Tensor) -> Tensor:
    """1 − cosine of every token and the one in the same place of the frame before; infinite in the first frame.

    Args:
        features: (B, F, P, D); the result is float32 whatever its dtype. A zero vector has cosine 0 with all.

    Returns:
        (B, F, P) float32, exactly 0 where a token repeats.
    """
    unit = F.normalize(features.float(), dim=-1)
    square = unit.square().sum(-1)  # 1 but for rounding, by which a token would differ from itself
    length = (square[:, 1:] * square[:, :-1]).sqrt()
    cosine = (unit[:, 1:] * unit[:, :-1]).sum(-1) / torch.where(length > 0, length, 1.0)
    return F.pad(1 - cosine, (0, 0, 1, 0), value=math.inf)
