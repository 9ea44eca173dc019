"""An accelerator on a device that is named, for one process."""

from typing import Any

import torch

from hf_tokenprune.errors import ConfigError
from hf_tokenprune.evaluation.optional import require


def accelerator_on(device: torch.device | None) -> Any:
    """An ``accelerate.Accelerator``, on ``device`` if one is given; what accelerate itself keeps is left alone.

    Raises:
        ConfigError: a device, and a launcher that started several processes, each of which has one of its own.
        ImportError: `accelerate` is not installed.
    """
    accelerator = require("accelerate").Accelerator()
    if device is None:
        return accelerator
    if accelerator.num_processes > 1:
        raise ConfigError(
            f"--device {device}: a launcher started {accelerator.num_processes} processes and gives each its device; "
            "leave --device out, or start a single process"
        )
    return _On(accelerator, device)


class _On:
    """An accelerator but for its device."""

    def __init__(self, accelerator: Any, device: torch.device) -> None:
        self.accelerator = accelerator
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)
