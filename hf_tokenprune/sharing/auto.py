"""Stock loading and saving that knows of prune configs: opt-in, since it changes classes of Transformers and PEFT."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from ..config import PruneConfig, as_config
from ..config_files import found_commit
from ..engine import KINDS, ConfigLike, find_adapter, prune
from ..errors import UnsupportedModelError
from .adapters import save_beside_adapters, warn_of_other_pruning
from .pretrained import HUB_KWARGS, PART_OF_A_LOAD, choose_config, model_of, one_load

_originals: dict[tuple[type, str], Any] = {}
"""What stands at an attribute of a class where ``enable_auto`` was not called."""


_for_all: list[PruneConfig] = []
"""What ``enable_auto`` was given, if anything."""


def enable_auto(prune_config: ConfigLike | None = None) -> None:
    """Let stock ``AnyModel.from_pretrained`` and ``pipeline(model=path)`` prune by themselves, from now on.

    They then take ``prune_config=`` and follow the config that a checkpoint carries; checkpoints without one load dense
    as ever. A ``Trainer`` made from now on warns where it resumes with a model that is pruned otherwise. Where PEFT is
    installed, adapters are saved with the config beside them, and loading one warns where the model under it is pruned
    otherwise. Calling it twice changes nothing, but for the config of the last call; ``disable_auto`` undoes it.

    Args:
        prune_config: for programs that load models themselves, such as a server or an evaluation harness: every model
            that is loaded without ``prune_config=`` is pruned by it, whatever its checkpoint carries. One that it is
            not for, of a family without an adapter or of another kind (a text encoder, a vision encoder beside a
            vision-language model), loads as ever, with a warning.

    Raises:
        ConfigError: ``prune_config`` is invalid.
    """
    from transformers import AutoConfig, PreTrainedModel
    from transformers.trainer import DEFAULT_CALLBACKS
    from transformers.utils import is_peft_available

    from .resume import PruningCallback

    _for_all[:] = [] if prune_config is None else [as_config(prune_config)]
    if _originals:
        return
    DEFAULT_CALLBACKS.append(PruningCallback)
    wrapped: list[tuple[Any, str, Any]] = [
        (PreTrainedModel, "from_pretrained", _pruning_loader),
        (AutoConfig, "from_pretrained", _argument_keeper),
    ]
    if is_peft_available():
        from peft import PeftModel

        wrapped += [
            (cls, name, wrap)
            for cls in (PeftModel, PreTrainedModel)  # which may have adapters without PEFT's model around it
            for name, wrap in (("load_adapter", _warning_loader), ("save_pretrained", _adapter_saver))
        ]
    for cls, name, wrap in wrapped:
        original = _originals[cls, name] = cls.__dict__.get(name)  # None: of a base
        function = getattr(original, "__func__", original or getattr(cls, name))
        setattr(cls, name, classmethod(wrap(function)) if isinstance(original, classmethod) else wrap(function))


def disable_auto() -> None:
    """Give Transformers its own ``from_pretrained`` back. Models loaded before stay as they are."""
    from transformers.trainer import DEFAULT_CALLBACKS

    from .resume import PruningCallback

    if _originals:
        DEFAULT_CALLBACKS.remove(PruningCallback)
    for (cls, name), original in _originals.items():
        if original is None:
            delattr(cls, name)
        else:
            setattr(cls, name, original)
    _originals.clear()
    _for_all.clear()


def _pruning_loader(load: Any) -> Any:
    """``PreTrainedModel.from_pretrained`` that prunes what it loaded."""

    @functools.wraps(load)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        argument = kwargs.pop("prune_config", None)
        with one_load():
            loaded = load(cls, pretrained_model_name_or_path, *args, **kwargs)
        if argument is None and PART_OF_A_LOAD.get():
            return loaded
        model, where = model_of(loaded), pretrained_model_name_or_path
        if argument is None and _for_all:
            argument = _if_for(model, _for_all[0])
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if (commit := found_commit(where, **hub_kwargs)) is not None:
            hub_kwargs["revision"] = commit
        config_key, chosen = getattr(model.config, "prune_config", None), None
        if getattr(model, "_hf_peft_config_loaded", False):  # where: of the adapter, or (auto classes) of its model
            of_adapter = dict(kwargs.get("adapter_kwargs") or {})
            adapter = of_adapter.pop("_adapter_model_path", where)
            own = hub_kwargs if adapter == where else of_adapter
            chosen = choose_config(adapter, argument, None, {name: own[name] for name in HUB_KWARGS if name in own})
            where = None if adapter == where else where
        if chosen is None:
            chosen = choose_config(where, argument, config_key, hub_kwargs)
        if chosen is not None:
            prune(model, chosen)
        return loaded

    return from_pretrained


def _if_for(model: Any, config: PruneConfig) -> PruneConfig | None:
    """The config that is for all models, where it is for such ones; else None, with a warning."""
    try:
        kind = find_adapter(model).shape(model).kind
        reason = None if kind in config.prunes else f"it is one of the {KINDS[kind]}"
    except UnsupportedModelError as error:
        reason = str(error)
    if reason is None:
        return config
    warnings.warn(
        f"this {type(model).__name__} is not pruned by {config}, which enable_auto was given: {reason}", stacklevel=3
    )
    return None


def _warning_loader(load: Any) -> Any:
    """``load_adapter`` of PEFT or Transformers that warns where the adapter was trained under another pruning."""

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(self, *args, **kwargs)
        where = args[0] if args else kwargs.get("model_id", kwargs.get("peft_model_id"))
        if where is not None and not PART_OF_A_LOAD.get():
            given = {**kwargs, **(kwargs.get("adapter_kwargs") or {})}
            warn_of_other_pruning(self, where, **{name: given[name] for name in HUB_KWARGS if name in given})
        return loaded

    return load_adapter


def _adapter_saver(save: Any) -> Any:
    """``save_pretrained`` of PEFT or Transformers that writes the config beside adapters."""

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        saved = save(self, save_directory, *args, **kwargs)
        save_beside_adapters(self, save_directory, **kwargs)
        return saved

    return save_pretrained


def _argument_keeper(load: Any) -> Any:
    """``AutoConfig.from_pretrained``, which every auto class and pipeline asks first, that leaves ``prune_config=`` to
    the model: it would overwrite what the checkpoint's own config says."""

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        argument = {name: kwargs.pop(name) for name in ("prune_config",) if name in kwargs}
        loaded = load(cls, *args, **kwargs)
        if kwargs.get("return_unused_kwargs"):
            config, unused = loaded
            return config, {**unused, **argument}
        return loaded

    return from_pretrained
