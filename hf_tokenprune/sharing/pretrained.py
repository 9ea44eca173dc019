"""Loading a model together with its prune config, from the Hub or from disk.

A checkpoint says how it is pruned in ``prune_config.json``, in the key ``prune_config`` of ``config.json`` (which stock
``save_pretrained``, ``Trainer`` and ``push_to_hub`` write), or in both. An argument overrides them; without one the two
have to agree, because stock code that saves into a used folder writes the key and leaves the file.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..config import ALSO_IN, PruneConfig, as_config
from ..config_files import CONFIG_NAME, MODEL_CONFIG_NAME, find_config_file, read_json
from ..engine import ConfigLike, prune
from ..errors import ConfigError
from .fit import check_fit

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
OF_ONE_REPOSITORY = ("revision", "subfolder")
"""Those that say something about the checkpoint's repository; the others are about the machine and its user."""

_originals: dict[type, Any] = {}
_for_all: list[PruneConfig] = []
"""What :func:`enable_auto` was given, if anything."""
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
        prune_config: a config, its dictionary, the name of a method or preset, or a path or repository that holds one.
            None: the checkpoint's own. ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` hold for
            its repository too; ``revision`` and ``subfolder`` are those of the checkpoint. For others give
            ``PruneConfig.from_pretrained("owner/name", revision=...)``.
        auto_class: such as ``AutoModelForImageClassification``. None: the class named in the checkpoint's
            ``architectures``, if it is one of Transformers' own, else ``AutoModel``.
        kwargs: for ``auto_class.from_pretrained``.

    Returns:
        The pruned model, in eval mode as stock ``from_pretrained`` leaves it (with ``output_loading_info=True``: the
        same pair as there).

    Raises:
        ConfigError: there is no such folder or repository; no config was given and the checkpoint has none, or two that
            disagree; or the config is invalid, or does not fit, which is found out before weights are downloaded.
        UnsupportedModelError: the model cannot be pruned.
    """
    from transformers import AutoConfig

    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    remote = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    model_config = kwargs.get("config") or path_or_repo
    if isinstance(model_config, (str, os.PathLike)):
        where = model_config
        try:
            model_config = AutoConfig.from_pretrained(where, **hub_kwargs, **remote)
        except (OSError, ValueError) as error:
            if find_config_file(where, **hub_kwargs) is None:  # raises for a path or repository that is not there
                raise
            raise ConfigError(
                f"{str(where)!r} holds a {CONFIG_NAME} and no model; give it beside a checkpoint: "
                f"from_pretrained(checkpoint, {str(where)!r})"
            ) from error
    chosen = choose_config(path_or_repo, prune_config, getattr(model_config, "prune_config", None), hub_kwargs)
    if chosen is None:
        raise ConfigError(
            f"no prune config for {str(path_or_repo)!r}: give prune_config=..., or add a {CONFIG_NAME}; "
            "to load it dense, use Transformers' own from_pretrained"
        )
    model_class: Any = auto_class or class_of(model_config)
    source = f"the config {str(prune_config)!r}" if isinstance(prune_config, (str, os.PathLike)) else f"{chosen}"
    check_fit(model_class, model_config, chosen, path_or_repo, source)
    with _one_load():
        loaded = model_class.from_pretrained(path_or_repo, **kwargs)
    prune(_model_of(loaded), chosen)
    return loaded


def enable_auto(prune_config: ConfigLike | None = None) -> None:
    """Let stock ``AnyModel.from_pretrained`` and ``pipeline(model=path)`` prune by themselves, from now on.

    They then take ``prune_config=`` and follow the config that a checkpoint carries; checkpoints without one load dense
    as ever. A ``Trainer`` made from now on warns where it resumes with a model that is pruned otherwise. Calling it
    twice changes nothing, but for the config of the last call; :func:`disable_auto` undoes it.

    Args:
        prune_config: for programs that load models themselves, such as a server or an evaluation harness: every model
            that is loaded without ``prune_config=`` is pruned by it, whatever its checkpoint carries.

    Raises:
        ConfigError: ``prune_config`` is invalid.
    """
    from transformers import AutoConfig, PreTrainedModel
    from transformers.trainer import DEFAULT_CALLBACKS

    from .resume import PruningCallback

    _for_all[:] = [] if prune_config is None else [as_config(prune_config)]
    if _originals:
        return
    DEFAULT_CALLBACKS.append(PruningCallback)
    for cls, wrap in ((PreTrainedModel, _pruning_loader), (AutoConfig, _argument_keeper)):
        _originals[cls] = cls.__dict__["from_pretrained"]
        cls.from_pretrained = classmethod(wrap(_originals[cls].__func__))


def disable_auto() -> None:
    """Give Transformers its own ``from_pretrained`` back. Models loaded before stay as they are."""
    from transformers.trainer import DEFAULT_CALLBACKS

    from .resume import PruningCallback

    if _originals:
        DEFAULT_CALLBACKS.remove(PruningCallback)
    for cls, original in _originals.items():
        cls.from_pretrained = original  # type: ignore[attr-defined]
    _originals.clear()
    _for_all.clear()


def choose_config(
    path_or_repo: str | os.PathLike[str] | None,
    argument: ConfigLike | None,
    config_key: Any,
    hub_kwargs: dict[str, Any],
) -> PruneConfig | None:
    """The prune config that counts for a checkpoint, or None. An argument that overrides another makes a warning.

    Args:
        config_key: the key ``prune_config`` of the model's config.
        hub_kwargs: of the checkpoint, those of :data:`HUB_KWARGS`.

    Raises:
        ConfigError: there is no argument, and file and key disagree; or a config is invalid.
    """
    file = None if path_or_repo is None else find_config_file(path_or_repo, **hub_kwargs)
    found: list[tuple[str, PruneConfig]] = []
    if file is not None:
        found.append((f"its {CONFIG_NAME}", PruneConfig.from_pretrained(file)))
    if config_key is not None:
        source = f"the key prune_config of its {MODEL_CONFIG_NAME}"
        try:
            found.append((source, PruneConfig.from_dict(config_key)))  # a string would be a path or repository to read
        except ConfigError as error:
            raise ConfigError(f"{str(path_or_repo)!r}: {source}: {error}") from error
    if argument is not None:
        same = str(argument) == str(path_or_repo)  # then all that is said of the checkpoint's repository is said of it
        own = {name: value for name, value in hub_kwargs.items() if same or name not in OF_ONE_REPOSITORY}
        given = as_config(argument, **own)
        for source, other in found:
            if other != given:
                warnings.warn(
                    f"{str(path_or_repo)!r}: the argument prune_config ({given}) and {source} ({other}) disagree; "
                    "using the former",
                    stacklevel=3,
                )
        return given
    if file is not None:
        _check_that_the_folder_is_true(path_or_repo, file, dict(found))
    return found[0][1] if found else None


def _check_that_the_folder_is_true(where: Any, file: Path, said: dict[str, PruneConfig]) -> None:
    """Raise ConfigError where ``config.json`` says something else than the file: it was saved anew, or by hand."""
    beside = file.with_name(MODEL_CONFIG_NAME)
    if len(said) == 1 and ALSO_IN in read_json(file) and beside.is_file() and "prune_config" not in _keys(beside):
        against = f"it was saved with a {MODEL_CONFIG_NAME} that said so too, and the one beside it is of a dense model"
    elif len(set(said.values())) > 1:
        against = " and ".join(f"{source} says {config}" for source, config in list(said.items())[1:])
    else:
        return
    raise ConfigError(
        f"{str(where)!r}: its {CONFIG_NAME} says {next(iter(said.values()))}, but {against}. {MODEL_CONFIG_NAME} is "
        f"written whenever a model is saved, so {CONFIG_NAME} is probably left from a model that was here before: then "
        "delete it. Otherwise save the pruned model with hf_tokenprune.save_pretrained, which writes both. To load it "
        "as it is, give prune_config=..."
    )


def _keys(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


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
        argument = next(iter(_for_all), None) if argument is None else argument
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
