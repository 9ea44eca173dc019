"""``--device`` and ``--dtype``: what this machine or PyTorch does not have is one line, before anything is loaded."""

import ast
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_tokenprune.cli
from hf_tokenprune.cli import app
from hf_tokenprune.cli.options import device_for, dtype_for
from hf_tokenprune.errors import ConfigError

NOWHERE = "/no/such/model"
COMMANDS = {
    "bench": ("bench", NOWHERE, "-m", "tome"),
    "search": ("search", NOWHERE, NOWHERE, "-m", "tome", "-g", "1", "--out", NOWHERE),
}


@pytest.mark.parametrize("name", ["foo", "", "cpu:x", "meta", "cuda:99", "cpu cuda"])
@pytest.mark.parametrize("command", COMMANDS)
def test_devices_that_are_not_here(command: str, name: str) -> None:
    result = CliRunner().invoke(app, [*COMMANDS[command], "--device", name])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    (line,) = result.output.splitlines()
    assert line.startswith(f"error: --device {name}: ") and "; here there is cpu" in line


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without one")
@pytest.mark.parametrize("name", ["cuda", "mps", "xpu"])
def test_accelerators_that_are_not_here(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--device {name}: [^\n]+; here there is cpu$"):
        device_for(name)


def test_devices_that_are_here() -> None:
    assert device_for("cpu") == torch.device("cpu")
    if torch.accelerator.is_available():
        assert device_for(str(torch.accelerator.current_accelerator())).type != "cpu"


def test_dtypes() -> None:
    assert [dtype_for(name) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32, torch.bfloat16, torch.float16,
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--dtype int8: expected float32, bfloat16 or float16"):
        dtype_for("int8")


def test_every_command_asks_the_one_function() -> None:
    """A command with ``--device`` that hands the name on itself would print a traceback of PyTorch's."""
    files = list(Path(hf_tokenprune.cli.__file__).parent.glob("*.py"))
    with_option = [path for path in files if path.name != "options.py" and "DeviceOpt" in path.read_text()]
    assert {path.stem for path in with_option} >= set(COMMANDS)
    for path in with_option:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        with_accelerator = "EvalDeviceOpt" in names and path.stem != "data_options"
        asks = "placement" if with_accelerator else "device_for"
        assert asks in names, "`placement` of data_options.py asks it, for commands with an accelerator"
