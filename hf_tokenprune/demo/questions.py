"""What can be asked, and said, about a mosaic: five kinds of questions, and captions with the images they fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_tokenprune.demo.mosaics import EMPTY, GRID, TEST_SEED, Layout, Mosaics, Pictures

KINDS = ("what", "where", "count", "compare", "presence")
KINDS_OF: dict[Layout, tuple[str, ...]] = {"crowded": KINDS, "sparse": ("what", "where", "presence")}
"""What is asked about a layout; of one picture or two there is nothing to count, and often nothing to compare."""
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
NUMBERS = ("no", "one", "two", "three", "four")


class Question(NamedTuple):
    """A question about a mosaic, and what is to be answered word for word."""

    kind: str
    text: str
    answer: str


class Caption(NamedTuple):
    """A text, and whether it is true of a mosaic with these cells."""

    text: str
    fits: Callable[[Sequence[int]], bool]


def ask(kind: str, cells: Sequence[int], pictures: Pictures, rng: np.random.Generator) -> Question:
    """A random question of a kind about a mosaic.

    ``what`` is in a cell, ``where`` is the only one of a class, ``count`` those of a class (0 to 4), ``compare`` two
    cells by the order of their classes ("4 or 7 : second"), ``presence`` of a class.
    """
    names, filled = pictures.names, [cell for cell, label in enumerate(cells) if label != EMPTY]
    times = {label: cells.count(label) for label in range(len(names))}
    if kind == "what":
        cell = rng.choice(filled)
        return Question(kind, f"what is at {_place(cell)} ?", names[cells[cell]])
    if kind == "where":
        label = rng.choice([label for label, n in times.items() if n == 1])
        return Question(kind, f"where is the {names[label]} ?", _place(cells.index(label)))
    if kind == "count":
        number = rng.choice(sorted(set(times.values())))  # first how many, then of what: else most answers would be 0
        label = rng.choice([label for label, n in times.items() if n == number])
        return Question(kind, f"how many {pictures.plurals[label]} are there ?", str(times[label]))
    if kind == "compare":
        first = rng.choice(filled)
        second = rng.choice([cell for cell in filled if cells[cell] != cells[first]])
        seen = f"{names[cells[first]]} or {names[cells[second]]}"  # said first: else a small model reads one of them
        answer = f"{seen} : {'first' if cells[first] > cells[second] else 'second'}"
        return Question(kind, f"which is {pictures.order} : {_place(first)} or {_place(second)} ?", answer)
    if kind == "presence":
        there = bool(rng.integers(2))
        label = rng.choice([label for label, n in times.items() if (n > 0) == there])
        return Question(kind, f"is there a {names[label]} ?", "yes" if there else "no")
    raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")


def standard_questions(
    index: int, cells: Sequence[int], pictures: Pictures, kinds: Sequence[str] = KINDS
) -> list[Question]:
    """One question of each kind about a test mosaic; they depend on its index only."""
    seeds = {kind: (TEST_SEED, index, KINDS.index(kind)) for kind in kinds}
    return [ask(kind, cells, pictures, np.random.default_rng(seed)) for kind, seed in seeds.items()]


@dataclass(frozen=True)
class MosaicQuestions(Sequence[dict[str, Any]]):
    """Every standard question about every mosaic, as ``load_questions`` takes them."""

    mosaics: Mosaics

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is asked about each mosaic."""
        return KINDS_OF[self.mosaics.layout]

    def __len__(self) -> int:
        return len(self.kinds) * len(self.mosaics)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # no slices
        which, kind = divmod(index, len(self.kinds))
        mosaic = self.mosaics[which]
        question = standard_questions(which, mosaic.cells, self.mosaics.pictures, self.kinds)[kind]
        return {"image": mosaic.image, "question": question.text, "answer": question.answer, "kind": question.kind}


def caption(cells: Sequence[int], pictures: Pictures, rng: np.random.Generator) -> Caption:
    """A random caption that fits: of a class alone, of how many, or of where."""
    cell = int(rng.choice([cell for cell, label in enumerate(cells) if label != EMPTY]))
    label, kind = cells[cell], rng.integers(4)
    name, times = pictures.names[label], cells.count(label)
    if kind == 0:
        return Caption(f"the {name}", lambda cells: label in cells)
    if kind == 1:
        return number_captions(label, pictures)[times - 1]
    if kind == 2:
        return Caption(f"a {name} at the {POSITIONS[cell]}", lambda cells: cells[cell] == label)
    return Caption(f"something at the {POSITIONS[cell]}", lambda cells: cells[cell] != EMPTY)


def number_captions(label: int, pictures: Pictures) -> list[Caption]:
    """ "one 3", "two 3s", "three 3s", "four 3s"."""

    def of(times: int) -> Caption:
        noun = pictures.names[label] if times == 1 else pictures.plurals[label]
        return Caption(f"{NUMBERS[times]} {noun}", lambda cells: list(cells).count(label) == times)

    return [of(times) for times in range(1, len(NUMBERS))]


def most_frequent(cells: Sequence[int]) -> int:
    """The label that most of the pictures have; of several, the first."""
    return max((label for label in cells if label != EMPTY), key=list(cells).count)


def words(pictures: Pictures) -> list[str]:
    """All words of questions, answers and captions."""
    texts = [
        *("what is at row column ? where the how many are there which : or a yes no first second", pictures.order),
        *("something in image of", *POSITIONS, *NUMBERS, *map(str, range(10)), *pictures.names, *pictures.plurals),
    ]
    return sorted({word for text in texts for word in text.split()})


def _place(cell: int) -> str:
    row, column = divmod(int(cell), GRID)
    return f"row {row + 1} column {column + 1}"
