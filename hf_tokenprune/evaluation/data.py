"""Where evaluation images come from: a folder, a `datasets` dataset (object, Hub id or path), or a sequence."""

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation.folders import from_csv, from_folder
from hf_tokenprune.evaluation.images import ImageDataset, check_files, to_labels
from hf_tokenprune.evaluation.optional import require

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_DATASET_FILES = ("*.parquet", "data/*.parquet", "*.arrow", "dataset_dict.json")


def load_images(
    source: Any,
    limit: int | None = None,
    split: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
) -> ImageDataset:
    """Find images and their labels.

    Args:
        source: one of
            a folder with ``labels.csv`` (columns ``file`` and ``label``; files relative to it or to its ``images/``),
            a folder with a subfolder per class (sorted names are labels 0, 1, ...; where a model is known, numbers are
            its class numbers), or with images only (no labels),
            a `datasets` ``Dataset`` or ``DatasetDict``, the path of one (parquet or ``save_to_disk``), or a Hub id,
            a sequence of mappings such as ``{"image": PIL image, "label": 3}``.
        limit: use at most this many, evenly spaced over the source; None for all.
        split: which split of a dataset, or which subfolder (``val``) of a folder.
        image_column: column or key of the images.
        label_column: column or key of the labels; None evaluates without. A label of None or -1 is a missing one. Texts
            that are no numbers are names of classes, which are found among those of the model.

    Raises:
        DataError: nothing there, a column is missing, a label is not an integer, an image file is broken (files are
            checked up front; anything else when it is decoded). The message names what and the next step.
        ImportError: a dataset needs the package `datasets`.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: there would be nothing to evaluate; give at least 1, or None for all images")
    if isinstance(source, (str, PathLike)):
        images = _from_path(source, split, image_column, label_column)
    elif isinstance(source, Mapping) or hasattr(source, "cast_column"):
        images = _from_dataset(source, split, image_column, label_column)
    else:
        images = _from_sequence(source, split, image_column, label_column)
    if len(images) == 0:
        raise DataError("the source holds no images; give one that has some")
    if limit is not None:
        images = images.spread(limit)
    if isinstance(images.sources[0], Path):
        check_files(path for path in images.sources if isinstance(path, Path))
    return images


def _from_path(
    source: str | PathLike[str], split: str | None, image_column: str, label_column: str | None
) -> ImageDataset:
    folder = Path(source)
    if folder.is_dir():
        if split is not None and (folder / split).is_dir():
            folder, split = folder / split, None
        if split is None and (folder / "labels.csv").is_file():
            _without_effect(folder, image_column=(image_column, "image"))
            return from_csv(folder, label_column)
        if any(next(folder.glob(pattern), None) for pattern in _DATASET_FILES):
            return _from_dataset(load_dataset(str(folder), split), None, image_column, label_column)
        if split is not None:
            raise DataError(f"{folder} has no subfolder {split!r} for split={split!r}; leave split out, or name one")
        _without_effect(folder, image_column=(image_column, "image"), label_column=(label_column, "label"))
        return from_folder(folder, label_column)
    if folder.suffix == ".parquet" and folder.is_file():
        dataset = load_dataset("parquet", split or "train", data_files=str(folder))
        return _from_dataset(dataset, None, image_column, label_column)
    if folder.exists():
        raise DataError(f"{folder} is a file; give the folder it is in")
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _from_dataset(load_dataset(source, split), None, image_column, label_column)
    raise DataError(f"the folder {folder} does not exist; check the path (working directory: {Path.cwd()})")


def _without_effect(folder: Path, **columns: tuple[str | None, str]) -> None:
    """Raise DataError for a column that is named (its name, the default), where a folder has none."""
    for argument, (name, default) in columns.items():
        if name not in (None, default):
            raise DataError(f"{argument}={name!r} has no effect on the files in {folder}; leave it out")


def load_dataset(path: str, split: str | None, **options: Any) -> Any:
    """One split of a `datasets` dataset, from a folder or the Hub; ``options`` are those of ``datasets.load_dataset``.

    Raises:
        DataError: no such dataset or split. ImportError: the package `datasets` is not installed.
    """
    datasets = require("datasets")
    try:
        if any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json")):  # save_to_disk wrote it
            return one_split(datasets.load_from_disk(path), split)
        return one_split(datasets.load_dataset(path, split=split, **options), None)
    except DataError:
        raise
    except Exception as error:  # no network, no such dataset, no such split, unknown files: each has its own type
        where = (
            f"the dataset in {path}" if Path(path).is_dir() else f"{path!r}, neither a folder here nor a Hub dataset,"
        )
        raise DataError(
            f"{where} cannot be loaded ({type(error).__name__}: {error}); check its name and split"
        ) from error


def one_split(dataset: Any, split: str | None) -> Any:
    """The split of a ``DatasetDict`` that is named, or its only one; a ``Dataset`` is one already.

    Raises:
        DataError: no such split, or several and none named.
    """
    if not isinstance(dataset, Mapping):
        if split is not None:
            raise DataError(f"split={split!r} was given, but the dataset is a single split already; leave split out")
        return dataset
    if split is None and len(dataset) == 1:
        return next(iter(dataset.values()))
    if split not in dataset:
        raise DataError(
            f"split={split!r}: the dataset has the splits {', '.join(map(repr, dataset))}; name one of them"
        )
    return dataset[split]


def _from_dataset(source: Any, split: str | None, image_column: str, label_column: str | None) -> ImageDataset:
    dataset = one_split(source, split)
    if not hasattr(dataset, "__len__"):
        raise DataError("a streaming dataset has no length; load it with streaming=False")
    for column, argument in ((image_column, "image_column"), (label_column, "label_column")):
        if column is not None and column not in dataset.column_names:
            have = ", ".join(map(repr, dataset.column_names))
            without = ", or None to evaluate without labels (--no-labels)" if column == label_column else ""
            option = f"--{argument.replace('_', '-')}"
            raise DataError(
                f"{argument}={column!r}: the dataset has the columns {have}; name one of them ({option}){without}"
            )
    dataset = dataset.with_format(None)
    classes: Sequence[str] | None = None
    labels: list[int | None] = [None] * len(dataset)
    if label_column is not None:
        classes = getattr(dataset.features[label_column], "names", None)
        labels, named = to_labels(dataset[label_column][:], [f"row {i}" for i in range(len(dataset))])
        classes = classes or named
    dataset = dataset.select_columns([image_column])
    encoded = require("datasets").Image(decode=False)
    if isinstance(dataset.features[image_column], type(encoded)):  # decoding is ours, so that an error names the row
        dataset = dataset.cast_column(image_column, encoded)
    names = [f"row {i}" for i in range(len(dataset))]
    return ImageDataset(_Column(dataset, image_column), names, labels, tuple(classes) if classes else None)


def _from_sequence(source: Any, split: str | None, image_column: str, label_column: str | None) -> ImageDataset:
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise DataError(
            f"cannot read images from {type(source).__name__}; give a folder, a dataset, or a sequence of mappings "
            f"such as {{{image_column!r}: image, {label_column!r}: 3}}"
        )
    if split is not None:
        raise DataError(f"split={split!r} was given, but {type(source).__name__} has no splits; leave split out")
    values = []
    for i in range(len(source)):
        item = source[i]
        needed = [column for column in (image_column, label_column) if column is not None]
        if not isinstance(item, Mapping) or any(column not in item for column in needed):
            raise DataError(
                f"item {i} is {_describe(item)}; expected a mapping with {image_column!r}"
                + (f" and {label_column!r} (None to evaluate without labels)" if label_column is not None else "")
            )
        values.append(None if label_column is None else item[label_column])
    names = [f"item {i}" for i in range(len(source))]
    labels, classes = to_labels(values, names)
    return ImageDataset(_Column(source, image_column), names, labels, classes)


def _describe(item: Any) -> str:
    return (
        f"a mapping with {', '.join(map(repr, item))}"
        if isinstance(item, Mapping)
        else f"of type {type(item).__name__}"
    )


class _Column(Sequence[Any]):
    """One column of a sequence of mappings, a row at a time."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows = rows
        self.column = column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index][self.column]
