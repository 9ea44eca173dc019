"""The checkpoint that a command is given: what is wrong with it, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config_files import ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME, find_config_file
from ..errors import TokenPruneError

NO_MODEL = (
    "holds an adapter of PEFT and no model: load it with hf_tokenprune.from_pretrained, save what merge_and_unload() "
    "gives with hf_tokenprune.save_pretrained, and give the folder of that"
)


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
        if (local / ADAPTER_CONFIG_NAME).is_file() and not (local / MODEL_CONFIG_NAME).is_file():
            raise TokenPruneError(f"the folder {path!r} {NO_MODEL}")
        if not (local / MODEL_CONFIG_NAME).is_file():
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
    except OSError as error:  # whose lines after the first say why, and what to do
        raise TokenPruneError(f"{where}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if not local.is_dir() and find_config_file(path, file=ADAPTER_CONFIG_NAME) is not None:
            raise TokenPruneError(f"the repository {path!r} {NO_MODEL}") from error
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
