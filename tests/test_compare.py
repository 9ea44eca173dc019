"""Methods side by side: the table is that of `eval` and `bench`, the files can be used, what does not fit is said."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPVisionModel, SiglipVisionModel, ViTForImageClassification
from typer.testing import CliRunner, Result

from hf_tokenprune import PruneConfig
from hf_tokenprune.cli import app
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.errors import ConfigError
from hf_tokenprune.evaluation.compare import every_method

from .families import methods_for, tiny_model

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
pytest.importorskip("matplotlib", reason="the picture needs it: pip install hf-tokenprune[plot]")
DIGITS = str(MODEL_DIR)
N = 12


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rows = tmp_path_factory.mktemp("digits"), ["file,label"]
    digits = load_digits_split("test")
    for i in range(N):
        digits[i]["image"].save(path / f"{i}.png")
        rows.append(f"{i}.png,{digits[i]['label']}")
    (path / "labels.csv").write_text("\n".join(rows))
    return path


@pytest.mark.slow
def test_table_picture_and_configs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    chosen = ("-m", "tome", "-m", "random", "-g", "0.12", "-g", "0.15")
    result = run("compare", DIGITS, folder, *chosen, "--rounds", 3, "--batch-size", 4, "--out", out)
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_text())))
    assert [row["run"] for row in rows] == ["dense", "tome@0.12", "random@0.12", "tome@0.15", "random@0.15"]
    assert [row["method"] for row in rows] == ["dense", "tome", "random", "tome", "random"]

    evaluated = json.loads(run("eval", DIGITS, folder, *chosen, "--json").stdout)
    for row, expected in zip(rows, evaluated["rows"], strict=True):
        assert int(row["n"]) == N and float(row["gmacs"]) == pytest.approx(expected["macs"] / 1e9)
        assert float(row["top1"]) == expected["accuracy"]
        if row["run"] != "dense":
            # Images share batches with others here: what is left of a KL below 1e-9 is how their products are rounded.
            assert float(row["kl_nats"]) == pytest.approx(expected["kl"], rel=1e-3, abs=1e-10)
            assert float(row["agreement"]) == expected["agreement"]
            assert float(row["speedup_low"]) <= float(row["speedup_high"]) and row["decision_low"]
            assert bool(row["speedup"]) == bool(row["of_ideal"]) == bool(row["images_per_second"])
            if row["speedup"]:
                assert float(row["of_ideal"]) == pytest.approx(float(row["speedup"]) / float(row["ideal_speedup"]))
            config = PruneConfig.from_pretrained(out / "configs" / row["run"])
            assert config.to_dict() == evaluated["configs"][row["run"]]
            assert run("info", DIGITS, "-c", out / "configs" / row["run"]).exit_code == 0

    text = (out / "comparison.md").read_text()
    assert (
        all(f"| {row['run']} |" in text for row in rows) and "hf-tokenprune" in text and "interleaved rounds 3" in text
    )
    picture = Image.open(out / "comparison.png")
    assert picture.width >= 1200 and len(picture.convert("RGB").getcolors(1 << 24)) > 100

    again = run("compare", DIGITS, folder, *chosen, "--out", out)
    assert again.exit_code == 1 and "exists and is not an empty folder" in again.output


def test_budgets_are_asked_for_before_anything_runs(tmp_path: Path) -> None:
    result = run("compare", DIGITS, tmp_path / "nowhere", "-m", "tome", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "give budgets with --gmacs" in result.output
    assert not (tmp_path / "out").exists()


def test_a_method_that_is_named_and_does_not_fit_is_an_error(folder: Path, tmp_path: Path) -> None:
    result = run("compare", DIGITS, folder, "-m", "tome", "-g", "0.001", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "out of reach of this tome schedule" in result.output


def test_every_method_that_fits() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    dense = cost(model).dense.macs / 1e9
    found = every_method(model, [0.8 * dense, 0.7 * dense])
    assert {name.partition("@")[0] for name in found} == set(methods_for("vision"))
    assert list(found).count("exact") == 1 and len(found) == 2 * (len(methods_for("vision")) - 1) + 1
    for name, config in found.items():
        if name != "exact":
            assert cost(model, config).pruned.macs <= float(name.partition("@")[2]) * 1.0001e9


def test_what_does_not_fit_is_left_out_and_said() -> None:
    model = tiny_model("siglip_vision_model", SiglipVisionModel)
    dense = cost(model).dense.macs / 1e9
    with pytest.warns(UserWarning, match=r"evit@.* is left out: EViT needs cls_attention"):
        found = every_method(model, [0.8 * dense])
    assert {name.partition("@")[0] for name in found} == {"pitome", "random", "tome", "uniform", "zero_tprune"}
    with pytest.raises(ConfigError, match="no method fits"), pytest.warns(UserWarning, match="is left out"):
        every_method(tiny_model("clip_vision_model", CLIPVisionModel), [1e-9])
