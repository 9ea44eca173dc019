"""Exporting a model: a folder with the file, and what is to be known about it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..atomic import beside, put
from ..cost import cost
from ..engine import current_config, unwrapped
from ..errors import ConfigError, UnsupportedModelError
from ..evaluation.optional import require
from ..evaluation.zero_shot import TEMPLATES, zero_shot_classifier
from .formats import FILES, NEEDS, Format, write
from .graph import check_exportable, trace


def export(
    model: nn.Module,
    out: str | os.PathLike[str],
    format: Format = "onnx",
    *,
    int8: bool = False,
    image_size: tuple[int, int] | None = None,
    processor: Callable[..., Any] | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
) -> Path:
    """Write a vision encoder, pruned or dense, as a file that runs without Transformers and without this package.

    It takes ``pixel_values`` (B, C, H, W) in batches of any size B, and gives the tensors of the model's output by
    their names: ``logits`` (B, classes); or ``last_hidden_state``, of a pruned model with the tokens that are left, and
    ``pooler_output``. Of a two-tower model (CLIP, SigLIP) it is the image tower: ``image_embeds`` (B, D) of length 1,
    or with ``class_names`` the ``logits`` of zero-shot classification.

    Args:
        model: of a family with an adapter, as `prune` takes it; left as it is.
        out: folder to write to, new or empty. Beside the file it gets ``config.json`` (with the names of classes), and
            what there is of ``prune_config.json`` and ``preprocessor_config.json``.
        format: "onnx" (``model.onnx``), "torch-export" (``model.pt2``), "openvino" (``model.xml`` and ``model.bin``).
        int8: of ONNX files: linear layers compute in int8, as `onnxruntime.quantization.quantize_dynamic` makes them.
        image_size: (height, width) in pixels; None: the checkpoint's own.
        processor: of the checkpoint. It is saved beside the file, and embeds ``class_names``.
        class_names: what to call C classes, of which the text tower's embeddings become constants of the graph.
        templates: texts with ``{}`` where the name goes, see `zero_shot_classifier`.

    Returns:
        The file; `load_exported` runs it.

    Raises:
        ConfigError: an option does not fit the format or the model, or ``out`` is no empty folder.
        UnsupportedModelError: a vision-language model, a family without an adapter, or a model of which no graph for
            batches of any size can be made; the message says why.
        DataError: class names or templates cannot be used.
        ImportError: the extra ``onnx`` or ``openvino`` is not installed.
    """
    stock, folder = unwrapped(model), Path(out)
    check_exportable(stock)
    _check_options(stock, format, int8, class_names, processor)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; choose another one")
    if image_size is not None:
        cost(stock, image_size=image_size)  # raises ConfigError where it cannot be
    for module in NEEDS[format]:
        require(module, format)
    classes = None
    if class_names is not None and processor is not None:
        classes = zero_shot_classifier(stock, processor, class_names, templates)
    program = trace(stock, image_size, classes)
    with beside(folder) as new:
        file = new / FILES[format]
        write(program, file, format, int8)
        _write_about(stock, new, processor, class_names)
        for path in sorted(new.iterdir(), key=lambda path: path == file):
            put(path, folder / path.name)
    return folder / file.name


def _check_options(model: Any, format: Format, int8: bool, class_names: Any, processor: Any) -> None:
    if format not in get_args(Format):
        raise ConfigError(f"format={format!r}: expected one of {', '.join(get_args(Format))}")
    if int8 and format == "torch-export":
        raise ConfigError("int8=True is for ONNX; quantise the model with torchao, and export that as torch-export")
    if int8 and format == "openvino":
        raise ConfigError(
            "int8=True is for ONNX: OpenVINO computes in int8 what NNCF has quantised with images of yours; export the "
            "float model, and give its model.xml to nncf.quantize"
        )
    if class_names is not None and not hasattr(model, "get_text_features"):
        raise ConfigError(f"class_names= has no effect: {type(model).__name__} has no text tower; leave it out")
    if class_names is not None and processor is None:
        raise ConfigError("class_names= needs processor=, AutoProcessor.from_pretrained of the checkpoint")
    subclass = next((type(each) for each in model.parameters() if is_traceable_wrapper_subclass(each)), None)
    if subclass is not None and format != "torch-export":
        raise UnsupportedModelError(
            f"the weights are a {subclass.__name__}, for which {format} has no operators; export as torch-export, or "
            "export the model that was quantised, to ONNX with int8=True"
        )


def _write_about(model: Any, folder: Path, processor: Any, class_names: Sequence[str] | None) -> None:
    """What is to be known beside the file."""
    about = copy.deepcopy(model.config)
    if class_names is not None:
        about.id2label = dict(enumerate(class_names))
        about.label2id = {name: number for number, name in enumerate(class_names)}
    config = current_config(model)
    if config is None and hasattr(about, "prune_config"):  # of a checkpoint that was loaded dense
        del about.prune_config
    about.save_pretrained(folder)
    if config is not None:
        config.save_pretrained(folder, also_in_model=True)
    if processor is not None:
        getattr(processor, "image_processor", processor).save_pretrained(folder)
