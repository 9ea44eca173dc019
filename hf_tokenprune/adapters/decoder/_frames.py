"""Of how many frames a video is: methods that prune videos compare its frames."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedModelError
from ._images import ImageTokens


def in_frames(video: ImageTokens, per_frame: int) -> ImageTokens:
    """The ``video`` as one with so many tokens in a frame, newlines not counted.

    Raises:
        UnsupportedModelError: there would be a part of a frame.
    """
    frames, rest = divmod(video.length - len(video.newlines), per_frame)
    if rest:
        raise UnsupportedModelError(
            f"a video of {video.length} tokens, where a frame has {per_frame}: a pruned model cannot tell its frames. "
            "Use the processor of this model, or a method that does not read frames, such as divprune"
        )
    return replace(video, parts=frames, frames=frames)


def by_positions(videos: list[ImageTokens], here: Tensor, positions: Tensor | None) -> list[ImageTokens]:
    """The ``videos``, of which only features are known, as ones of frames: positions tell where these begin.

    A frame is gone through row by row: its next token is in the same row or a later one, and no time passes.

    Args:
        here: (B, T) bool, their placeholders.
        positions: (A, B, T) int64, of which the last three axes are time, row and column; None: there are none.

    Raises:
        UnsupportedModelError: there are no such positions, or they make no frames of one length.
    """
    if positions is None or positions.dim() != 3 or positions.shape[2] != here.shape[1]:
        raise UnsupportedModelError(UNTIMED)
    placed = positions[-3:].to(here.device).expand(-1, *here.shape)
    host = torch.cat([here[None], placed]).cpu()  # one transfer
    time, row, column = host[1:, host[0] > 0].diff(dim=1)
    begins = F.pad((time != 0) | (row < 0) | (row == 0) & (column <= 0), (1, 0), value=True)
    told = []
    for video, own in zip(videos, begins.split([video.length for video in videos]), strict=True):
        starts = [0, *(own[1:].nonzero().flatten() + 1).tolist()]
        per_frame = (*starts[1:], video.length)[0]
        if starts != list(range(0, video.length, per_frame)):
            raise UnsupportedModelError(UNTIMED)
        told.append(in_frames(video, per_frame))
    return told


UNTIMED = (
    "features of videos without video_grid_thw, and position_ids that do not tell where frames begin: a pruned model "
    "cannot tell them. Pass position_ids with axes for time, row and column, as generate does, or let this model "
    "encode the videos"
)
