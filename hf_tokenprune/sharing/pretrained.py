"""Loading a model together with its prune config, from the Hub or from disk.

A checkpoint says how it is pruned in ``prune_config.json``, in the key ``prune_config`` of ``config.json`` (which stock
``save_pretrained``, ``Trainer`` and ``push_to_hub`` write), or in both. An argument overrides them; without one the two
have to agree, because stock code that saves into a used folder writes the key and leaves the file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ..config import ALSO_IN, PruneConfig, as_config
from ..config_files import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    MODEL_CONFIG_NAME,
    find_config_file,
    found_commit,
    read_json,
    read_other,
)
from ..engine import ConfigLike, prune
from ..errors import ConfigError
from .adapters import OF_PEFT, base_of, read_adapter, said, same_pruning, with_adapter
from .fit import check_fit

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
OF_ONE_REPOSITORY = ("revision", "subfolder")
"""Those that say something about the checkpoint's repository; the others are about the machine and its user."""
OF_REMOTE_CODE = ("trust_remote_code",)

PART_OF_A_LOAD: ContextVar[bool] = ContextVar("part_of_a_load", default=False)
"""Whether a load goes on whose caller prunes the whole."""


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    prune_config: ConfigLike | None = None,
    auto_class: type | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint and prune it.

    Args:
        path_or_repo: local folder, or ``owner/name`` on the Hub; also of an adapter of PEFT, which names its model.
        prune_config: a config, its dictionary, the name of a method or preset, or a path or repository that holds one.
            None: the checkpoint's own. ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` hold for
            its repository too; ``revision`` and ``subfolder`` are those of the checkpoint. For others give
            ``PruneConfig.from_pretrained("owner/name", revision=...)``.
        auto_class: such as ``AutoModelForImageClassification``. None: the class named in the checkpoint's
            ``architectures``, if it is one of Transformers' own, else ``AutoModel``.
        kwargs: for ``auto_class.from_pretrained``; of an adapter also ``adapter_name`` and ``is_trainable``.

    Returns:
        The pruned model, in eval mode as stock ``from_pretrained`` leaves it (with ``output_loading_info=True``: the
        same pair as there). Of an adapter a ``PeftModel``.

    Raises:
        ConfigError: there is no such folder or repository; no config was given and the checkpoint has none, or two that
            disagree; or the config is invalid, or does not fit, which is found out before weights are downloaded.
        UnsupportedModelError: the model cannot be pruned.
    """
    from transformers import AutoConfig

    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    remote = {name: kwargs[name] for name in OF_REMOTE_CODE if name in kwargs}
    model_config = kwargs.get("config") or path_or_repo
    if isinstance(model_config, (str, os.PathLike)):
        where = model_config
        try:
            model_config = AutoConfig.from_pretrained(where, **hub_kwargs, **remote)
        except (OSError, ValueError) as error:
            file = find_config_file(where, **hub_kwargs)  # raises for a path or repository that is not there
            adapter = read_adapter(where, **hub_kwargs) if where == path_or_repo else None
            if adapter is not None:
                return _from_adapter(path_or_repo, adapter, prune_config, auto_class, hub_kwargs, kwargs)
            inside = sorted(path.parent.name for path in Path(where).glob(f"*/{ADAPTER_CONFIG_NAME}"))
            if inside:
                raise ConfigError(
                    f"{str(where)!r} holds adapters in its folders {', '.join(inside)}; "
                    f"from_pretrained({str(where)!r}, subfolder={inside[0]!r})"
                ) from error
            if file is None:
                raise
            raise ConfigError(
                f"{str(where)!r} holds a {CONFIG_NAME} and no model; give it beside a checkpoint: "
                f"from_pretrained(checkpoint, {str(where)!r})"
            ) from error
        # What is read from now on is of the same commit, whatever is pushed in between.
        if where == path_or_repo and (commit := found_commit(where, **hub_kwargs)) is not None:
            hub_kwargs["revision"] = kwargs["revision"] = commit
    chosen = choose_config(path_or_repo, prune_config, getattr(model_config, "prune_config", None), hub_kwargs)
    if chosen is None:
        raise _no_config(path_or_repo)
    model_class: Any = auto_class or class_of(model_config)
    source = f"the config {str(prune_config)!r}" if isinstance(prune_config, (str, os.PathLike)) else f"{chosen}"
    check_fit(model_class, model_config, chosen, path_or_repo, source)
    with one_load():
        loaded = model_class.from_pretrained(path_or_repo, **kwargs)
    prune(model_of(loaded), chosen)
    return loaded


def _from_adapter(
    path_or_repo: str | os.PathLike[str],
    about: dict[str, Any],
    prune_config: ConfigLike | None,
    auto_class: Any,
    hub_kwargs: dict[str, Any],
    kwargs: dict[str, Any],
) -> Any:
    """``from_pretrained`` of an adapter; ``about``: its adapter_config.json. Its model's own config comes last."""
    chosen = choose_config(path_or_repo, prune_config, None, hub_kwargs)
    of_base = {name: value for name, value in hub_kwargs.items() if name not in OF_ONE_REPOSITORY}
    of_base["revision"] = about.get("revision")
    of_peft = {name: kwargs[name] for name in OF_PEFT if name in kwargs}
    rest = {name: value for name, value in kwargs.items() if name not in (*HUB_KWARGS, *OF_PEFT)}
    remote = {name: rest[name] for name in OF_REMOTE_CODE if name in rest}
    base, base_config = base_of(about, path_or_repo, **of_base, **remote)
    named = (about.get("auto_mapping") or {}).get("base_model_class")
    model_class = auto_class or _class_called(named) or class_of(base_config)
    if (commit := found_commit(base, **of_base)) is not None:
        of_base["revision"] = commit
    if chosen is None:
        chosen = choose_config(base, None, getattr(base_config, "prune_config", None), of_base)
    if chosen is None:
        raise ConfigError(
            f"no prune config beside the adapter {str(path_or_repo)!r}, nor of its model {base!r}: PEFT alone writes "
            "none, so how the model was pruned that it was trained on is not known. Give prune_config=...; to load it "
            "dense, use PeftModel.from_pretrained"
        )
    with one_load():
        loaded = model_class.from_pretrained(base, **of_base, **rest)
        model = prune(with_adapter(model_of(loaded), path_or_repo, **hub_kwargs, **of_peft), chosen)
    return (model, *loaded[1:]) if isinstance(loaded, tuple) else model


def _no_config(path_or_repo: str | os.PathLike[str]) -> ConfigError:
    return ConfigError(
        f"no prune config for {str(path_or_repo)!r}: give prune_config=..., or add a {CONFIG_NAME}; "
        "to load it dense, use Transformers' own from_pretrained"
    )


def choose_config(
    path_or_repo: str | os.PathLike[str] | None,
    argument: ConfigLike | None,
    config_key: Any,
    hub_kwargs: dict[str, Any],
) -> PruneConfig | None:
    """The prune config that counts for a checkpoint, or None. An argument that overrides another makes a warning.

    Args:
        config_key: the key ``prune_config`` of the model's config.
        hub_kwargs: of the checkpoint, those of ``HUB_KWARGS``.

    Raises:
        ConfigError: there is no argument, and file and key disagree; or a config is invalid.
    """
    file = None if path_or_repo is None else find_config_file(path_or_repo, **hub_kwargs)
    found: list[tuple[str, PruneConfig]] = []
    if file is not None:
        found.append((f"its {CONFIG_NAME}", PruneConfig.read(file)))
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
            if not same_pruning(other, given):
                warnings.warn(
                    f"{str(path_or_repo)!r}: the argument prune_config ({said(given)}) and {source} ({said(other)}) "
                    "disagree; using the former",
                    stacklevel=3,
                )
        return given
    if file is not None:
        _check_that_the_folder_is_true(path_or_repo, file, dict(found))
    if not found:
        return None
    carried = found[0][1]
    return carried if path_or_repo is None else carried.completed(path_or_repo, **hub_kwargs)


def _check_that_the_folder_is_true(where: Any, file: Path, found: dict[str, PruneConfig]) -> None:
    """Raise ConfigError where ``config.json`` says something else than the file: it was saved anew, or by hand."""
    beside = file.with_name(MODEL_CONFIG_NAME)
    first, *others = found.values()
    if not others and ALSO_IN in read_json(file) and beside.is_file() and "prune_config" not in read_other(beside):
        against = f"it was saved with a {MODEL_CONFIG_NAME} that said so too, and the one beside it is of a dense model"
    elif not all(same_pruning(first, other) for other in others):
        against = " and ".join(f"{source} says {said(config)}" for source, config in list(found.items())[1:])
    else:
        return
    raise ConfigError(
        f"{str(where)!r}: its {CONFIG_NAME} says {said(first)}, but {against}. {MODEL_CONFIG_NAME} is "
        f"written whenever a model is saved, so {CONFIG_NAME} is probably left from a model that was here before: then "
        "delete it. Otherwise save the pruned model with hf_tokenprune.save_pretrained, which writes both. To load it "
        "as it is, give prune_config=..."
    )


def model_of(loaded: Any) -> Any:
    return loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True returns a pair


def class_of(model_config: Any) -> Any:
    from transformers import AutoModel

    return next(filter(None, map(_class_called, model_config.architectures or ())), AutoModel)


def _class_called(name: Any) -> Any:
    """A model class of Transformers, or None."""
    import transformers

    candidate = getattr(transformers, name, None) if isinstance(name, str) else None
    return candidate if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel) else None


@contextmanager
def one_load() -> Iterator[None]:
    """What is loaded inside stays dense unless it has an argument of its own: its caller prunes the whole."""
    token = PART_OF_A_LOAD.set(True)
    try:
        yield
    finally:
        PART_OF_A_LOAD.reset(token)
