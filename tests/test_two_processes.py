"""`accelerate launch` with two processes gives the numbers of one: zero-shot, and where there is less than one sample
for each. tests/test_cli.py and tests/test_mini_models.py have images and questions with an uneven last batch."""

from pathlib import Path

import pytest
from PIL import Image

from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.demo.mosaics import LLAVA_DIR

from .clip_checkpoint import save_tiny_clip
from .two_processes import alone_and_together

pytest.importorskip("accelerate")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
pytestmark = pytest.mark.slow

SPEEDS = ("images_per_second", "questions_per_second", "speed_up", "speed_up_quartiles")


def same_numbers(*arguments: object, n: int) -> None:
    """Everything but speeds; KL up to the order of sums, as batches are cut differently."""
    alone, together = alone_and_together("eval", *arguments)
    assert {key for key in alone if key != "rows"} == {key for key in together if key != "rows"}
    assert alone.get("images", alone.get("questions")) == together.get("images", together.get("questions")) == n
    assert len(together["rows"]) == 2
    for one, two in zip(alone["rows"], together["rows"], strict=True):
        for key in one.keys() - SPEEDS:
            if key in ("kl", "kl_interval") and one[key] is not None:
                assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-9)
            else:
                assert two[key] == one[key], key


def test_zero_shot_with_an_uneven_last_batch(tmp_path: Path) -> None:
    clip = save_tiny_clip(tmp_path / "clip")
    for i in range(7):
        folder = tmp_path / "images" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(30 * i).convert("RGB").save(folder / f"{i}.png")
    same_numbers(clip, tmp_path / "images", "-m", "uniform", "--batch-size", 2, n=7)


def test_one_image(tmp_path: Path) -> None:
    row = load_digits_split("test")[0]
    (tmp_path / str(row["label"])).mkdir()
    row["image"].save(tmp_path / str(row["label"]) / "0.png")
    (tmp_path / "labels.csv").write_text(f"file,label\n{row['label']}/0.png,{row['label']}\n")
    same_numbers(MODEL_DIR, tmp_path, "-m", "zero_tprune", n=1)


def test_one_question(tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "0.png")
    line = '{"image": "0.png", "question": "what is in the middle ?", "answer": "3"}'
    (tmp_path / "questions.jsonl").write_text(line)
    same_numbers(LLAVA_DIR, tmp_path, "-m", "divprune", "--new-tokens", 4, n=1)
