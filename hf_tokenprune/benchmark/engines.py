"""Time outside PyTorch: the dense model and the pruned one exported, side by side in another engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..evaluation.optional import require
from ..export.formats import FILES, NEEDS, Format, write
from ..export.graph import check_exportable, trace
from ..export.loading import Exported, load_exported
from .timing import Arms, Repeats, interleave, seconds
from .vision import BenchmarkRow

ENGINES: dict[str, Format] = {"onnxruntime": "onnx", "openvino": "openvino"}
"""By engine, the format of its files."""


def check_engine(engine: str, model: Any) -> None:
    """Raise ConfigError for an engine that there is not, or that does not run such a model; or what it needs raises."""
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: expected pytorch, {' or '.join(ENGINES)}")
    check_exportable(model)
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
        name = str(parameter.dtype).removeprefix("torch.")
        raise ConfigError(
            f"engine={engine!r} is timed on the CPU in float32, and this model is on {parameter.device} in {name}; use "
            "cpu and float32"
        )
    for module in NEEDS[ENGINES[engine]]:
        require(module, ENGINES[engine])


def measure_exported(
    arms: Arms, engine: str, batch_sizes: Sequence[int], image_size: tuple[int, int] | None, repeats: Repeats
) -> tuple[list[BenchmarkRow], str]:
    """A row for each batch size, and which engine it was; every arm is one file for all of them."""
    check_engine(engine, arms.model)
    shape = arms.adapter.shape(arms.model)
    size = image_size or shape.image_size
    loaded: dict[str, Exported] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms.stages:
            path = Path(folder) / arm / FILES[ENGINES[engine]]
            path.parent.mkdir()
            write(arms.run(arm, lambda: trace(arms.model, image_size)), path, ENGINES[engine])
            loaded[arm] = load_exported(path)
        rows = []
        for batch_size in batch_sizes:
            pixels = torch.randn(batch_size, shape.num_channels, *size, generator=torch.Generator().manual_seed(0))
            runs = {arm: partial(seconds, partial(file, pixels)) for arm, file in loaded.items()}
            measured = interleave(runs, repeats, f"batch {batch_size}")
            rows.append(BenchmarkRow.of(batch_size, measured))
    return rows, f"{engine} {version(engine)}"
