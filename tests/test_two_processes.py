"""`accelerate launch` with two processes gives the numbers of one: images, zero-shot and questions, with an uneven last
batch and where there is less than one sample for each."""

import json
from pathlib import Path

import pytest
from PIL import Image

from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.demo.mosaics import LLAVA_DIR, Mosaics, digit_pictures
from hf_tokenprune.demo.questions import MosaicQuestions

from .clip_checkpoint import save_tiny_clip
from .two_processes import Numbers, alone_and_together

pytest.importorskip("accelerate")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
pytestmark = pytest.mark.slow

SPEEDS = ("images_per_second", "questions_per_second", "speed_up", "speed_up_quartiles")
SAMPLES = {"20 digits": 20, "1 digit": 1, "zero-shot": 7, "10 questions": 10, "1 question": 1}


def digits(folder: Path, n: int) -> Path:
    folder.mkdir()
    found, rows = load_digits_split("test"), ["file,label"]
    for i in range(n):
        found[i]["image"].save(folder / f"{i}.png")
        rows.append(f"{i}.png,{found[i]['label']}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def questions(folder: Path, n: int) -> Path:
    folder.mkdir()
    rows, lines = MosaicQuestions(Mosaics(digit_pictures("test"), 2)), []
    for i in range(n):
        row = dict(rows[i])
        row.pop("image").save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", **row}))
    (folder / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def animals(folder: Path, n: int) -> Path:
    for i in range(n):
        of_class = folder / ("cat", "dog")[i % 2]
        of_class.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(30 * i).convert("RGB").save(of_class / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Numbers, Numbers]]:
    """All in one launch: importing takes longer than evaluating."""
    path = tmp_path_factory.mktemp("data")
    classify, answer = ("-m", "zero_tprune", "--batch-size", 3), ("-m", "divprune", "--new-tokens", 4)
    commands = {
        "20 digits": (MODEL_DIR, digits(path / "20", 20), *classify),
        "1 digit": (MODEL_DIR, digits(path / "1", 1), *classify),
        "zero-shot": (
            *(save_tiny_clip(path / "clip"), animals(path / "animals", 7)),
            *("-m", "uniform", "--batch-size", 2),
        ),
        "10 questions": (LLAVA_DIR, questions(path / "10 questions", 10), *answer, "--batch-size", 3),
        "1 question": (LLAVA_DIR, questions(path / "1 question", 1), *answer),
    }
    assert commands.keys() == SAMPLES.keys()
    found = alone_and_together([["eval", *map(str, command)] for command in commands.values()])
    return dict(zip(commands, found, strict=True))


@pytest.mark.parametrize(("name", "n"), SAMPLES.items())
def test_the_same_numbers(numbers: dict[str, tuple[Numbers, Numbers]], name: str, n: int) -> None:
    """Everything but speeds; KL up to the order of sums, as batches are cut differently."""
    alone, together = numbers[name]
    assert {key for key in alone if key != "rows"} == {key for key in together if key != "rows"}
    assert alone.get("images", alone.get("questions")) == together.get("images", together.get("questions")) == n
    assert together["rows"][0]["name"] == "dense" and len(together["rows"]) == 2
    for one, two in zip(alone["rows"], together["rows"], strict=True):
        assert (one["kl"] is None) == (one["name"] == "dense")
        for key in one.keys() - SPEEDS:
            if key in ("kl", "kl_interval") and one[key] is not None:
                assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-9)
            else:
                assert two[key] == one[key], key
