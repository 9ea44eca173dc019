"""Evaluation images from a folder: with a labels.csv, with a subfolder per class, or without labels."""

import csv
from collections.abc import Iterator
from pathlib import Path

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation.images import ImageDataset, in_order, to_labels

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})


def from_csv(folder: Path, label_column: str | None) -> ImageDataset:
    """Images that ``folder/labels.csv`` lists in its column ``file``: relative to the folder or to its ``images/``.

    Raises:
        DataError: the file is not CSV, lacks a column, lists nothing or a file that does not exist, or a label is not
            an integer; the message has the line.
    """
    table = folder / "labels.csv"
    needed = {"file"} if label_column is None else {"file", label_column}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            if lacking := sorted(needed - set(reader.fieldnames or ())):
                raise DataError(
                    f"{table} has no column {', '.join(map(repr, lacking))} (it has: {reader.fieldnames or 'no header'}"
                    "); name it so in the first line, or another one (label_column, --label-column), or None to "
                    "evaluate without labels (--no-labels)"
                )
            rows = [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table} cannot be read as CSV in UTF-8 ({error}); save it again as such") from error
    if not rows:
        raise DataError(f"{table} lists no images; write one line for each under its header")
    where = [f"{table}, line {line}" for line, _ in rows]
    paths = [_find(folder, row["file"], place) for (_, row), place in zip(rows, where, strict=True)]
    values = [None if label_column is None else row[label_column] for _, row in rows]
    labels, classes = to_labels(values, where)
    return ImageDataset(paths, list(map(str, paths)), labels, classes)


def _find(folder: Path, file: str | None, where: str) -> Path:
    for path in (folder / (file or ""), folder / "images" / (file or "")):
        if path.is_file():
            return path
    raise DataError(f"{where}: there is no file {file!r} in {folder} or {folder / 'images'}; add it or delete the line")


def from_folder(folder: Path, label_column: str | None) -> ImageDataset:
    """Images of a folder. A subfolder is a class, labelled by its place in the sorted names (numbers as such); no
    subfolders, no labels.

    Raises:
        DataError: no images, or images both beside and in the subfolders; the message names the folder.
    """
    classes = in_order(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if classes and set(map(str.lower, classes)) <= _SPLITS:
        raise DataError(f"{folder} holds the splits {', '.join(map(repr, classes))}; name one (split, --split)")
    flat = list(_images(folder, "*"))
    labelled = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name, "**/*")]
    if flat and labelled:
        raise DataError(
            f"{folder} holds images both directly and in subfolders ({classes[0]}, ...); "
            "put all of them into one subfolder per class, or write a labels.csv with the columns file,label"
        )
    if not flat and not labelled:
        raise DataError(
            f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); put them there, in one subfolder per "
            "class or beside a labels.csv with the columns file,label"
        )
    paths = flat or [path for path, _ in labelled]
    names = list(map(str, paths))
    if flat or label_column is None:
        return ImageDataset(paths, names, [None] * len(paths))
    return ImageDataset(paths, names, [label for _, label in labelled], tuple(classes))


def _images(folder: Path, pattern: str) -> Iterator[Path]:
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path
