"""Options of commands that evaluate on images: which columns, and where and in which type the model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .options import device_for, dtype_for

if TYPE_CHECKING:
    import torch

ImageColumnOpt = Annotated[str | None, typer.Option(help="Column of the images in a dataset. Default: image.")]
LabelColumnOpt = Annotated[
    str | None, typer.Option(help="Column of the labels: class numbers, or names as the model's. Default: label.")
]
NoLabelsOpt = Annotated[
    bool, typer.Option("--no-labels", help="Evaluate without: agreement and KL to the dense model alone.")
]
EvalDeviceOpt = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ... Default: accelerate's.")
]
EvalDtypeOpt = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. Default: the checkpoint's.")
]


def columns(image_column: str | None, label_column: str | None, no_labels: bool) -> dict[str, Any]:
    """The columns, as ``load_images`` takes them.

    Raises:
        ConfigError: labels are named and not wanted.
    """
    if no_labels and label_column is not None:
        raise ConfigError(f"--label-column {label_column} has no effect with --no-labels; leave one of them out")
    return {"image_column": image_column or "image", "label_column": None if no_labels else label_column or "label"}


def placement(device: str | None, dtype: str | None) -> tuple[Any, torch.dtype | None]:
    """The accelerator, on the device that is named, and the dtype (None: the checkpoint's).

    Raises:
        ConfigError: there is no such device or dtype, or several processes would share the one device.
    """
    from ..evaluation.accelerator import accelerator_on

    place = None if device is None else device_for(device)
    return accelerator_on(place), None if dtype is None else dtype_for(dtype)
