"""The checkpoint that a command is given: what is wrong with it, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import TokenPruneError


def read_config(path: str) -> Any:
    """The Transformers config of a checkpoint in a folder, or on the Hub.

    Raises:
        TokenPruneError: there is no such checkpoint, or Transformers does not know what it is.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    from transformers import AutoConfig

    local, where = Path(path), f"{path!r}"
    if local.is_file():
        raise TokenPruneError(f"{path!r} is a file; give the folder of the checkpoint, the one with its config.json")
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise TokenPruneError(f"the folder {path!r} is no checkpoint: it holds no config.json")
    else:
        try:
            validate_repo_id(path)
        except HFValidationError as error:
            raise TokenPruneError(
                f"there is no folder {path!r} (working directory: {Path.cwd()}), and no name on the Hub looks like that"
            ) from error
        where = f"there is no folder {path!r} (working directory: {Path.cwd()}), and from the Hub it cannot be read"
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise TokenPruneError(f"{where}: {first_line(error)}") from error


def load_weights(model_class: Any, path: str) -> Any:
    """``model_class.from_pretrained(path)``.

    Raises:
        TokenPruneError: the weights are not there, cannot be read, or are of another model than the config.
    """
    from safetensors import SafetensorError

    try:
        return model_class.from_pretrained(path)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TokenPruneError(f"the weights of {path!r} cannot be loaded: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error of another library says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
