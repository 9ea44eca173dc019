"""VidCom²: more tokens of frames that stand out in the video, and in each frame those that stand out in both.

Follows Xuyang Liu, Yiyu Wang, Junpeng Ma, Linfeng Zhang, "Video Compression Commander: Plug-and-Play Inference
Acceleration for Video Large Language Models", EMNLP 2025 (arXiv 2505.14454), and its official code for what the paper
leaves open; the exact total is vLLM's.

Axes: B videos, F frames, P tokens of a frame, N = F · P, D width, k kept.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_method
from ..signals import DecoderShape, Reduction, Signals, Stage
from ..tokens import stable_order
from .videowise import VideoConfig, VideoStage

BANDWIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""Of the Gaussian kernels whose sum is the similarity."""
TEMPERATURE = 0.01
"""Of the softmax that turns the uniqueness of frames into shares."""


@register_method("vidcom2")
@dataclass(frozen=True)
class VidCom2Config(VideoConfig):
    """VidCom² at the entrance of the decoder, on projected features of every video. The default is the paper's 25 %.

    Args:
        keep_ratio: fraction of the tokens of a video that stays, in (0, 1]; ``max(F, floor(keep_ratio · N))`` stay.
    """

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        return (VidCom2Stage(-1, "entrance", self.keep_ratio, budget="image", **self.shared(shape)),)


@dataclass(frozen=True)
class VidCom2Stage(VideoStage):
    def num_kept_of(self, num_prunable: int, frames: int) -> int:
        return min(num_prunable, max(frames, math.floor(num_prunable * self.keep_ratio)))

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        frames = signals.tokens[:, signals.num_protected :].unflatten(1, (signals.frames, -1))
        return Reduction(vidcom2(frames, self.keep_ratio, n_keep))


def vidcom2(features: Tensor, keep_ratio: float, n_keep: int) -> Tensor:
    """Positions among the N tokens of each video, (B, k) int64, ascending. Ties: lower position first.

    Of each frame its share of tokens is chosen, those least similar to the video and to the frame. To reach the exact
    count the most similar of the chosen leave again, or the least similar of the others come back, of any frame.

    Args:
        features: (B, F, P, D); scores are float32 whatever its dtype.
        keep_ratio: what the shares of the frames are made of.
        n_keep: 0 <= k <= N.
    """
    per_frame = features.shape[2]
    of_video, of_frame = similarities(features)
    counts = (shares(of_video, keep_ratio) * per_frame).round().clamp(min=1)  # halves to the even number
    score = of_video + of_frame
    place = stable_order(score.flatten(0, 1)).argsort(1).view_as(score)  # of each token in its frame
    chosen = (place < counts.unsqueeze(-1)).flatten(1)
    order = stable_order(score.flatten(1))
    order = order.gather(1, stable_order(chosen.gather(1, order).byte(), descending=True))  # the chosen first
    return order[:, :n_keep].sort(1).values


def similarities(features: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token to the centre of its video and to that of its frame, (B, F, P) float32 each.

    Only the half of the channels that varies least over the video counts; tokens have length 1 in these.

    Args:
        features: (B, F, P, D). A zero vector stays one.
    """
    width = features.shape[-1]
    tokens = features.float().flatten(1, 2)
    channels = stable_order(tokens.var(1, correction=0))[:, : max(1, width // 2)].sort(1).values
    tokens = tokens.gather(2, channels.unsqueeze(1).expand(-1, tokens.shape[1], -1))
    unit = F.normalize(tokens, dim=-1).unflatten(1, features.shape[1:3])
    return similarity(unit, unit.mean((1, 2), keepdim=True)), similarity(unit, unit.mean(2, keepdim=True))


def similarity(tokens: Tensor, centre: Tensor) -> Tensor:
    """Sum of Gaussian kernels of the distance between ``tokens`` (..., D) and ``centre``: (...)."""
    distance = (tokens - centre).square().sum(-1)
    return torch.stack([(-distance / (2 * bandwidth)).exp() for bandwidth in BANDWIDTHS]).sum(0)


def shares(of_video: Tensor, keep_ratio: float) -> Tensor:
    """The fraction of each frame's tokens that shall stay, (B, F), at most 1: ``keep_ratio`` but for how unique it is.

    Args:
        of_video: (B, F, P), similarities to the video.
    """
    unique = -of_video.mean(2)
    weight = ((unique - unique.amax(1, keepdim=True)) / TEMPERATURE).softmax(1)
    return (keep_ratio * (1 + weight - weight.mean(1, keepdim=True))).clamp(max=1)
