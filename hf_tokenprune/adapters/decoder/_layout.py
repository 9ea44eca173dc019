"""Where the image tokens of a batch are. Read from the device once, at the entrance; later counts follow from sizes.

Positions inside a sequence differ from sample to sample, so tokens are always addressed by index, never by slice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

PADDING, TEXT, IMAGE, DROPPED, NEWLINE = range(5)
"""Kinds of tokens: the last three are parts of an image; IMAGE may be pruned, DROPPED has been, NEWLINE may not."""


@dataclass(frozen=True)
class Group:
    """Images, or samples, of which equally many of equally many image tokens stay.

    Attributes:
        rows: (g, 1) int64, the sample of each member.
        index: (g, N) int64, positions of its image tokens in the sequence.
        n_keep: how many stay.
    """

    rows: Tensor
    index: Tensor
    n_keep: int


@dataclass(frozen=True)
class Layout:
    """What the tokens of a batch are.

    Attributes:
        images: for each sample, the number of prunable tokens of each of its images.
        text: for each sample, the number of its other tokens that stay; padding is not counted.
        tail: for each sample, how many tokens stand behind its last image; 0 without an image.
        aligned: every sample ends in the last column.
        is_image: (B, T) bool, prunable tokens.
    """

    images: tuple[tuple[int, ...], ...]
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
        by_count: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for row, counts in enumerate(self.images):
            start = 0
            for i, count in enumerate(counts if budget == "image" else (sum(counts),)):
                if count:
                    key = count, num_kept(row, i if budget == "image" else -1, count)
                    by_count[key].append((row, start))
                start += count
        device = self.is_image.device
        # Positions of each sample's image tokens, in order; what is behind them is never looked at.
        positions = self.is_image.byte().argsort(dim=1, descending=True, stable=True)
        for (count, n_keep), members in by_count.items():
            table = torch.tensor(members, device=device)
            rows, starts = table[:, :1], table[:, 1:]
            yield Group(rows, positions[rows, starts + torch.arange(count, device=device)], n_keep)


def read_layout(kinds: Tensor, image_length: int | None) -> Layout:
    """The layout of a batch, from one transfer to the host.

    Args:
        kinds: (B, T) uint8 of PADDING, TEXT, IMAGE, DROPPED, NEWLINE.
        image_length: tokens of every image, where that is fixed: images that touch are told apart by it. None: what
            stands between two other tokens is one image.
    """
    images, text, tail, aligned = [], [], [], True
    for row in kinds.tolist():  # the one transfer
        counts: list[int] = []
        behind = 0
        for in_image, run in groupby(row, key=lambda kind: kind >= IMAGE):
            tokens = list(run)
            if in_image:
                length = image_length if image_length and len(tokens) % image_length == 0 else len(tokens)
                counts += [tokens[i : i + length].count(IMAGE) for i in range(0, len(tokens), length)]
                behind = 0
            else:
                behind += tokens.count(TEXT)
        images.append(tuple(counts))
        text.append(row.count(TEXT) + row.count(NEWLINE))
        tail.append(behind if counts else 0)
        aligned &= row[-1] != PADDING
    return Layout(tuple(images), tuple(text), tuple(tail), aligned, kinds == IMAGE)
