"""Questions about images with their answers, for vision-language models: where they come from, when one is right."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image
from torch.utils.data import Dataset

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation.data import load_dataset, load_images, one_split
from hf_tokenprune.evaluation.images import ImageDataset

FILE = "questions.jsonl"


class AskedSample(TypedDict):
    """A question: RGB image, text, the answers that are right, and what kind of question it is (None: not said)."""

    image: Image.Image
    question: str
    answers: tuple[str, ...]
    kind: str | None


@dataclass(frozen=True)
class QuestionDataset(Dataset[AskedSample]):
    """``len``, and ``dataset[i]`` as an `AskedSample`; images are decoded when they are asked for.

    Attributes:
        images: one a question.
        questions: texts.
        answers: those that are right, at least one a question.
        kinds: of the questions, or None.
    """

    images: ImageDataset
    questions: Sequence[str]
    answers: Sequence[tuple[str, ...]]
    kinds: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> AskedSample:
        """Decode one image.

        Raises:
            DataError: it is truncated or no image; the message names it.
        """
        return {
            "image": self.images[index]["image"],
            "question": self.questions[index],
            "answers": self.answers[index],
            "kind": self.kinds[index],
        }

    def spread(self, limit: int) -> "QuestionDataset":
        """At most ``limit`` questions, evenly spaced and in order."""
        n = len(self)
        if limit >= n:
            return self
        chosen = [i * n // limit for i in range(limit)]
        return QuestionDataset(
            self.images.spread(limit),
            [self.questions[i] for i in chosen],
            [self.answers[i] for i in chosen],
            [self.kinds[i] for i in chosen],
        )


def load_questions(source: Any, limit: int | None = None, split: str | None = None) -> QuestionDataset:
    """Find questions, their images and answers.

    A row has an ``image``, a ``question``, an ``answer`` (a text, or a list of texts that are all right) and, if it
    pleases, a ``kind``, by which results are broken down.

    Args:
        source: one of
            a folder with ``questions.jsonl``, whose lines are such rows with images as paths relative to it; or such a
            file,
            a `datasets` ``Dataset`` or ``DatasetDict``, the path of one (parquet or ``save_to_disk``), or a Hub id,
            with such columns,
            a sequence of such mappings.
        limit: use at most this many, evenly spaced over the source; None for all.
        split: which split of a dataset.

    Raises:
        DataError: nothing there, a column or an answer is missing, an image file is broken; the message names what
            and the next step.
        ImportError: a dataset needs the package `datasets`.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: there would be nothing to ask; give at least 1, or None for all questions")
    if isinstance(source, (str, PathLike)):
        file = Path(source)
        file = file / FILE if (file / FILE).is_file() else file
        if not file.is_file():
            source = load_dataset(str(source), split)
            split = None
        elif split is not None:
            raise DataError(f"split={split!r} was given, but {file} has no splits; leave split out")
        else:
            source = _rows(file)
    if hasattr(source, "cast_column") or isinstance(source, Mapping):
        source = one_split(source, split)
        rows: Sequence[Any] = _table(source)
    else:
        rows = source
    images = load_images(source, label_column=None)
    asked = [_asked(rows[i], images.names[i]) for i in range(len(images))]
    questions = QuestionDataset(images, *map(list, zip(*asked, strict=True)))
    return questions if limit is None else questions.spread(limit)


def is_right(answer: str, answers: Sequence[str]) -> bool:
    """Exact match with one of the answers, but for case, spaces and a full stop at the end."""
    return _normal(answer) in {_normal(right) for right in answers}


def _normal(answer: str) -> str:
    return " ".join(answer.lower().split()).removesuffix(".").strip()


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append({**row, "image": file.parent / row["image"]})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f'{file}, line {number}: expected {{"image": "a.jpg", "question": "...", "answer": "..."}} '
                f"({type(error).__name__}: {error})"
            ) from error
    return rows


def _table(dataset: Any) -> list[dict[str, Any]]:
    have = [column for column in ("question", "answer", "kind") if column in dataset.column_names]
    for column in ("question", "answer"):
        if column not in have:
            columns = ", ".join(map(repr, dataset.column_names))
            raise DataError(
                f"the dataset has the columns {columns}, not {column!r}; use rename_column on one of them, or write a "
                f"{FILE} (a line each) beside the images"
            )
    return [dict(zip(have, values, strict=True)) for values in zip(*(dataset[c][:] for c in have), strict=True)]


def _asked(row: Any, name: str) -> tuple[str, tuple[str, ...], str | None]:
    question, answer, kind = (row.get(field) for field in ("question", "answer", "kind"))
    answers = (answer,) if isinstance(answer, str) else tuple(answer or ())
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{name}: question is {question!r}; expected a text")
    if not answers or not all(isinstance(text, str) and text.strip() for text in answers):
        raise DataError(f"{name}: answer is {answer!r}; expected a text, or a list of texts that are all right")
    if kind is not None and not isinstance(kind, str):
        raise DataError(f"{name}: kind is {kind!r}; expected a text, or leave it out")
    return question, answers, kind
