"""Adapters of PEFT: their folders hold no model, so a ``prune_config.json`` beside ``adapter_config.json`` says how the
model was pruned that they were trained on."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..config import PruneConfig
from ..config_files import CONFIG_NAME, find_config_file
from ..engine import current_config, unwrapped
from ..errors import ConfigError, TokenPruneError, UnsupportedModelError

OF_PEFT = ("adapter_name", "is_trainable")
"""Arguments that say something about the adapter, not about the model under it."""


def read_adapter(path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> dict[str, Any] | None:
    """What ``adapter_config.json`` says; None if there is none."""
    from transformers.utils import find_adapter_config_file

    if os.path.isdir(path_or_repo):  # of subfolders there older versions know nothing
        path_or_repo = Path(path_or_repo, hub_kwargs.pop("subfolder", None) or "")
    file = find_adapter_config_file(os.fspath(path_or_repo), **hub_kwargs)
    about: dict[str, Any] | None = None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    return about


def base_of(about: dict[str, Any], path_or_repo: Any) -> str:
    """Path or repository of the model that an adapter is for.

    Raises:
        ConfigError: its ``adapter_config.json`` names none.
    """
    base = about.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"base_model_name_or_path={base!r} in the adapter_config.json of {str(path_or_repo)!r}: expected the model "
            "that it is for. Load that yourself, then PeftModel.from_pretrained(model, ...) and prune(model, ...)"
        )
    return base


def with_adapter(base: nn.Module, path_or_repo: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The ``PeftModel`` of a model and a saved adapter; ``kwargs`` are for ``PeftModel.from_pretrained``."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise TokenPruneError(f"{str(path_or_repo)!r} is an adapter of PEFT: pip install peft") from error
    return PeftModel.from_pretrained(base, os.fspath(path_or_repo), **kwargs)


def adapter_folders(
    model: Any, save_directory: str | os.PathLike[str], selected_adapters: Iterable[str] | None = None
) -> list[Path]:
    """Where ``model.save_pretrained`` puts adapters; empty for a model that it saves whole."""
    folder = Path(save_directory)
    if unwrapped(model) is model:
        return [folder] if getattr(model, "_hf_peft_config_loaded", False) else []
    return [folder if name == "default" else folder / name for name in selected_adapters or model.peft_config]


def save_beside_adapters(model: nn.Module, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write the config of a pruned model beside the adapters that its ``save_pretrained``, called so, has saved."""
    folders = adapter_folders(model, save_directory, kwargs.get("selected_adapters"))
    config = pruned_by(model) if folders and kwargs.get("is_main_process", True) else None
    if config is not None:
        for folder in folders:
            config.save_pretrained(folder)


def warn_of_other_pruning(model: nn.Module, path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> None:
    """Warn where an adapter that ``model`` has got was trained on one that was pruned otherwise."""
    file, now = find_config_file(path_or_repo, **hub_kwargs), pruned_by(model)
    then = None if file is None else PruneConfig.from_pretrained(file)
    if then is not None and then != now:
        warnings.warn(
            f"the adapter {str(path_or_repo)!r} says in its {CONFIG_NAME} that the model under it was {words(then)}; "
            f"this one is {words(now)}, and gives other logits: prune(model, {str(path_or_repo)!r})",
            stacklevel=4,
        )


def pruned_by(model: Any) -> PruneConfig | None:
    """The config of a model; None also for families without an adapter of this package."""
    try:
        return current_config(model)
    except UnsupportedModelError:
        return None


def words(config: PruneConfig | None) -> str:
    """How a model is pruned, in messages."""
    return "dense" if config is None else f"pruned by {config}"
