"""The tokens of an image drawn over it: who stays, who was merged with whom, who left, and how important each was.

Axes: H, W pixels, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import TokenPruneError
from ..evaluation.optional import require
from .tracing import ImageGrid, Step

PAPER, STRIPE, EDGE = (238, 236, 246), (176, 168, 204), (255, 255, 255)
"""Colours of what was removed: paper, with stripes that no photograph has; and of the edges of merged regions."""
KEPT, MERGED, REMOVED = "kept", "merged: one colour, one token", "removed"
AVERAGED = "removed, or averaged into others"
"""What a legend calls them."""
GAP = 6


def draw_tokens(step: Step, width: int = 224) -> Image.Image:
    """The image behind a pruning point: tokens that stay as they are, those of one merged token in one colour, the
    mean of their pixels, within edges (they need not touch), and those that were removed as striped paper.

    Args:
        width: of the picture in pixels; where the image is seen in several ways, these lie side by side.
    """
    sizes = torch.bincount(step.owner[step.owner >= 0], minlength=len(step.owner))

    def draw(grid: ImageGrid, size: tuple[int, int]) -> Image.Image:
        owner = torch.where(grid.tokens >= 0, step.owner[grid.tokens.clamp(min=0)], -1)
        label = _spread(owner, size).numpy()
        pixels = np.array(grid.picture.resize(size, Image.Resampling.BICUBIC))
        merged = (label >= 0) & (sizes.numpy()[label] > 1)
        number = np.bincount(label[merged], minlength=len(sizes)).clip(min=1)
        for channel in range(3):
            total = np.bincount(label[merged], pixels[..., channel][merged], minlength=len(sizes))
            pixels[..., channel][merged] = (total / number)[label[merged]]
        _edge(pixels, label, merged)
        _stripe(pixels, label < 0)
        return Image.fromarray(pixels)

    return _side_by_side(step.grids, draw, width)


def draw_importance(step: Step, width: int = 224) -> Image.Image:
    """How important the method found each token that came to a pruning point, from dark (least) to bright (most) by
    rank, over the image in grey; striped paper where none came.

    Raises:
        TokenPruneError: the step has no importance.
        ImportError: matplotlib is not installed.
    """
    if step.importance is None:
        raise TokenPruneError(f"{step.name}: the method ranks no tokens there; draw_tokens shows which ones stay")
    colours = require("matplotlib", "plot").colormaps["inferno"]
    known = ~step.importance.isnan()
    rank = torch.full_like(step.importance, torch.nan)
    rank[known] = step.importance[known].argsort().argsort() / max(int(known.sum()) - 1, 1)

    def draw(grid: ImageGrid, size: tuple[int, int]) -> Image.Image:
        level = _spread(torch.where(grid.tokens >= 0, rank[grid.tokens.clamp(min=0)], torch.nan), size).numpy()
        grey = np.array(grid.picture.resize(size, Image.Resampling.BICUBIC).convert("L"))[..., None]
        pixels = (0.3 * grey + 0.7 * 255 * colours(np.nan_to_num(level))[..., :3]).astype(np.uint8)
        _stripe(pixels, np.isnan(level))
        return Image.fromarray(pixels)

    return _side_by_side(step.grids, draw, width)


def kinds_in(step: Step) -> list[str]:
    """What a legend of ``draw_tokens`` has to explain."""
    sizes = torch.bincount(step.owner[step.owner >= 0])
    there = {KEPT: bool((sizes == 1).any()), MERGED: bool((sizes > 1).any())}
    there[AVERAGED if step.averages else REMOVED] = bool((step.owner < 0).any())
    return [kind for kind, is_there in there.items() if is_there]


def _side_by_side(
    grids: Sequence[ImageGrid], draw: Callable[[ImageGrid, tuple[int, int]], Image.Image], width: int
) -> Image.Image:
    """The grids of an image in rows, as many as columns or one less; two lie beside each other."""
    columns = math.ceil(math.sqrt(len(grids)))
    rows = math.ceil(len(grids) / columns)
    across = (width - GAP * (columns - 1)) // columns
    down = round(across * grids[0].picture.height / grids[0].picture.width)
    sheet = Image.new("RGB", (width, rows * (down + GAP) - GAP), "white")
    for i, grid in enumerate(grids):
        row, column = divmod(i, columns)
        sheet.paste(draw(grid, (across, down)), (column * (across + GAP), row * (down + GAP)))
    return sheet


def _spread(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(rows, columns) as (H, W): of each pixel the value of the cell it lies in; ``size`` is (W, H)."""
    rows, columns = (torch.arange(n) * cells // n for n, cells in zip(size[::-1], values.shape, strict=True))
    return values[rows][:, columns]


def _edge(pixels: np.ndarray, label: np.ndarray, merged: np.ndarray) -> None:
    """Draw edges between tokens, of which at least one is merged."""
    for axis in (0, 1):
        differs = np.diff(label, axis=axis) != 0
        here, there = (np.delete(merged, i, axis) for i in (-1, 0))
        edge = np.zeros_like(merged)
        where = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
        edge[where] = differs & (here | there)
        pixels[edge] = EDGE


def _stripe(pixels: np.ndarray, left: np.ndarray) -> None:
    """Put striped paper where something was removed."""
    rows, columns = np.indices(left.shape)
    pixels[left] = PAPER
    pixels[left & ((rows + columns) % 8 < 2)] = STRIPE
