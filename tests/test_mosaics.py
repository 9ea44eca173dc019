"""Mosaics, the questions about them and the captions: what is drawn is what is asked about."""

from collections import Counter
from typing import get_args

import numpy as np
import pytest

pytest.importorskip("sklearn")

from hf_tokenprune.demo.digits import load_digits_split
from hf_tokenprune.demo.mosaics import (
    EMPTY,
    GRID,
    PATCH,
    SIDE,
    SPARSE_SIZE,
    TEST_SEED,
    Layout,
    Mosaics,
    Pictures,
    cells_of_several,
    digit_pictures,
)
from hf_tokenprune.demo.questions import (
    KINDS,
    NUMBERS,
    POSITIONS,
    MosaicQuestions,
    ask,
    caption,
    standard_questions,
    words,
)
from hf_tokenprune.errors import DataError

TEST = digit_pictures("test")


def photographs() -> Pictures:
    pixels = np.zeros((10, 32, 32, 3), np.uint8)
    pixels[:, :, :] = 255
    names = tuple("abcdefghij")
    return Pictures(pixels, np.arange(10), names, tuple(f"{name}s" for name in names), "later in the alphabet")


def test_test_digits_are_those_that_no_packaged_model_has_seen() -> None:
    train = digit_pictures("train")
    assert (len(train.labels), len(TEST.labels)) == (1437, 360)
    assert TEST.labels.tolist() == load_digits_split("test").labels
    seen = {picture.tobytes() for picture in train.pixels}
    assert not any(picture.tobytes() in seen for picture in TEST.pixels)
    with pytest.raises(DataError, match="'train' or 'test'"):
        digit_pictures("validation")  # type: ignore[arg-type]


def test_mosaics_depend_on_seed_and_index_only() -> None:
    one, again, other = Mosaics(TEST, 5), Mosaics(TEST, 3), Mosaics(TEST, 5, seed=TEST_SEED + 1)
    assert one[2].image.tobytes() == again[2].image.tobytes() and one[2].cells == again[2].cells
    assert one[2].image.tobytes() != other[2].image.tobytes()
    assert len(list(one)) == 5
    with pytest.raises(IndexError):
        one[5]
    with pytest.raises(DataError, match="'empty'; it must be one of crowded, sparse"):
        Mosaics(TEST, 5, layout="empty")  # type: ignore[arg-type]


@pytest.mark.parametrize("pictures", [TEST, photographs()], ids=["digits", "photographs"])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("layout", get_args(Layout))
def test_pictures_are_where_cells_say(pictures: Pictures, single: bool, layout: Layout) -> None:
    most = {"crowded": (3, 7), "sparse": (1, 2)}[layout]
    for mosaic in Mosaics(pictures, 20, single=single, layout=layout):
        assert mosaic.image.size == (SIDE, SIDE) and mosaic.image.mode == "RGB"
        bright = np.asarray(mosaic.image)[..., 0] > (165 if layout == "crowded" else 150)  # clutter and grid are dimmer
        filled = {cell for cell, label in enumerate(mosaic.cells) if label != EMPTY}
        assert set(mosaic.centres) == filled == set(np.unique(mosaic.covered)) - {EMPTY}
        assert len(filled) == 1 if single else most[0] <= len(filled) <= most[1]
        for cell in range(GRID**2):
            row, column = divmod(cell, GRID)
            left, top = (
                round(start + i * mosaic.cell_side) for start, i in zip(mosaic.corner, (column, row), strict=True)
            )
            inside = bright[top + 1 : top + int(mosaic.cell_side), left + 1 : left + int(mosaic.cell_side)]
            assert (inside.mean() > 0.02) == (cell in filled)
            if cell in filled:
                x, y = mosaic.centres[cell]
                assert left < x < left + mosaic.cell_side and top < y < top + mosaic.cell_side


def test_most_patches_have_no_picture() -> None:
    assert 0.15 < np.mean([(mosaic.covered != EMPTY).mean() for mosaic in Mosaics(TEST, 100)]) < 0.35


def test_sparse_mosaics_are_black_but_for_a_grid_and_a_few_patches() -> None:
    for mosaic in Mosaics(TEST, 50, layout="sparse"):
        labels = [label for label in mosaic.cells if label != EMPTY]
        assert len(set(labels)) == len(labels) <= 2
        covered = mosaic.covered != EMPTY
        assert 0 < covered.sum() <= len(labels) * (SPARSE_SIZE[1] // PATCH + 2) ** 2
        pixels = np.asarray(mosaic.image)[..., 0]
        tiles = pixels.reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH).swapaxes(1, 2).reshape(*covered.shape, -1)
        elsewhere = tiles[~covered]
        assert (elsewhere == 0).mean() > 0.9 and (elsewhere.max(1) == 0).mean() > 0.4, "lines are a pixel wide"


def answer(text: str, cells: tuple[int, ...]) -> str:
    """By reading the question word by word."""
    grid, said = np.array(cells).reshape(GRID, GRID), text.split()
    places = [(int(said[i + 1]) - 1, int(said[i + 3]) - 1) for i, word in enumerate(said) if word == "row"]
    if text.startswith("what is at"):
        return str(grid[places[0]])
    if text.startswith("where"):
        ((row, column),) = np.argwhere(grid == int(said[3]))
        return f"row {row + 1} column {column + 1}"
    if text.startswith("how many"):
        return str((grid == int(said[2][:-1])).sum())
    if text.startswith("which is larger"):
        first, second = grid[places[0]], grid[places[1]]
        return f"{first} or {second} : {'first' if first > second else 'second'}"
    assert text.startswith("is there a")
    return "yes" if (grid == int(said[3])).any() else "no"


def test_answers_are_right_and_no_answer_is_too_frequent() -> None:
    rng, answers = np.random.default_rng(0), {kind: Counter[str]() for kind in KINDS}
    for _ in range(400):
        cells = cells_of_several(rng)
        for kind in KINDS:
            question = ask(kind, cells, TEST, rng)
            assert question.kind == kind and question.answer == answer(question.text, tuple(cells))
            assert set(f"{question.text} {question.answer}".split()) <= set(words(TEST))
            answers[kind][question.answer] += 1
    most = {kind: count.most_common(1)[0][1] / 400 for kind, count in answers.items()}
    assert most["what"] < 0.2 and most["where"] < 0.2 and most["count"] < 0.5
    assert most["compare"] < 0.05 and most["presence"] < 0.6
    with pytest.raises(ValueError, match="'why'"):
        ask("why", cells, TEST, rng)


def test_standard_questions_as_rows() -> None:
    mosaics = Mosaics(TEST, 4)
    rows = list(MosaicQuestions(mosaics))
    assert len(rows) == 4 * len(KINDS) and [row["kind"] for row in rows[:5]] == list(KINDS)
    assert [row["question"] for row in rows[5:10]] == [q.text for q in standard_questions(1, mosaics[1].cells, TEST)]
    for i, row in enumerate(rows):
        assert row["answer"] == answer(row["question"], mosaics[i // len(KINDS)].cells)
        assert row["image"].tobytes() == mosaics[i // len(KINDS)].image.tobytes()


def test_sparse_questions_are_about_what_there_is() -> None:
    mosaics = Mosaics(TEST, 30, layout="sparse")
    rows = list(MosaicQuestions(mosaics))
    kinds = MosaicQuestions(mosaics).kinds
    assert set(kinds) < set(KINDS) and [row["kind"] for row in rows] == list(kinds) * 30
    for i, row in enumerate(rows):
        mosaic = mosaics[i // len(kinds)]
        assert row["answer"] == answer(row["question"], mosaic.cells) != str(EMPTY)
        assert row["image"].tobytes() == mosaic.image.tobytes()


def holds(text: str, cells: list[int]) -> bool:
    """Whether a caption is true, by reading it."""
    first, rest = text.split(" ", 1)
    if first == "the":
        return int(rest) in cells
    if first in NUMBERS:
        return cells.count(int(rest.removesuffix("s"))) == NUMBERS.index(first)
    what, place = text.split(" at the ")
    label = cells[POSITIONS.index(place)]
    return label != EMPTY if what == "something" else label == int(what.split()[1])


def test_captions_fit_their_mosaic_and_say_which_others_they_fit() -> None:
    rng = np.random.default_rng(0)
    boards = [cells_of_several(rng) for _ in range(100)]
    captions = [caption(cells, TEST, rng) for cells in boards]
    assert all(text.fits(cells) for text, cells in zip(captions, boards, strict=True))
    for text in captions:
        assert [text.fits(cells) for cells in boards] == [holds(text.text, cells) for cells in boards]
        assert set(text.text.split()) <= set(words(TEST))
