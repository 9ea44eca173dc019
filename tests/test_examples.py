"""Every example runs as its own help says, without a network, and does what it is an example of."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification

from hf_tokenprune import DivPruneConfig, PruneConfig, SalienceMergeConfig, from_pretrained, list_methods
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import CANVAS, MODEL_DIR, load_digits_split
from hf_tokenprune.demo.mosaics import LLAVA_DIR, Mosaics, digit_pictures
from hf_tokenprune.registry import get_method

from .families import tiny_model
from .llava_checkpoint import save_photo, save_tiny_llava

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MAX_LINES = 80
ENGINES = ("eager", "compiled", "ONNX Runtime", "OpenVINO", "compiled int8", "ONNX Runtime int8")

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")


def run(name: str, *args: object, cwd: Path) -> str:
    """Standard output of an example, started in ``cwd``."""
    env = {
        **os.environ,
        "PYTHONPATH": str(EXAMPLES.parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, CANVAS, CANVAS, generator=torch.Generator().manual_seed(0))).logits


@pytest.mark.slow
def test_prune_vit(tmp_path: Path) -> None:
    output = run("prune_vit.py", "--limit", 3, "--out", tmp_path / "out", cwd=tmp_path)
    assert "197    148" in output, "tokens that entered block 1, and patches it kept"
    assert "for 3 of 3 images" in output and "the same logits after loading: True" in output
    model = from_pretrained(tmp_path / "out")
    assert PruneConfig.from_pretrained(tmp_path / "out") == SalienceMergeConfig()
    assert cost(model).ratio < 0.7
    with Image.open(tmp_path / "out" / "kept_patches.png") as picture:
        assert picture.width > 4 * 224 and picture.height > 3 * 224


@pytest.mark.slow
def test_prune_vit_with_images_and_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(2):
        load_digits_split("test")[i]["image"].save(tmp_path / "photos" / f"{i}.png")
    arguments = ("--model", MODEL_DIR, "--images", tmp_path / "photos", "--method", "uniform")
    assert "of 2 images" in run("prune_vit.py", *arguments, cwd=tmp_path)
    assert PruneConfig.from_pretrained(tmp_path / "prune_vit_output").method == "uniform"


@pytest.mark.slow
def test_trainer_eval(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    output = run("trainer_eval.py", "--limit", 40, "--out", tmp_path / "scores.json", cwd=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert json.loads(output) == scores
    assert list(scores) == ["dense", *(name for name in list_methods() if "vision" in get_method(name).prunes)]
    assert all(0.8 <= row["accuracy"] <= 1 for row in scores.values())
    assert all(row["kl"] > 0 for name, row in scores.items() if name != "dense"), "pruning happened"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"], "nothing is left behind"


@pytest.mark.slow
def test_share_on_hub_writes_and_does_not_upload(tmp_path: Path) -> None:
    output = run("share_on_hub.py", "owner/digits-pruned", "--macs-ratio", 0.6, cwd=tmp_path)
    assert "dry run, nothing uploaded" in output
    folder = tmp_path / "digits-pruned"
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "prune_config.json"}
    assert {path.name for path in folder.iterdir()} == files
    model = from_pretrained(folder)
    assert 0.55 < cost(model).ratio <= 0.6
    dense = type(model).from_pretrained(MODEL_DIR)
    assert torch.equal(logits(type(model).from_pretrained(folder)), logits(dense)), (
        "stock loading gives the dense model"
    )
    assert not torch.equal(logits(model), logits(dense))


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ((), "entrance: 56"),
        (("--method", "fastv", "--keep-ratio", 0.25), "1: 144"),
        (("--method", "stack"), "vision_tower: 192, 6: 168, 8: 120, 11: 24"),
    ],
)
def test_llava_answer(arguments: tuple[object, ...], left: str, tiny_llava: Path, tmp_path: Path) -> None:
    save_photo(tmp_path / "photo.jpg")
    arguments = ("--model", tiny_llava, "--image", "photo.jpg", "--new-tokens", 4, "--device", "cpu", *arguments)
    output = run("llava_answer.py", *arguments, cwd=tmp_path)
    assert f"image tokens 576 -> {left}\n" in output
    answers = re.findall(r"^(\w+): (.+)\n  first token after \d\.\d{3} s", output, flags=re.MULTILINE)
    assert [len(answer.split()) for _, answer in answers] == [4, 4]
    assert answers[0][0] == "dense" and answers[0][1] != answers[1][1], "pruning changed what a random model says"
    assert re.search(r"counted for one image.*:\n  [1-9]\d?\.\d% of the prefill", output), "less than the dense model"


@pytest.mark.heavy
@pytest.mark.slow
def test_llava_batch(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    questions = ["What is this?", "Where is the red square in the image?", "What?"]
    for i in range(3):
        save_photo(tmp_path / "photos" / f"{i}.png")
    rows = [{"image": f"{i}.png", "question": question} for i, question in enumerate(questions)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "photos" / "questions.jsonl").write_text("\n".join(lines))
    DivPruneConfig(keep_ratio=0.05).save_pretrained(tmp_path)
    common = ("photos/questions.jsonl", "--model", tiny_llava, "--new-tokens", 4, "--device", "cpu")

    runs = ("dense", "transprune", "prune_config.json")
    chosen = [part for name in runs for part in ("--run", name)]
    output = run("llava_batch.py", *common, *chosen, "--batch-size", 2, "--out", "two.jsonl", cwd=tmp_path)
    assert re.findall(r"^(\S+): \d+\.\d\d questions/s$", output, flags=re.MULTILINE) == list(runs)
    answers = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ("image", "question")} for row in answers] == rows
    assert all(len(row[name].split()) == 4 for row in answers for name in runs)
    assert any(row["dense"] != row["prune_config.json"] for row in answers)

    run("llava_batch.py", *common, *chosen, "--batch-size", 1, "--out", "one.jsonl", cwd=tmp_path)
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text(), "a batch gives the same"


@pytest.mark.slow
def test_llava_batch_tells_a_mistaken_run_before_it_starts(tmp_path: Path) -> None:
    """Not when the runs before it are through, which may take hours, and with their answers lost."""
    runs = ("--run", "dense", "--run", "divprun")
    with pytest.raises(AssertionError, match=r"no prune_config\.json in 'divprun'"):
        run("llava_batch.py", "questions.jsonl", "--model", "not-there-either", *runs, cwd=tmp_path)


@pytest.mark.slow
def test_serve_and_ask(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="pip install transformers[serving]")
    Mosaics(digit_pictures("test"), 1)[0].image.save(tmp_path / "photo.png")
    question = ("--model", LLAVA_DIR, "--image", "photo.png", "--question", "what is at row 1 column 1 ?")
    output = run("serve_and_ask.py", *question, "--rounds", 2, "--", "--device", "cpu", cwd=tmp_path)
    answers = re.findall(r"^(\w+): (.+)\n  first token after \d+\.\d{3} s", output, flags=re.MULTILINE)
    assert [name for name, _ in answers] == ["dense", "divprune"]


@pytest.mark.slow
def test_gpu_report(tmp_path: Path) -> None:
    """On the CPU: every kind of case is measured, but for the attention that CPUs do not have."""
    run("gpu_report.py", "--dry-run", "--out", "report", cwd=tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["machine"]["card"].startswith("none") and data["Tests that need a GPU"] == "not run"
    notes = {line["case"]: line["note"] for line in data["lines"]}
    (flash,) = [notes.pop(name) for name in tuple(notes) if "flash" in name]
    assert flash and set(notes.values()) == {""} and len(notes) == 6
    parts = [line["part"] for line in data["lines"] if line["case"].startswith("LLaVA-NeXT-7B, divprune")]
    assert parts == ["prefill", "decode a token", "end to end"]
    assert all(line["pruned_seconds"] > 0 and line["ideal"] > 1 for line in data["lines"] if line["part"] == "forward")
    table = (tmp_path / "report.md").read_text().splitlines()
    assert sum(line.startswith("| ") for line in table) == 2 + len(data["lines"])


def test_search_curve(tmp_path: Path) -> None:
    trials = [(0.5, True, 1.0), (0.1, True, 0.25), (0.2, False, 1.0), (0.4, True, 1.0), (0.45, True, 1.0)]
    keys = ("distortion", "feasible", "part")
    result = {"trials": [dict(zip(keys, trial, strict=True)) for trial in trials]}
    for strategy in ("dynamic", "coordinate"):
        (tmp_path / strategy).mkdir()
        settings = {"strategy": strategy, "seed": 3, "goal": "kl"}
        (tmp_path / strategy / "search.json").write_text(json.dumps({**result, "settings": settings}))
    run("search_curve.py", "dynamic", "coordinate", cwd=tmp_path)
    lines = (tmp_path / "search_curve.csv").read_text().splitlines()
    expected = [
        (1.0, 0.5),
        (1.25, 0.5),
        (2.25, 0.5),
        (3.25, 0.4),
        (4.25, 0.4),
    ]  # of the parts and the infeasible: nothing
    assert lines[1:6] == [f"dynamic,3,{passes},{best:.6f}" for passes, best in expected] and len(lines) == 11
    with Image.open(tmp_path / "search_curve.png") as image:
        assert image.size == (1050, 600)


MAKES_THE_PACKAGE = (
    *("train_digits_vit.py", "train_mini_clip.py", "train_mini_llava.py", "recipe.py", "mosaic_sources.py"),
    *("mini_llava_table.py", "make_presets.py", "decision_time.py"),
)
"""Not to be copied by users, so they may be as long as they have to."""


@pytest.mark.slow
def test_finetune_pruned(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    options = ("--limit", 32, "--epochs", 1, "--macs", 0.4, "--out", tmp_path / "out")
    output = run("finetune_pruned.py", *options, cwd=tmp_path)
    rows = [line.split("|")[1:3] for line in output.splitlines() if line.startswith("| ")][2:]
    assert [name.strip() for name, _ in rows] == ["dense", "pruned", "pruned, fine-tuned", "fine-tuned, dense"]
    assert "32 images (32 labelled)" in output
    assert cost(from_pretrained(tmp_path / "out")).ratio <= 0.4


@pytest.mark.heavy
@pytest.mark.slow
def test_engines_table(tmp_path: Path) -> None:
    for module in ("torchao", "onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(module, reason="engines are extras: pip install hf-tokenprune[openvino] torchao")
    sizes = {"image_size": CANVAS, "patch_size": 8, "num_labels": 10, "num_hidden_layers": 2}
    tiny_model("vit", ViTForImageClassification, **sizes).save_pretrained(tmp_path / "vit")
    shutil.copy(Path(MODEL_DIR, "preprocessor_config.json"), tmp_path / "vit")
    digits, rows = load_digits_split("test"), ["file,label"]
    for i in range(3):
        digits[i]["image"].save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{digits[i]['label']}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options = ("-m", "tome", "--threads", 1, "--rounds", 3, "-b", 1, 2)
    output = run("engines_table.py", tmp_path / "vit", tmp_path, *options, cwd=tmp_path)
    _, _, *table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line[:1] == "|"]
    assert [row[:2] for row in table] == [[engine, arm] for engine in ENGINES for arm in ("dense", "pruned")]
    kl = {(engine, arm): float(cells[-1]) for engine, arm, *cells in table}
    for engine in ("compiled", "ONNX Runtime", "OpenVINO"):
        assert kl[engine, "dense"] == pytest.approx(0, abs=1e-6)
        assert kl[engine, "pruned"] == pytest.approx(kl["eager", "pruned"], abs=1e-6)


@pytest.mark.slow
def test_lora_pruned(tmp_path: Path) -> None:
    pytest.importorskip("accelerate"), pytest.importorskip("peft")
    output = run("lora_pruned.py", "--limit", 64, "--out", tmp_path / "out", cwd=tmp_path)
    assert "the same logits after loading: True" in output and "after merging: True" in output
    assert "without the adapter: False" in output and "dense, what it was not trained for: " in output
    (checkpoint,) = (tmp_path / "out" / "trainer").glob("checkpoint-*")
    for folder in (tmp_path / "out", checkpoint):
        assert PruneConfig.from_pretrained(folder) == SalienceMergeConfig()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in MAKES_THE_PACKAGE)
)
def test_examples_are_short_and_explain_themselves(name: str, monkeypatch: Any, capsys: Any) -> None:
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(EXAMPLES)  # in this process, which has imported torch already
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert not exit_.value.code
    assert source.splitlines()[0].strip('"') in capsys.readouterr().out
