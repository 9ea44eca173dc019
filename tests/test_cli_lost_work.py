"""Nothing measured is lost, and what cannot work is told before anything is measured; help does not wait for torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_tokenprune.cli import app
from hf_tokenprune.cli.messages import flags_of, in_flags
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
DIGITS = str(MODEL_DIR)
COMMANDS = [command.name or command.callback.__name__.rstrip("_") for command in app.registered_commands]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("digits")
    digits = load_digits_split("test")
    for i in range(4):
        digits[i]["image"].save(path / f"{i}.png")
    return str(path)


@pytest.fixture
def forwards() -> list:
    """Every forward of a module from here on."""
    seen: list = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    yield seen
    handle.remove()


def test_help_version_and_presets_import_neither_torch_nor_transformers() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from hf_tokenprune.cli import app
for args in [["--help"], ["--version"], ["presets", "--json"], *([name, "--help"] for name in {COMMANDS})]:
    assert CliRunner().invoke(app, args).exit_code == 0, args
    assert not {{"torch", "transformers"}} & set(sys.modules), args
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("command", ["apply", "compare", "search", "demo"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(
    command: str, folder: str, tmp_path: Path, forwards: list
) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "x")
    args = {
        "apply": (DIGITS, out, "-m", "tome"),
        "compare": (DIGITS, folder, "-m", "tome", "-g", "0.12", "--out", out),
        "search": (DIGITS, folder, "-m", "tome", "-g", "0.12", "--out", out),
        "demo": ("--out", out),
    }[command]
    result = CliRunner().invoke(app, [command, *args])
    assert result.exit_code == 1 and f"cannot write to the folder {out}" in result.output
    assert not forwards


@pytest.mark.parametrize("options", [(), ("--strategy", "coordinate"), ("--strategy", "monte_carlo")])
def test_a_budget_out_of_reach_is_told_before_anything_runs(
    options: tuple, folder: str, tmp_path: Path, forwards: list
) -> None:
    given = ["-m", "tome", "-g", "0.01", "--out", str(tmp_path), *options]
    result = CliRunner().invoke(app, ["search", DIGITS, folder, *given])
    assert result.exit_code == 1 and "a budget of 0.01 GMACs is out of reach of tome" in result.output
    assert not forwards


def test_a_strategy_that_is_not_installed_is_told_before_anything_runs(
    folder: str, tmp_path: Path, forwards: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    given = ["-m", "tome", "-g", "0.12", "--strategy", "optuna", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["search", DIGITS, folder, *given])
    assert result.exit_code == 1 and "hf-tokenprune[optuna]" in result.output and not forwards


def test_a_search_replaces_no_other_result(folder: str, tmp_path: Path) -> None:
    given = ["search", DIGITS, folder, "-m", "random", "--strategy", "monte_carlo", "--trials", "1"]
    given += ["--out", str(tmp_path)]
    assert CliRunner().invoke(app, [*given, "-g", "0.12"]).exit_code == 0
    before = (tmp_path / "search.json").read_text()
    other = CliRunner().invoke(app, [*given, "-g", "0.13"])
    assert other.exit_code == 1 and "had --gmacs 0.12; this one has --gmacs 0.13" in other.output
    assert (tmp_path / "search.json").read_text() == before
    assert CliRunner().invoke(app, [*given, "-g", "0.12"]).exit_code == 0, "the same command again"
    assert json.loads((tmp_path / "search.json").read_text())["measured"] == 0


def test_an_interrupted_comparison_keeps_what_is_measured(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    import hf_tokenprune.benchmark as room

    whole, done = room.benchmark, []

    def benchmark(*args: object, **options: object) -> object:
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return whole(*args, **options)

    monkeypatch.setattr(room, "benchmark", benchmark)
    given = ["-m", "random", "-m", "uniform", "-g", "0.12", "--rounds", "1", "--batch-size", "2"]
    result = CliRunner().invoke(app, ["compare", DIGITS, folder, *given, "--out", str(tmp_path / "out")])
    assert result.exit_code == 130 and "interrupted: the accuracy of 2 runs is in" in result.output
    assert "| uniform@0.12 |" in (tmp_path / "out" / "accuracy.md").read_text()
    table = (tmp_path / "out" / "comparison.csv").read_text()
    assert "random@0.12" in table and "uniform@0.12" not in table


def test_arguments_of_the_library_are_told_as_options() -> None:
    flags = {flag: command.callback for command in app.registered_commands for flag in flags_of(command.callback)}
    assert {"--gmacs", "--ms", "--latency-batch", "--batch-size", "--seed"} <= set(flags)
    text = "macs=1.2e+09: less than 2e+09 MACs; seconds=, latency_batch_size=8, split='a', r=3, a/seed=3"
    told = "--gmacs 1.2: less than 2 GMACs; --ms, --latency-batch 8, --split a, r=3, a/seed=3"
    assert in_flags(text, flags) == told
    for field in (
        "seed='x' in RandomConfig",
        "keep_ratio=2.0 in DivPruneConfig",
        "keep_ratio='2 %' in FastVConfig",
    ):
        assert in_flags(field, flags) == field, "no option, but what --set or a file says"
    assert in_flags("keep_ratio=2: expected", flags) == "--resize 2: expected"


@pytest.mark.parametrize("name", ["folder", "/no/such/folder", "file"])
def test_what_is_no_checkpoint_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for command in (["info", name], ["eval", name, "folder"], ["bench", name], ["apply", name, "new"]):
        result = CliRunner().invoke(app, [*command, "-m", "tome"])
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert f"'{name}'" in result.output and len(result.output.splitlines()) == 1
