"""Scikit-learn's handwritten digits on large, cluttered canvases: an image task where most patches do not matter.

The 8×8 originals fill their frame, so nothing could be pruned. Here ink touches one in seven of the 14×14 patches of
4 pixels; the rest is faint texture and short strokes, as background is in a photograph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from PIL import Image, ImageDraw

from hf_tokenprune.errors import DataError

CANVAS = 56  # pixels a side
LABELS = tuple(str(digit) for digit in range(10))
MODEL_DIR = Path(__file__).with_name("digits_vit")  # the packaged ViT, for from_pretrained

N_TEST = 360
SPLIT_SEED = 0  # never an argument: with another split the packaged model would be tested on digits it has seen


class DigitItem(TypedDict):
    image: Image.Image
    label: int


@dataclass(frozen=True)
class DigitCanvases(Sequence[DigitItem]):
    """Digits with their labels; canvas i is rendered when asked for and depends on ``(seed, source[i])`` only."""

    digits: np.ndarray  # (N, 8, 8), 0..16
    labels: list[int]
    source: list[int]  # rows of sklearn's load_digits, which identify the originals
    seed: int = 0
    spread: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> DigitItem:  # type: ignore[override]  # no slices
        rng = np.random.default_rng((self.seed, self.source[index]))
        return {"image": render(self.digits[index], rng, self.spread), "label": self.labels[index]}

    def __iter__(self) -> Iterator[DigitItem]:
        return (self[index] for index in range(len(self)))


def load_digits_split(split: Literal["train", "test"], seed: int = 0, spread: float = 1.0) -> DigitCanvases:
    """1437 train or 360 test digits, split by original and stratified.

    ``seed`` draws other canvases of the same digits (training takes one seed an epoch); it never moves a digit
    to the other split. ``spread`` is passed to ``render``.
    """
    if split not in ("train", "test"):
        raise DataError(f"split is {split!r}; it must be 'train' or 'test'.")
    digits, labels, train, test = originals()
    rows = train if split == "train" else test
    return DigitCanvases(digits[rows], labels[rows].tolist(), rows.tolist(), seed, spread)


@cache
def originals() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digits (1797, 8, 8), labels (1797,), and the rows of the train and of the test split."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError("The digits come with scikit-learn: pip install hf-tokenprune[demo]") from error
    data = load_digits()
    rows = np.arange(len(data.target))
    train, test = train_test_split(rows, test_size=N_TEST, random_state=SPLIT_SEED, stratify=data.target)
    return data.images, data.target, train, test


def render(digit8x8: np.ndarray, rng: np.random.Generator, spread: float = 1.0) -> Image.Image:
    """A digit (8, 8) with ink 0..16 as a 56×56 RGB image: 24 to 36 pixels tall, turned up to 10°, over clutter.

    ``spread`` is how far from the centre the digit may lie: 0 is centred, 1 anywhere it fits.
    """
    size = rng.uniform(24, 36)
    centre = CANVAS / 2 + spread * rng.uniform(-1, 1, size=2) * (CANVAS - size) / 2
    ink = place(digit8x8, size, centre, angle=np.deg2rad(rng.uniform(-10, 10)), side=CANVAS)
    canvas = clutter(rng, CANVAS) * (1 - ink) + rng.uniform(170, 255) * ink
    return Image.fromarray(canvas.astype(np.uint8)).convert("RGB")


def place(digit8x8: np.ndarray, size: float, centre: np.ndarray, angle: float, side: int) -> np.ndarray:
    """Ink (side, side) in 0..1 of the digit, bicubic, ``size`` pixels tall around ``centre`` (x, y)."""
    padded = np.pad(digit8x8.astype(np.float32) / 16, 2)  # ink that ends at the 8×8 frame fades out
    # PIL asks for the map from canvas to source: turn back and shrink around the two centres.
    cos, sin = np.cos(angle) * 8 / size, np.sin(angle) * 8 / size
    middle = len(padded) / 2
    (x, y) = centre
    affine = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    placed = Image.fromarray(padded).transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return np.asarray(placed).clip(0, 1)


def clutter(rng: np.random.Generator, side: int) -> np.ndarray:
    """Background (side, side) in 0..255: soft blotches, short strokes, grain; too dim and short for a digit."""
    blotches = Image.fromarray(rng.uniform(0, 60, (side // 8, side // 8)).astype(np.float32))
    canvas = blotches.resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(10 * side**2 // CANVAS**2):
        x, y = rng.uniform(0, side, size=2)
        length, angle = rng.uniform(3, 9), rng.uniform(0, np.pi)
        end = (x + length * np.cos(angle), y + length * np.sin(angle))
        draw.line([(x, y), end], fill=rng.uniform(50, 110), width=int(rng.integers(1, 3)))
    return (np.asarray(canvas) + rng.normal(0, 6, (side, side))).clip(0, 255)
