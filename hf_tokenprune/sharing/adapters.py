"""Adapters of PEFT: their folders hold no model, so a ``prune_config.json`` beside ``adapter_config.json`` says how the
model was pruned that they were trained on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..config import PruneConfig
from ..config_files import ADAPTER_CONFIG_NAME, CONFIG_NAME, find_config_file, read_other
from ..engine import current_config, unwrapped
from ..errors import ConfigError, TokenPruneError, UnsupportedModelError, shown

OF_PEFT = ("adapter_name", "is_trainable")
"""Arguments that say something about the adapter, not about the model under it."""
TYPES = {
    "base_model_name_or_path": (str, "a string"),
    "revision": (str, "a string"),
    "auto_mapping": (dict, "an object"),
}
"""What is read here of an ``adapter_config.json``; the rest is for PEFT."""


def read_adapter(path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> dict[str, Any] | None:
    """What ``adapter_config.json`` says; None if there is none.

    Raises:
        ConfigError: it is too large, not JSON, or a field that is read here is of another type.
    """
    file = find_config_file(path_or_repo, file=ADAPTER_CONFIG_NAME, **hub_kwargs)
    about = None if file is None else read_other(file)
    for field, (kind, words) in TYPES.items():
        value = (about or {}).get(field)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{file}: {field}={shown(value)}: expected {words}, or null")
    return about


def base_of(about: dict[str, Any], path_or_repo: Any, **kwargs: Any) -> tuple[str, Any]:
    """Path or repository of the model that an adapter is for, and the config of that model.

    Args:
        kwargs: for ``AutoConfig.from_pretrained``.

    Raises:
        ConfigError: its ``adapter_config.json`` names none, or one that is not there.
    """
    from transformers import AutoConfig

    base = about.get("base_model_name_or_path")
    by_hand = "Load that yourself, then PeftModel.from_pretrained(model, ...) and prune(model, ...)"
    named = f"base_model_name_or_path={shown(base)} in the {ADAPTER_CONFIG_NAME} of {str(path_or_repo)!r}"
    if not base:
        raise ConfigError(f"{named}: expected the model that it is for. {by_hand}")
    try:
        return base, AutoConfig.from_pretrained(base, **kwargs)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named} cannot be loaded. {by_hand}: {error}") from error


def with_adapter(base: nn.Module, path_or_repo: str | os.PathLike[str], **kwargs: Any) -> Any:
    """The ``PeftModel`` of a model and a saved adapter; ``kwargs`` are for ``PeftModel.from_pretrained``.

    Raises:
        TokenPruneError: PEFT is not installed.
        ConfigError: PEFT cannot make anything of what ``adapter_config.json`` says.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise TokenPruneError(f"{str(path_or_repo)!r} is an adapter of PEFT: pip install peft") from error
    try:
        return PeftModel.from_pretrained(base, os.fspath(path_or_repo), **kwargs)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"PEFT cannot put the adapter {str(path_or_repo)!r} on a {type(base).__name__}; look at its "
            f"{ADAPTER_CONFIG_NAME}: {type(error).__name__}: {error}"
        ) from error


def check_saving(model: Any) -> None:
    """Raise UnsupportedModelError where what ``model.save_pretrained`` writes of adapters could not be loaded again."""
    stock, name = unwrapped(model), type(model).__name__
    if stock is not model and not hasattr(type(model), "get_base_model"):
        raise UnsupportedModelError(f"PEFT saves no {name}: save what merge_and_unload() of it gives")
    if stock is not model and model.get_base_model() is not stock:
        raise UnsupportedModelError(
            f"this {name} is around another, and PEFT would save its adapters under names that no other model has: "
            "give get_peft_model a stock model, and for a second adapter call add_adapter of the PeftModel"
        )
    own = stock is not model or getattr(model, "_hf_peft_config_loaded", False)  # it saves its adapters alone
    layer = next((path for path, part in model.named_modules() if "base_layer" in part._modules), None)
    if layer is not None and not own:
        raise UnsupportedModelError(
            f"there is an adapter in {layer!r}, and loading a whole checkpoint would drop it and the weights under it: "
            "save the PeftModel around this model, or merge its adapters first (merge_and_unload)"
        )


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
    then = None if file is None else PruneConfig.read(file)
    if then is not None and not same_pruning(then, now):
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
    return "dense" if config is None else f"pruned by {said(config)}"


def same_pruning(one: PruneConfig | None, other: PruneConfig | None) -> bool:
    """Whether two configs make the same of a model, with the values that they put into it."""
    return one == other and (one and one.recovery) == (other and other.recovery)


def said(config: PruneConfig) -> str:
    """A config in messages, with the values that it puts into a model, if any."""
    return f"{config}" + (f", with {config.recovery}" if config.recovery else "")
