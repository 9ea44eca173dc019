"""Loading and saving a model together with its prune config, on the Hub or on disk.

Where a checkpoint says more than once how it is pruned, the order is: argument, ``prune_config.json``, then the key
``prune_config`` in ``config.json`` (which stock ``save_pretrained``, ``Trainer`` and ``push_to_hub`` write).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from ..config import CONFIG_NAME, PruneConfig, as_config, find_config_file
from ..engine import ConfigLike, current_config, prune
from ..errors import ConfigError, PruneStateError

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

_originals: dict[type, Any] = {}
_part_of_a_load: ContextVar[bool] = ContextVar("part_of_a_load", default=False)


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    prune_config: ConfigLike | None = None,
    auto_class: type | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint and prune it.

    Args:
        path_or_repo: local folder, or ``owner/name`` on the Hub.
        prune_config: a config, its dictionary, or a path or repository that holds one. None: the checkpoint's own.
        auto_class: such as ``AutoModelForImageClassification``. None: the class named in the checkpoint's
            ``architectures``, if it is one of Transformers' own, else ``AutoModel``.
        kwargs: for ``auto_class.from_pretrained``.

    Returns:
        The pruned model, in eval mode as stock ``from_pretrained`` leaves it (with ``output_loading_info=True``: the
        same pair as there).

    Raises:
        ConfigError: no config was given and the checkpoint has none, or the config is invalid or does not fit.
        UnsupportedModelError: the model cannot be pruned.
    """
    from transformers import AutoConfig

    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    remote = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    model_config = kwargs.get("config") or path_or_repo
    if isinstance(model_config, (str, os.PathLike)):
        model_config = AutoConfig.from_pretrained(model_config, **hub_kwargs, **remote)
    chosen = choose_config(path_or_repo, prune_config, getattr(model_config, "prune_config", None), hub_kwargs)
    if chosen is None:
        raise ConfigError(
            f"no prune config for {str(path_or_repo)!r}: give prune_config=..., or add a {CONFIG_NAME}; "
            "to load it dense, use Transformers' own from_pretrained"
        )
    with _one_load():
        loaded = (auto_class or class_of(model_config)).from_pretrained(path_or_repo, **kwargs)  # type: ignore[union-attr]
    prune(_model_of(loaded), chosen)
    return loaded


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> None:
    """Save a pruned model as a stock checkpoint with ``prune_config.json`` beside it.

    Args:
        push_to_hub: upload both as well, the config in a commit of its own, to ``repo_id`` (None: the folder's name).
        token: of the Hub; None: the one you are logged in with.
        kwargs: for ``model.save_pretrained``; with ``push_to_hub`` also ``private``, ``commit_message``, ``create_pr``.

    Raises:
        PruneStateError: the model is not pruned.
    """
    config = current_config(model)
    if config is None:
        raise PruneStateError("this model is not pruned; call prune first, or save it with model.save_pretrained")
    repo_id = repo_id or Path(save_directory).resolve().name
    hub = {"push_to_hub": True, "repo_id": repo_id, "token": token} if push_to_hub else {}
    model.save_pretrained(save_directory, **hub, **kwargs)  # type: ignore[operator]
    config.save_pretrained(save_directory)
    if push_to_hub:
        config.push_to_hub(repo_id, token=token, create_pr=kwargs.get("create_pr", False))


def enable_auto() -> None:
    """Let stock ``AnyModel.from_pretrained`` and ``pipeline(model=path)`` prune by themselves, from now on.

    They then take ``prune_config=`` and follow the config that a checkpoint carries; checkpoints without one load dense
    as ever. Calling it twice changes nothing; :func:`disable_auto` undoes it.
    """
    from transformers import AutoConfig, PreTrainedModel

    if _originals:
        return
    for cls, wrap in ((PreTrainedModel, _pruning_loader), (AutoConfig, _argument_keeper)):
        _originals[cls] = cls.__dict__["from_pretrained"]
        cls.from_pretrained = classmethod(wrap(_originals[cls].__func__))


def disable_auto() -> None:
    """Give Transformers its own ``from_pretrained`` back. Models loaded before stay as they are."""
    for cls, original in _originals.items():
        cls.from_pretrained = original  # type: ignore[attr-defined]
    _originals.clear()


def choose_config(
    path_or_repo: str | os.PathLike[str] | None,
    argument: ConfigLike | None,
    config_key: Any,
    hub_kwargs: dict[str, Any],
) -> PruneConfig | None:
    """The prune config that counts for a checkpoint, or None. Two that disagree make a warning that names both."""
    found: list[tuple[str, PruneConfig]] = []
    if argument is not None:
        found.append(("the argument prune_config", as_config(argument)))
    file = None if path_or_repo is None else find_config_file(path_or_repo, **hub_kwargs)
    if file is not None:
        found.append((f"its {CONFIG_NAME}", PruneConfig.from_pretrained(file)))
    if config_key is not None:
        found.append(("the key prune_config of its config.json", as_config(config_key)))
    if not found:
        return None
    (source, chosen), *others = found
    for other_source, other in others:
        if other != chosen:
            warnings.warn(
                f"{str(path_or_repo)!r}: {source} ({chosen}) and {other_source} ({other}) disagree; using the former",
                stacklevel=3,
            )
    return chosen


def _model_of(loaded: Any) -> Any:
    return loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True returns a pair


def class_of(model_config: Any) -> Any:
    import transformers

    for name in model_config.architectures or ():
        candidate = getattr(transformers, name, None)
        if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel):
            return candidate
    return transformers.AutoModel


@contextmanager
def _one_load() -> Iterator[None]:
    """What is loaded inside stays dense unless it has an argument of its own: its caller prunes the whole."""
    token = _part_of_a_load.set(True)
    try:
        yield
    finally:
        _part_of_a_load.reset(token)


def _pruning_loader(load: Any) -> Any:
    """``PreTrainedModel.from_pretrained`` that prunes what it loaded."""

    @functools.wraps(load)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        argument = kwargs.pop("prune_config", None)
        with _one_load():
            loaded = load(cls, pretrained_model_name_or_path, *args, **kwargs)
        if argument is None and _part_of_a_load.get():
            return loaded
        model = _model_of(loaded)
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        config_key = getattr(model.config, "prune_config", None)
        chosen = choose_config(pretrained_model_name_or_path, argument, config_key, hub_kwargs)
        if chosen is not None:
            prune(model, chosen)
        return loaded

    return from_pretrained


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
