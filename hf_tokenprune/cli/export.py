"""``hf-tokenprune export``: a file for another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .apply import one_config
from .options import (
    ClassNamesOpt,
    ConfigOpt,
    ImageSizeOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    SetOpt,
    TemplateOpt,
    load_dense,
    new_folder,
    readable_errors,
    show,
    size_for,
)
from .output import writable_folder


@readable_errors
def export(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="Folder to write to; must be new or empty.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="model.onnx, for ONNX Runtime and others.")] = False,
    torch_export: Annotated[bool, typer.Option("--torch-export", help="model.pt2, for torch.export.load.")] = False,
    openvino: Annotated[bool, typer.Option("--openvino", help="model.xml and model.bin.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="With --onnx: linear layers compute in int8.")] = False,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    dense: Annotated[bool, typer.Option("--dense", help="The model with all its tokens, to compare with.")] = False,
    image_size: ImageSizeOpt = None,
    class_names: ClassNamesOpt = None,
    template: TemplateOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a pruned vision encoder as a file for ONNX Runtime, OpenVINO or torch.export, for batches of any size.

    Of CLIP-like models it is the image tower, with --class-names the zero-shot classifier.
    """
    from ..engine import prune
    from ..evaluation.run import read_class_names
    from ..export import export as write
    from ..export.formats import FILES

    flags = dict(zip(FILES, (onnx, torch_export, openvino), strict=True))
    chosen = [name for name, given in flags.items() if given]
    if len(chosen) != 1:
        raise ConfigError(f"choose one of {', '.join(f'--{name}' for name in flags)}, got {len(chosen)}")
    if dense and (method or gmacs or prune_config):
        raise ConfigError("--dense exports the model with all its tokens; leave out -m, -g and -c, or --dense")
    writable_folder(new_folder(out))
    loaded, size = load_dense(model, "cpu"), size_for(image_size)
    name, config = "dense", None
    if not dense:
        name, config = one_config("export writes", loaded, model, method, set_, gmacs, prune_config, None, size)
        prune(loaded, config)
    texts: dict[str, Any] = {}
    if class_names is not None:
        texts["class_names"] = read_class_names(class_names)
    if template:
        texts["templates"] = template
    processor = _processor(model, loaded, texts)
    file = write(loaded, out, chosen[0], int8=int8, image_size=size, processor=processor, **texts)
    data = {"path": str(file), "config": config and config.to_dict(), "bytes": file.stat().st_size}
    show(as_json, data, f"{file}: {name}")


def _processor(path: str, model: Any, texts: dict[str, Any]) -> Any:
    """What prepares the images, for texts them too; None, which is said, where there is none and none is needed."""
    from ..evaluation import load_processor
    from ..evaluation.run import processor_of

    if texts:
        return processor_of(path, model)
    try:
        return load_processor(path)
    except (ImportError, OSError, ValueError) as error:
        typer.secho(f"note: no processor is beside the file: {error}", fg=typer.colors.YELLOW, err=True)
        return None
