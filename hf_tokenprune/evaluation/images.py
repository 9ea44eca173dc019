"""Images with optional labels: the one form in which every source reaches the evaluation loop."""

import io
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from hf_tokenprune.errors import DataError

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


class Sample(TypedDict):
    """One image: RGB, its class index (None without one) and what to call it in a message."""

    image: Image.Image
    label: int | None
    name: str


@dataclass(frozen=True)
class ImageDataset(Dataset[Sample]):
    """``len``, and ``dataset[i]`` as a `Sample`; images are decoded when they are asked for.

    Attributes:
        sources: one an image: a path, a PIL image, an ``(H, W, 3)`` uint8 array, encoded bytes, or a mapping with
            ``"bytes"`` or ``"path"`` as `datasets` stores images.
        names: what to call each image in a message.
        labels: class index or None, one an image.
        classes: names of the classes in the order of their labels, where the source says so. They are found among those
            of the model; one whose classes have no names must have exactly as many, or the names are class numbers.
    """

    sources: Sequence[Any]
    names: Sequence[str]
    labels: Sequence[int | None]
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Decode one image.

        Raises:
            DataError: it is truncated or no image; the message names it.
        """
        name = self.names[index]
        return {"image": _decode(self.sources[index], name), "label": self.labels[index], "name": name}

    def spread(self, limit: int) -> "ImageDataset":
        """At most ``limit`` images, evenly spaced and in order, so that a source sorted by class keeps its variety."""
        n = len(self)
        if limit >= n:
            return self
        chosen = [i * n // limit for i in range(limit)]
        return ImageDataset(
            _Selected(self.sources, chosen),
            [self.names[i] for i in chosen],
            [self.labels[i] for i in chosen],
            self.classes,
        )


class _Selected(Sequence[Any]):
    """Some items of a sequence, fetched when asked for: the sequence may decode images or read from disk."""

    def __init__(self, items: Sequence[Any], chosen: Sequence[int]) -> None:
        self.items = items
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        return self.items[self.chosen[index]]


def to_label(value: Any, where: str) -> int | None:
    """A class index, or None for a missing one (None, an empty string, or -1, which Hub test splits use).

    Raises:
        DataError: not an integer, or below -1; the message has ``where``, the value and what to do.
    """
    if value is None or value == "":
        return None
    try:
        label = int(value) if isinstance(value, str) else operator.index(value)
    except (TypeError, ValueError):
        label = -2
    if label < -1 or isinstance(value, bool):
        raise DataError(
            f"{where}: label {value!r} is not a class index; write 0, 1, 2, ... in the order of the model's classes, "
            "or evaluate without labels (label_column=None, --no-labels)"
        )
    return None if label == -1 else label


def to_labels(values: Sequence[Any], where: Sequence[str]) -> tuple[list[int | None], tuple[str, ...] | None]:
    """Class indices; of names, their places among the sorted names, and these. A name is a text that is no number.

    Raises:
        DataError: see `to_label`; a label that is a name beside others that are none.
    """
    given = [value for value in values if value is not None and value != ""]
    if not given or not all(isinstance(value, str) and not _NUMBER.fullmatch(value.strip()) for value in given):
        return [to_label(value, place) for value, place in zip(values, where, strict=True)], None
    classes = sorted(set(given))
    order = {name: i for i, name in enumerate(classes)}
    return [order.get(value) for value in values], tuple(classes)


def numbers_of(names: Iterable[str]) -> list[int] | None:
    """Class numbers, where all names are different ones (0, 1, 10; 000, 001), else None."""
    names = list(names)
    numbers = [int(name) for name in names if name.isascii() and name.isdecimal()]
    return numbers if len(set(numbers)) == len(names) else None


def in_order(names: Iterable[str]) -> list[str]:
    """Different names, sorted; numbers as such, so that 10 comes behind 2."""
    texts = sorted(set(names))
    numbers = numbers_of(texts)
    return texts if numbers is None else [name for _, name in sorted(zip(numbers, texts, strict=True))]


def check_files(paths: Iterable[Path]) -> None:
    """Find broken image files before any time is spent on a model. Headers, PNG checksums and the ends of JPEGs are
    read, not the pixels: about a millisecond a file. What that cannot see shows when the image is decoded.

    Raises:
        DataError: files that are not images or are cut short; the message names up to five.
    """
    broken = [f"{path} ({reason})" for path in paths if (reason := _broken(path))]
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise DataError(f"cannot read {', '.join(broken[:5])}{more}; delete or replace it")


def _broken(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            is_jpeg = image.format == "JPEG"
            image.verify()
        # verify() checks nothing of a JPEG's data. Most end with their end marker; the rest are decoded to be sure,
        # since a few bytes after the marker do no harm.
        if is_jpeg and not _ends_with(path, b"\xff\xd9"):
            with Image.open(path) as image:
                image.load()
    except Exception as error:  # decoders of damaged bytes raise nearly anything
        return _reason(error)
    return None


def _ends_with(path: Path, marker: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(-len(marker), io.SEEK_END)
        return file.read() == marker


def _decode(source: Any, name: str) -> Image.Image:
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        if isinstance(source, Mapping) and ("bytes" in source or "path" in source):
            source = source.get("bytes") or source["path"]
        if hasattr(source, "__array_interface__"):
            return to_rgb(Image.fromarray(source))
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        if isinstance(source, (str, PathLike, io.BytesIO)):
            with Image.open(source) as image:
                return to_rgb(image)
    except Exception as error:  # decoders of damaged bytes raise nearly anything
        raise DataError(f"cannot read {name} ({_reason(error)}); delete or replace it") from error
    raise DataError(
        f"{name} is of type {type(source).__name__}; expected a PIL image, a path, encoded bytes or an array"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB and turned as its EXIF data say, which is what `datasets` and the pipelines of transformers show a model.

    Other than there, what is transparent is white, in place of the colours that lie under it; and 16 bits of grey are
    scaled to 8, in place of all above 255 being white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") and (levels := np.asarray(image)).max() > 255:
        image = Image.fromarray((levels / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
