"""Where the tokens of an image lie in it: what pictures ask of an adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageView:
    """One way in which a model sees an image: a grid of its tokens. Crops side by side are one grid.

    Attributes:
        tokens: (rows, columns) int64, the number among the image's prunable tokens of the one that lies there; -1: none
            does.
        pixels: (C, H, W) as the model is given it; None: it sees the whole image, scaled.
    """

    tokens: Tensor
    pixels: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.tokens.shape
        return rows, columns


def raster(grid: tuple[int, int], first: int = 0) -> Tensor:
    """Numbers of tokens row by row, from ``first`` on; what would be below 0 is -1."""
    rows, columns = grid
    return torch.arange(first, first + rows * columns).clamp(min=-1).view(rows, columns)


def tiled(tiles: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Numbers of tokens that come tile by tile, each row by row, where ``tiles`` (rows, columns) lie side by side."""
    (rows, columns), (height, width) = tiles, grid
    numbers = torch.arange(rows * columns * height * width).view(rows, columns, height, width)
    return numbers.transpose(1, 2).reshape(rows * height, columns * width)


def arrangement(count: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of ``count`` equal squares that are nearest in shape to an image of ``size`` (height, width)."""
    shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] * size[0] / size[1])))
