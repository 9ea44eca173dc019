"""The wheel: what is in it, how large it is, and that it works where none of the extras is installed."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from .test_architecture import PACKAGE, ROOT

pytestmark = pytest.mark.slow

MEGABYTES = 12
"""What the wheel may have at most; docs/contributing.md says so. Nearly all of it are the small models of the demos."""

WITHOUT_EXTRAS = """
import importlib, importlib.machinery, pathlib, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] in sys.argv[2].split(",") else super().find_spec(name, *where)

sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import torch
import hf_tokenprune
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

folder = pathlib.Path(sys.argv[1])
assert pathlib.Path(hf_tokenprune.__file__).is_relative_to(folder / "installed"), hf_tokenprune.__file__
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
tiny = ViTConfig(image_size=32, patch_size=4, **sizes)
model = hf_tokenprune.prune(ViTForImageClassification(tiny).eval())
pixels = torch.randn(2, 3, 32, 32)
with torch.no_grad(), hf_tokenprune.record(model) as rec:
    expected = model(pixels).logits
assert rec.tokens[3] < rec.tokens[0]
hf_tokenprune.save_pretrained(model, folder / "checkpoint")
with torch.no_grad():
    assert torch.equal(hf_tokenprune.from_pretrained(folder / "checkpoint")(pixels).logits, expected)
hf_tokenprune.enable_auto()
with torch.no_grad():
    assert torch.equal(AutoModelForImageClassification.from_pretrained(folder / "checkpoint")(pixels).logits, expected)
hf_tokenprune.list_presets()
for module, name, arguments in (
    ("evaluation", "load_images", ("someone/something",)),
    ("evaluation.accelerator", "require", ("accelerate",)),
    ("pictures.reports", "curves", ({"rows": [{"name": name, "kl": 1.0, "macs": 1e9} for name in ("dense", "tome")]},)),
    ("search.strategies", "check_strategy", ("optuna", 1)),
    ("demo.digits", "originals", ()),
    ("evaluation.optional", "require", ("gradio", "app")),
):
    try:
        getattr(importlib.import_module(f"hf_tokenprune.{module}"), name)(*arguments)
    except (ImportError, ValueError) as error:
        print(error)
    else:
        raise AssertionError(name)
"""


def run(*command: Any, cwd: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo_output")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(names) == sorted(str(path.relative_to(PACKAGE.parent)) for path in expected)


def test_its_size_is_as_stated(wheel: Path) -> None:
    assert wheel.stat().st_size < MEGABYTES * 10**6
    assert f"at most {MEGABYTES} MB" in (ROOT / "docs" / "contributing.md").read_text()


def test_the_index_would_take_it(wheel: Path) -> None:
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel, cwd=wheel.parent)


def test_installed_without_extras_it_prunes_and_says_what_needs_one(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", installed, wheel, cwd=tmp_path)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    packages = {re.split(r"[\[>=]", line)[0] for extra in extras for line in extras[extra].split() if "%" not in line}
    packages -= {"transformers"}  # of which an extra of its own is wanted
    missing = {name.replace("-", "_").replace("scikit_learn", "sklearn") for name in packages}
    assert {"evaluate", "datasets", "accelerate", "matplotlib", "sklearn", "optuna", "peft", "gradio"} <= missing
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n" + WITHOUT_EXTRAS
    lines = run(sys.executable, "-c", code, tmp_path, ",".join(missing), cwd=tmp_path).splitlines()
    for line, extra in zip(lines, ("eval", "eval", "plot", "optuna", "demo", "app"), strict=True):
        assert f"hf-tokenprune[{extra}]" in line
