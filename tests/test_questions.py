"""Questions about images: where they may come from, and when an answer is right."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation import QuestionDataset, is_right, load_questions

ROWS: list[dict[str, Any]] = [
    {"question": "what is it ?", "answer": "a cat", "kind": "what"},
    {"question": "how many ?", "answer": ["2", "two"]},
    {"question": "is it red ?", "answer": "no", "kind": "yes or no"},
]
COLOURS = ["red", "lime", "blue"]


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (8, 6), colour)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    lines = []
    for row, colour in zip(ROWS, COLOURS, strict=True):
        picture(colour).save(tmp_path / "images" / f"{colour}.png")
        lines.append(json.dumps({"image": f"images/{colour}.png", **row}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return tmp_path


def check(found: QuestionDataset) -> None:
    assert len(found) == 3
    assert [sample["question"] for sample in map(found.__getitem__, range(3))] == [row["question"] for row in ROWS]
    assert [found[i]["answers"] for i in range(3)] == [("a cat",), ("2", "two"), ("no",)]
    assert [found[i]["kind"] for i in range(3)] == ["what", None, "yes or no"]
    for i, colour in enumerate(COLOURS):
        assert found[i]["image"].getpixel((0, 0)) == picture(colour).getpixel((0, 0))


def test_from_a_folder_a_file_and_a_sequence(folder: Path) -> None:
    check(load_questions(folder))
    check(load_questions(str(folder / "questions.jsonl")))
    check(load_questions([{"image": picture(c), **row} for c, row in zip(COLOURS, ROWS, strict=True)]))


def test_from_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "answer": [row["answer"]] if isinstance(row["answer"], str) else row["answer"]} for row in ROWS]
    table = {
        "image": [picture(colour) for colour in COLOURS],
        **{field: [row.get(field) for row in rows] for field in ("kind", "question", "answer")},
    }
    dataset = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    check(load_questions(dataset))
    check(load_questions(datasets.DatasetDict(test=dataset), split="test"))
    dataset.to_parquet(tmp_path / "test.parquet")
    check(load_questions(str(tmp_path)))
    with pytest.raises(DataError, match="not 'answer'; use rename_column"):
        load_questions(dataset.rename_column("answer", "reply"))


def test_a_limit_is_spread(folder: Path) -> None:
    two = load_questions(folder, limit=2)
    assert list(two.questions) == ["what is it ?", "how many ?"] and len(two.images) == 2
    assert two[1]["image"].getpixel((0, 0)) == (0, 255, 0)
    assert len(load_questions(folder, limit=9)) == 3


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "a ?", "answer": "b"}', "line 4: expected"),
        ("[1]", "line 4: expected"),
        ("{", "line 4: expected"),
        ('{"image": "images/red.png", "question": " ", "answer": "b"}', "question is ' '; expected a text"),
        ('{"image": "images/red.png", "question": "a ?"}', "answer is None; expected a text, or a list"),
        ('{"image": "images/red.png", "question": "a ?", "answer": [2]}', r"answer is \[2\]; expected"),
        ('{"image": "images/red.png", "question": "a ?", "answer": "b", "kind": 1}', "kind is 1; expected a text"),
        ('{"image": "none.png", "question": "a ?", "answer": "b"}', "none.png"),
    ],
)
def test_mistakes_in_a_file_are_named(folder: Path, line: str, words: str) -> None:
    file = folder / "questions.jsonl"
    file.write_text(file.read_text(encoding="utf-8").rstrip() + "\n" + line, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_questions(folder)


def test_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to ask"):
        load_questions(folder, limit=0)
    with pytest.raises(DataError, match="has no splits"):
        load_questions(folder, split="test")
    (folder / "questions.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no"):
        load_questions(folder)


def test_an_answer_is_right_but_for_case_spaces_and_a_full_stop() -> None:
    assert is_right(" Row 1  column 2. ", ("row 1 column 2",)) and is_right("two", ("2", "two"))
    assert not is_right("row 1", ("row 1 column 2",)) and not is_right("", ("no",)) and not is_right("22", ("2", "two"))
