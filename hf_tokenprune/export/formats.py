"""Writing a graph: by format, the file that an engine reads."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from ..errors import UnsupportedModelError
from ..evaluation.optional import require

Format = Literal["onnx", "torch-export", "openvino"]
FILES: dict[Format, str] = {"onnx": "model.onnx", "torch-export": "model.pt2", "openvino": "model.xml"}
NEEDS: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnxscript", "onnxruntime"),
    "torch-export": (),
    "openvino": ("onnxscript", "openvino"),
}
"""Modules of the extra with the name of the format."""


def write(program: ExportedProgram, file: Path, format: Format, int8: bool = False) -> None:
    """Write a graph to a file; OpenVINO and large ONNX files have their weights in another one beside it.

    Args:
        int8: of ONNX, see `quantize_onnx`.
    """
    if format == "torch-export":
        # Regions without autocast, in which tokens are chosen, cannot be saved; decomposed, they are plain operators.
        with _quiet():
            torch.export.save(program.run_decompositions({}), file)
    elif format == "onnx" and not int8:
        write_onnx(program, file)
    else:
        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / FILES["onnx"]
            write_onnx(program, onnx)
            if int8:
                quantize_onnx(onnx, file)
            else:  # OpenVINO converts this in a third of the time that a graph of torch takes
                openvino: Any = require("openvino", "openvino")
                openvino.save_model(openvino.convert_model(onnx), file, compress_to_fp16=False)


def write_onnx(program: ExportedProgram, file: Path) -> None:
    """Write an ONNX file.

    Raises:
        UnsupportedModelError: the graph has operators that ONNX lacks.
    """
    outputs = program.graph_signature.user_outputs
    names = list(program.call_spec.out_spec.unflatten(outputs))
    with _quiet():
        try:
            made: Any = torch.onnx.export(program, dynamo=True, verbose=False, output_names=names)
        except torch.onnx.OnnxExporterError as error:
            raise UnsupportedModelError(
                f"ONNX has no operator for a part of this graph ({error.__cause__ or error}); export it as torch-export"
            ) from error
    made.rename_axes({made.model.graph.inputs[0].shape[0]: "batch"})
    made.save(file)


def quantize_onnx(file: Path, out: Path) -> None:
    """Int8 for the linear layers of an ONNX file: weights by output channel, what enters them at run time.

    Of weights 7 bits are used: with 8, processors without VNNI overflow. Convolutions stay as they are, because ONNX
    Runtime has no fast ones in int8.
    """
    quantization: Any = require("onnxruntime.quantization", "onnx")
    layers = ["MatMul", "Gemm"]
    with _quiet():
        quantization.quantize_dynamic(file, out, op_types_to_quantize=layers, per_channel=True, reduce_range=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, exporters say nothing about themselves, or about packages that are not here and not needed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
