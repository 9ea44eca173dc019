"""Mosaics: small pictures in some cells of a faint 3×3 grid over clutter, in images of 128×128 pixels.

The grid has another place and another size in every image, and pictures are of any size and anywhere in their cells, so
that a model has to look. A patch in three has something of a picture, and which pictures matter depends on what
is asked. In the sparse layout there are one or two small ones on black, so that few patches matter, whatever is asked.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from hf_tokenprune.demo.digits import clutter, originals, place
from hf_tokenprune.errors import DataError

CLIP_DIR = Path(__file__).with_name("mini_clip")  # the packaged models, for from_pretrained
LLAVA_DIR = Path(__file__).with_name("mini_llava")

SIDE = 128  # pixels
PATCH = 8  # pixels, of the packaged models
GRID = 3
SPARSE_SIZE = (22.0, 24.0)  # pixels: the smallest digits that the packaged LLaVA reads
EMPTY = -1  # the label of a cell without a picture
TEST_SEED = 0  # of the mosaics that results are reported on; training takes others, and other pictures too

Layout = Literal["crowded", "sparse"]


@dataclass(frozen=True)
class Pictures:
    """What mosaics are made of.

    Attributes:
        pixels: ``(N, 8, 8)`` ink, 0 to 16; or ``(N, H, W, 3)`` photographs, 0 to 255.
        labels: ``(N,)``, from 0.
        names: of the labels, in an order that "larger" or its like goes by.
        plurals: the names for several.
        order: how a question calls what comes later in that order.
    """

    pixels: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    plurals: tuple[str, ...]
    order: str

    def one_of(self, label: int, rng: np.random.Generator) -> np.ndarray:
        """A random picture of a class."""
        return self.pixels[rng.choice(np.flatnonzero(self.labels == label))]


@dataclass(frozen=True)
class Mosaic:
    """An image and what is in it.

    Attributes:
        image: 128×128 RGB.
        cells: labels of the 9 cells in reading order, `EMPTY` where there is none.
        corner: (x, y) of the grid's upper left corner, in pixels.
        cell_side: of a cell, in pixels.
        covered: ``(16, 16)`` cell whose picture is on this patch of 8×8 pixels, else `EMPTY`.
        centres: (x, y) of the picture in every cell that has one, in pixels.
    """

    image: Image.Image
    cells: tuple[int, ...]
    corner: tuple[float, float]
    cell_side: float
    covered: np.ndarray
    centres: dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Mosaics(Sequence[Mosaic]):
    """``n`` mosaics; each is drawn when asked for and depends on ``(seed, index)`` only.

    Attributes:
        pictures: what they are made of.
        n: number of them.
        seed: draws other mosaics.
        single: a single picture in each, instead of as many as the layout has.
        layout: "crowded", three to seven large pictures over clutter, or "sparse", one or two small ones on black.

    Raises:
        DataError: there is no such layout.
    """

    pictures: Pictures
    n: int
    seed: int = TEST_SEED
    single: bool = False
    layout: Layout = "crowded"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise DataError(f"layout is {self.layout!r}; it must be one of {', '.join(get_args(Layout))}.")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Mosaic:  # type: ignore[override]  # no slices
        if not 0 <= index < self.n:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, index))
        cells = cells_of_one(rng) if self.single else cells_of(self.layout, rng)
        return draw(self.pictures, cells, rng, self.layout)

    def __iter__(self) -> Iterator[Mosaic]:
        return (self[index] for index in range(self.n))


def digit_pictures(split: Literal["train", "test"]) -> Pictures:
    """Scikit-learn's digits: 1437 to train, or the 360 that no packaged model has seen.

    Raises:
        DataError: another split, or scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}; it must be 'train' or 'test'.")
    digits, labels, train, test = originals()
    rows = train if split == "train" else test
    names = tuple(str(digit) for digit in range(10))
    return Pictures(digits[rows], labels[rows], names, tuple(f"{name}s" for name in names), "larger")


def cells_of(layout: Layout, rng: np.random.Generator) -> list[int]:
    """As many pictures as the layout has."""
    return (cells_of_few if layout == "sparse" else cells_of_several)(rng)


def cells_of_one(rng: np.random.Generator, num_classes: int = 10) -> list[int]:
    """A random class in a random cell."""
    cells = [EMPTY] * GRID**2
    cells[rng.integers(GRID**2)] = int(rng.integers(num_classes))
    return cells


def cells_of_few(rng: np.random.Generator, num_classes: int = 10) -> list[int]:
    """One picture, or two of different classes."""
    cells = [EMPTY] * GRID**2
    for cell, label in zip(rng.permutation(GRID**2)[: rng.integers(1, 3)], rng.permutation(num_classes), strict=False):
        cells[cell] = int(label)
    return cells


def cells_of_several(rng: np.random.Generator, num_classes: int = 10) -> list[int]:
    """Three to seven pictures: one class up to four times, the others once each."""
    total = int(rng.integers(3, 8))
    classes = rng.permutation(num_classes)
    repeated = int(rng.integers(1, min(4, total - 1) + 1))
    labels = [classes[0]] * repeated + list(classes[1 : total - repeated + 1])
    cells = [EMPTY] * GRID**2
    for cell, label in zip(rng.permutation(GRID**2), labels, strict=False):
        cells[cell] = int(label)
    return cells


def draw(pictures: Pictures, cells: Sequence[int], rng: np.random.Generator, layout: Layout = "crowded") -> Mosaic:
    """Draw a mosaic with these labels in its cells."""
    sparse = layout == "sparse"
    canvas = (np.zeros((SIDE, SIDE)) if sparse else clutter(rng, SIDE))[..., None].repeat(3, axis=-1)
    cell_side = float(rng.uniform(32, SIDE / GRID - 1))
    x0, y0 = (float(value) for value in rng.uniform(0, SIDE - 1 - GRID * cell_side, size=2))
    canvas = _with_grid(canvas, x0, y0, cell_side, brightness=rng.uniform(110, 150))
    covered, centres = np.full((SIDE // PATCH, SIDE // PATCH), EMPTY, dtype=np.int8), {}
    for cell, label in enumerate(cells):
        if label == EMPTY:
            continue
        size = rng.uniform(*SPARSE_SIZE) if sparse else cell_side * rng.uniform(0.65, 0.92)
        row, column = divmod(cell, GRID)
        middle = np.array([x0 + (column + 0.5) * cell_side, y0 + (row + 0.5) * cell_side])
        centre = middle + rng.uniform(-0.5, 0.5, size=2) * (cell_side - size)
        where, alpha, colour = _picture(pictures.one_of(label, rng), size, centre, rng)
        canvas[where] = canvas[where] * (1 - alpha) + colour * alpha
        opacity = np.zeros((SIDE, SIDE))
        opacity[where] = alpha[..., 0]
        covered[opacity.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).max(axis=(1, 3)) > 0.4] = cell
        centres[cell] = (float(centre[0]), float(centre[1]))
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    return Mosaic(image, tuple(cells), (x0, y0), cell_side, covered, centres)


def _with_grid(canvas: np.ndarray, x0: float, y0: float, cell_side: float, brightness: float) -> np.ndarray:
    image = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for i in range(GRID + 1):
        x, y, far = x0 + i * cell_side, y0 + i * cell_side, GRID * cell_side
        pen.line([(x, y0), (x, y0 + far)], fill=(int(brightness),) * 3)
        pen.line([(x0, y), (x0 + far, y)], fill=(int(brightness),) * 3)
    return np.asarray(image).astype(np.float64)


def _picture(
    pixels: np.ndarray, size: float, centre: np.ndarray, rng: np.random.Generator
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Where in the image, opacity (h, w, 1) in 0..1 and colour, 0..255, of a picture of ``size`` pixels."""
    is_ink = pixels.ndim == 2
    side = math.ceil(1.3 * size) if is_ink else round(size)  # room for a digit that is turned
    left, top = np.clip(np.round(centre - side / 2), 0, SIDE - side).astype(int)
    where = np.s_[top : top + side, left : left + side]
    if is_ink:
        ink = place(pixels, size, centre - (left, top), np.deg2rad(rng.uniform(-10, 10)), side)
        return where, ink[..., None], np.array(rng.uniform(170, 255))
    photo = Image.fromarray(pixels.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return where, np.ones((side, side, 1)), np.asarray(photo)
