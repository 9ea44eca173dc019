"""Every example runs as its own help says, without a network, and does what it is an example of."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_tokenprune import PruneConfig, ZeroTPruneConfig, from_pretrained, list_methods
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import CANVAS, MODEL_DIR, load_digits_split

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MAX_LINES = 60

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


def test_prune_vit(tmp_path: Path) -> None:
    output = run("prune_vit.py", "--limit", 3, "--out", tmp_path / "out", cwd=tmp_path)
    assert "197    186" in output, "tokens that entered block 0, and patches it kept"
    assert "for 3 of 3 images" in output and "the same logits after loading: True" in output
    model = from_pretrained(tmp_path / "out")
    assert PruneConfig.from_pretrained(tmp_path / "out") == ZeroTPruneConfig()
    assert cost(model).ratio < 0.7
    with Image.open(tmp_path / "out" / "kept_patches.png") as picture:
        assert picture.width > 4 * 224 and picture.height > 3 * 224


def test_prune_vit_with_images_and_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(2):
        load_digits_split("test")[i]["image"].save(tmp_path / "photos" / f"{i}.png")
    arguments = ("--model", MODEL_DIR, "--images", tmp_path / "photos", "--method", "uniform")
    assert "of 2 images" in run("prune_vit.py", *arguments, cwd=tmp_path)
    assert PruneConfig.from_pretrained(tmp_path / "prune_vit_output").method == "uniform"


def test_trainer_eval(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    output = run("trainer_eval.py", "--limit", 40, "--out", tmp_path / "scores.json", cwd=tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert json.loads(output) == scores
    assert list(scores) == ["dense", *list_methods()]
    assert all(0.8 <= row["accuracy"] <= 1 for row in scores.values())
    assert all(row["kl"] > 0 for name, row in scores.items() if name != "dense"), "pruning happened"
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"], "nothing is left behind"


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


@pytest.mark.parametrize(
    "name", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "train_digits_vit.py")
)
def test_examples_are_short_and_explain_themselves(name: str, tmp_path: Path) -> None:
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_LINES
    first = source.splitlines()[0].strip('"')
    assert first in run(name, "--help", cwd=tmp_path)
