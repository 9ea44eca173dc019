"""Where the image tokens of a batch are. Read from the device once, at the entrance; later counts follow from sizes.

Positions inside a sequence differ from sample to sample, so tokens are always addressed by index, never by slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedModelError
from ._images import ImageTokens

PADDING, TEXT, IMAGE, DROPPED, NEWLINE = range(5)
"""Kinds of tokens: the last three are parts of an image; IMAGE may be pruned, DROPPED has been, NEWLINE may not."""


@dataclass(frozen=True)
class Group:
    """Images, or samples, of which equally many of equally many image tokens stay; videos of equally many frames.

    Attributes:
        rows: (g, 1) int64, the sample of each member.
        index: (g, N) int64, positions of its image tokens in the sequence.
        n_keep: how many stay.
        frames: of which equally many of these tokens each are; 0: they are of no video, or nobody asks.
    """

    rows: Tensor
    index: Tensor
    n_keep: int
    frames: int


@dataclass(frozen=True)
class Layout:
    """What the tokens of a batch are.

    Attributes:
        images: for each sample, the number of prunable tokens of each of its images.
        frames: for each sample, of how many frames each of its images was at the entrance; 0: it is no video, or nobody
            asks.
        text: for each sample, the number of its other tokens that stay; padding is not counted.
        tail: for each sample, how many tokens stand behind its last image; 0 without an image.
        aligned: every sample ends in the last column.
        is_image: (B, T) bool, prunable tokens.
    """

    images: tuple[tuple[int, ...], ...]
    frames: tuple[tuple[int, ...], ...]
    text: tuple[int, ...]
    tail: tuple[int, ...]
    aligned: bool
    is_image: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, padding left out."""
        return [sum(images) + text for images, text in zip(self.images, self.text, strict=True)]

    def after(self, num_kept: Callable[[int, int, int], int], budget: str) -> Layout:
        """The host's part of the layout when every image or sample has kept ``num_kept(sample, image, count)``."""
        if budget == "image":
            images = tuple(
                tuple(num_kept(row, i, count) for i, count in enumerate(counts))
                for row, counts in enumerate(self.images)
            )
        else:  # of which image the tokens are is then unknown, and counts for nothing any more
            images = tuple((num_kept(row, -1, sum(counts)),) for row, counts in enumerate(self.images))
        return replace(self, images=images, aligned=True)

    def groups(self, num_kept: Callable[[int, int, int], int], budget: str) -> Iterator[Group]:
        """All images (``budget`` "image") or samples ("sample") that have image tokens, by their numbers."""
        by_count: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
        for row, counts in enumerate(self.images):
            start = 0
            for i, count in enumerate(counts if budget == "image" else (sum(counts),)):
                if count:
                    image, frames = (i, self.frames[row][i]) if budget == "image" else (-1, 0)
                    by_count[count, num_kept(row, image, count), frames].append((row, start))
                start += count
        device = self.is_image.device
        # Positions of each sample's image tokens, in order; what is behind them is never looked at.
        positions = self.is_image.byte().argsort(dim=1, descending=True, stable=True)
        for (count, n_keep, frames), members in by_count.items():
            table = torch.tensor(members, device=device)
            rows, starts = table[:, :1], table[:, 1:]
            yield Group(rows, positions[rows, starts + torch.arange(count, device=device)], n_keep, frames)


GONE, PAD = 64, 128
"""Flags beside the number of a visual kind, so that one transfer tells all: dropped in the tower; padding."""


def read_layout(
    marks: Tensor, tell: Callable[[int, tuple[int, ...]], list[ImageTokens]], newline: int
) -> tuple[Tensor, Layout]:
    """(kinds of tokens (B, T) uint8, the layout), from one transfer to the host and one back.

    Args:
        marks: (B, T) uint8, the number of a visual kind for a placeholder, else 0; plus GONE, plus PAD.
        tell: the images of a visual kind, whose placeholders stand in runs of these lengths.
        newline: what newline tokens are: NEWLINE, DROPPED, or IMAGE like any other; between frames they are NEWLINE.

    Raises:
        UnsupportedModelError: the placeholders of an image are not together in one sample.
    """
    host = marks.cpu()  # the one transfer
    batch, length = host.shape
    flat = host.flatten()
    number = flat % GONE
    kinds = torch.where(number > 0, IMAGE, TEXT).byte()
    spans: list[tuple[int, int, int]] = []  # first and last token of each image, counted through all rows; frames
    for n in number.unique().tolist():
        if n:
            places = (number == n).nonzero().flatten()
            told = tell(n, _runs(places, length))
            *begins, _ = bounds = [0, *accumulate(image.length for image in told)]
            newlines = [begin + i for begin, image in zip(begins, told, strict=True) for i in image.newlines]
            frames = [image.frames for image in told]
            kinds[places[newlines]] = NEWLINE if any(frames) else newline
            lasts = places[[end - 1 for end in bounds[1:]]].tolist()
            spans += zip(places[begins].tolist(), lasts, frames, strict=True)
    kinds[flat & GONE > 0] = DROPPED
    kinds[flat & PAD > 0] = PADDING

    spans.sort()
    before = F.pad((kinds == IMAGE).cumsum(0), (1, 0))
    inside = before[[last + 1 for _, last, _ in spans]] - before[[first for first, _, _ in spans]]
    counts: list[list[int]] = [[] for _ in range(batch)]
    of_frames: list[list[int]] = [[] for _ in range(batch)]
    ends = [row * length for row in range(batch)]
    for (first, last, number_of_frames), count in zip(spans, inside.tolist(), strict=True):
        row = first // length
        if last // length != row or first < ends[row]:
            raise UnsupportedModelError(
                "the placeholders of an image are not together in one sample: a pruned model cannot tell whose they "
                "are. Give every image with its own prompt, leave prefill_chunk_size out, or unprune(model)"
            )
        counts[row].append(count)
        of_frames[row].append(number_of_frames)
        ends[row] = last + 1
    rows = kinds.view(batch, length)
    text = ((rows == TEXT) | (rows == NEWLINE)).sum(1).tolist()
    before = F.pad((kinds == TEXT).cumsum(0), (1, 0))
    behind = (before[length::length] - before[ends]).tolist()
    tail = [own if images else 0 for own, images in zip(behind, counts, strict=True)]
    aligned = bool((rows[:, -1] != PADDING).all())
    rows = rows.to(marks.device)
    images, frames_of = tuple(map(tuple, counts)), tuple(map(tuple, of_frames))
    return rows, Layout(images, frames_of, tuple(text), tuple(tail), aligned, rows == IMAGE)


def _runs(places: Tensor, length: int) -> tuple[int, ...]:
    """How many of ``places`` (n,), ascending, stand side by side in the rows of ``length`` tokens that they are in."""
    begins = (places.diff() > 1) | (places[1:] % length == 0)
    bounds = [0, *(begins.nonzero().flatten() + 1).tolist(), len(places)]
    return tuple(end - begin for begin, end in pairwise(bounds))
