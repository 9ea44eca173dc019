"""The scripts that make the packaged models: they run, an interrupted run ends where a whole one does, and what they
train on is what the model is asked later."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
if not hasattr(torch.optim, "Muon"):
    pytest.skip("the scripts need Muon, torch 2.9", allow_module_level=True)

from hf_tokenprune import list_methods
from hf_tokenprune.demo.mosaics import LLAVA_DIR, Mosaics, Pictures, digit_pictures
from hf_tokenprune.demo.questions import KINDS, standard_questions
from hf_tokenprune.engine import counts, find_adapter
from hf_tokenprune.registry import get_method

from .test_examples import EXAMPLES, run

sys.path.insert(0, str(EXAMPLES))
import mini_llava_table
import recipe
import train_mini_clip
import train_mini_llava
from transformers import AutoModelForImageTextToText, AutoModelForZeroShotImageClassification, AutoProcessor

TEST = digit_pictures("test")


def weights_after(path: Path, stop: int | None, resume: bool) -> list[torch.Tensor]:
    """Six steps of a small model; ``stop``: it is interrupted there."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)]), "head": nn.Linear(3, 2)})
    training = recipe.Training(model, path, 6, 0.1, 0.01, 0.2, resume)

    def losses(step: int) -> dict[str, torch.Tensor]:
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return {"loss": model["head"](model["layers"][0](x)).square().mean()}

    lines = training.run(losses, lambda: {"score": 1.0}, every=2)
    if stop is None:
        assert list(lines)[-1]["step"] == 6
    else:
        with pytest.raises(KeyboardInterrupt):
            list(lines)
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_an_interrupted_training_ends_where_a_whole_one_does(tmp_path: Path) -> None:
    whole = weights_after(tmp_path / "whole", None, resume=False)
    weights_after(tmp_path / "parts", 3, resume=False)
    parts = weights_after(tmp_path / "parts", None, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    logs = []
    for name in ("whole", "parts"):
        lines = map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())
        logs.append([(line["step"], line["loss"], line["score"]) for line in lines])
    assert logs[0] == logs[1] and [step for step, _, _ in logs[0]] == [2, 4, 6]


def test_contrastive_loss_is_the_mean_over_captions_that_fit() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    fits = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [1, 0, 1, 1, 0]], dtype=torch.bool)
    rows = [
        -sum(logits[i].log_softmax(0)[j] for j in range(5) if fits[i, j]) / sum(fits[i]).item()  # type: ignore[misc]
        for i in range(3)
    ]
    columns = [
        -sum(logits[:, j].log_softmax(0)[i] for i in range(3) if fits[i, j]) / sum(fits[:, j]).item()  # type: ignore[misc]
        for j in range(3)
    ]
    expected = (sum(rows) / 3 + sum(columns) / 3) / 2
    torch.testing.assert_close(train_mini_clip.contrastive(logits, fits), expected)


def test_packed_questions_are_answered_as_one_by_one() -> None:
    """Each sees the image and itself, at the positions and after the words that the processor would give it."""
    model: Any = AutoModelForImageTextToText.from_pretrained(LLAVA_DIR).eval()
    processor = AutoProcessor.from_pretrained(LLAVA_DIR)
    mosaics = list(Mosaics(TEST, 2))
    questions = [standard_questions(i, mosaic.cells, TEST) for i, mosaic in enumerate(mosaics)]
    packed = train_mini_llava.pack(processor, questions)
    pixels = train_mini_llava.pixels_of(processor, mosaics)
    with torch.no_grad():
        logits = train_mini_llava.logits_of(model, packed, pixels)
        for row, asked in enumerate(questions):
            for i, question in enumerate(asked):
                content = [{"type": "image"}, {"type": "text", "text": question.text}]
                chat = [{"role": "user", "content": content}]
                prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
                text = f"{prompt} {question.answer}"
                alone = model(**processor(text=text, images=mosaics[row].image, return_tensors="pt")).logits[0]
                own = packed.question[row] == i + 1
                torch.testing.assert_close(logits[row][own], alone[-int(own.sum()) :], atol=1e-4, rtol=1e-4)
                targets = packed.targets[row][own]
                right = processor.tokenizer(question.answer, add_special_tokens=False).input_ids
                assert targets[targets >= 0].tolist() == [*right, processor.tokenizer.eos_token_id]


@pytest.mark.heavy
@pytest.mark.slow
def test_scripts_make_models_that_load(tmp_path: Path) -> None:
    common = ("--steps", 2, "--every", 2, "--batch-size", 4, "--test-size", 4)
    run("train_mini_clip.py", "--output-dir", "clip", *common, cwd=tmp_path)
    run("train_mini_llava.py", "--clip", "clip", "--output-dir", "llava", *common, cwd=tmp_path)
    clip = AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "clip")
    llava = AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    assert clip.dtype == llava.dtype == torch.float32
    tower = dict(llava.model.vision_tower.named_parameters())
    for name, parameter in clip.vision_model.named_parameters():
        assert torch.equal(parameter, tower[name]), "the LLaVA's tower is the CLIP's, frozen"
    log = [json.loads(line) for line in (tmp_path / "llava" / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2] and set(KINDS) < set(log[0])
    assert "2 steps of 4" in (tmp_path / "clip" / "README.md").read_text(encoding="utf-8")
    assert "about 4 mosaics" in (tmp_path / "llava" / "README.md").read_text(encoding="utf-8")


def test_every_method_has_a_row_in_the_table_and_meets_ratios() -> None:
    model = AutoModelForImageTextToText.from_pretrained(LLAVA_DIR)
    rows, shape = mini_llava_table.rows_of(model), find_adapter(model).shape(model)
    for name in list_methods("decoder"):
        of_videos = name not in rows
        assert not of_videos or all(stage.videos_only for stage in get_method(name)().stages_for(shape))
    assert len({str(config) for config in rows.values()}) == len(rows)
    for config in rows.values():
        for keep in mini_llava_table.KEEP[:: len(mini_llava_table.KEEP) - 1]:
            found = config.for_budget(model, keep=keep)
            (*_, (_, _, left)) = counts(found.stages_for(shape), shape)
            assert left == int(keep * 256)


@pytest.mark.heavy
@pytest.mark.slow
def test_the_table_is_measured_once(tmp_path: Path) -> None:
    command = ("mini_llava_table.py", "--layout", "sparse", "--out", "out", "--rows", "uniform", "resize")
    output = run(*command, "--mosaics", 1, cwd=tmp_path)
    assert [line for line in output.splitlines() if line.startswith("measured")] == [
        "measured sparse: uniform",
        "measured sparse: resize",
    ]
    row = json.loads((tmp_path / "out" / "sparse" / "uniform.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in row["rows"]] == ["dense", *map(str, mini_llava_table.KEEP)]
    work = list(row["work"].values())
    assert row["questions"] == 3 and work[0] < 1 and work == sorted(work, reverse=True)
    tables = (tmp_path / "out" / "sparse.md").read_text(encoding="utf-8")
    assert tables.strip() in output and "Best blind guess: what " in tables and "count" not in tables
    assert tables.count("| uniform |") == tables.count("| resize |") == 3 + 3, "work, all, KL, and each kind"
    row["about"]["mosaics"] = 7
    (tmp_path / "out" / "sparse" / "uniform.json").write_text(json.dumps(row), encoding="utf-8")
    again = run(*command, "--mosaics", 1, cwd=tmp_path)
    assert again.count("measured") == again.count("measured sparse: uniform") == 1, "that was of other questions"


@pytest.mark.heavy
@pytest.mark.slow
def test_photographs_come_alone_first(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="photographs come as a dataset: pip install hf-tokenprune[eval]")
    (tmp_path / "photos").mkdir()
    names = [f"kind{label}" for label in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    photos = [Image.new("RGB", (32, 32), (20 * label, 255, 0)) for label in range(10)]
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": photos, "label": list(range(10))}, features=features)
        rows.to_parquet(tmp_path / "photos" / f"{split}.parquet")
    common = ("--steps", 2, "--every", 2, "--batch-size", 4, "--test-size", 4)
    run("train_mini_clip.py", "--pictures", "photos", "--alone", 2, "--output-dir", "clip", *common, cwd=tmp_path)
    alone = [json.loads(line) for line in (tmp_path / "clip_training_alone.jsonl").read_text().splitlines()]
    assert [line["step"] for line in alone] == [2] and alone[0]["class"] > 0
    assert not (tmp_path / "clip" / "README.md").exists(), "the card is about digits"
    AutoModelForZeroShotImageClassification.from_pretrained(tmp_path / "clip")
    with pytest.raises(AssertionError, match="--alone is for photographs"):
        run("train_mini_clip.py", "--alone", 2, *common, cwd=tmp_path)


def test_patches_of_a_photograph_alone_are_labelled() -> None:
    labels = np.arange(10)
    pixels = np.stack([np.full((32, 32, 3), (20 * label, 255, 0), np.uint8) for label in labels])
    pictures = Pictures(pixels, labels, TEST.names, TEST.plurals, TEST.order)
    images, classes, on_patch = train_mini_clip.photographs(pictures, 30, np.random.default_rng(0))
    middles = images[:, :, 4::8, 4::8].flatten(2)  # of patches of 8 pixels
    green = (middles[:, 1] > 0.99) & (middles[:, 2] < -0.99)
    assert torch.equal(on_patch >= 0, green) and green.any(1).all() and not green.all()
    for row, label in enumerate(classes.tolist()):
        assert set(on_patch[row][green[row]].tolist()) == {label}
        torch.testing.assert_close(
            middles[row, 0, green[row]], torch.full_like(middles[row, 0, green[row]], label / 6.375 - 1)
        )
