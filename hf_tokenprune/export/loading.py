"""Running what was exported, in the engine that it is for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..evaluation.optional import require
from .formats import FILES
from .graph import INPUT

Exported = Callable[[Tensor], dict[str, Tensor]]
"""``pixel_values`` (B, C, H, W) to the outputs by name."""


def load_exported(path: str | os.PathLike[str], threads: int | None = None) -> Exported:
    """What `export` wrote, as a function that runs it on the CPU.

    For measuring and comparing; to deploy it, give the file to the engine.

    Args:
        path: the file, or its folder: ``model.onnx`` runs in ONNX Runtime, ``model.xml`` in OpenVINO (in float32, also
            where the processor has bfloat16), ``model.pt2`` in PyTorch.
        threads: of ONNX Runtime and OpenVINO; None: as many as PyTorch uses.

    Returns:
        A function from ``pixel_values``, (B, C, H, W) in the type of the model, to its outputs by name.

    Raises:
        DataError: there is no such file.
        ImportError: the extra ``onnx`` or ``openvino`` is not installed.
    """
    given = Path(path)
    files = [given] if given.is_file() else [given / name for name in FILES.values() if (given / name).is_file()]
    if not files or files[0].name not in FILES.values():
        raise DataError(f"{given} is no exported model: expected {', '.join(FILES.values())}, or the folder of one")
    load = {"model.onnx": _onnxruntime, "model.xml": _openvino, "model.pt2": _torch}
    return load[files[0].name](files[0], threads or torch.get_num_threads())


def _onnxruntime(file: Path, threads: int) -> Exported:
    runtime: Any = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads would go on spinning behind a run, for a while in which another model may be running.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {INPUT: pixel_values.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


def _openvino(file: Path, threads: int) -> Exported:
    openvino: Any = require("openvino", "openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(file, "CPU", settings)

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        values = compiled({INPUT: pixel_values.numpy()})
        return {output.get_any_name(): torch.from_numpy(values[output].copy()) for output in compiled.outputs}

    return run


def _torch(file: Path, threads: int) -> Exported:
    module = torch.export.load(file).module()

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(module(pixel_values=pixel_values))

    return run
