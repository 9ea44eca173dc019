"""Saving a pruned model with its prune config, and uploading both in one commit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from torch import nn

from ..atomic import write_text
from ..config import PruneConfig
from ..config_files import ADAPTER_CONFIG_NAME, CONFIG_NAME
from ..engine import current_config
from ..errors import ConfigError, PruneStateError, UnsupportedModelError
from .adapters import adapter_folders, check_saving, save_beside_adapters
from .card import Report, model_card, read_card, row_of
from .in_place import save_in_place
from .upload import CARD_NAME, check_login, check_repo_id, upload

OF_THE_UPLOAD = ("private", "commit_message", "commit_description", "create_pr", "revision")


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | None = None,
    reports: Mapping[str, Report] | None = None,
    **kwargs: Any,
) -> CommitInfo | None:
    """Save a pruned model as a stock checkpoint with ``prune_config.json`` beside it.

    Of a model with adapters of PEFT these are saved alone, as PEFT does, each with the file beside it.

    Args:
        push_to_hub: upload what was saved as well, in one commit with a model card, to ``repo_id`` (None: the folder's
            name). The card is the folder's ``README.md``, else that of the repository, else a new one; its text stays.
        token: of the Hub; None: the one you are logged in with.
        reports: for the model card, of ``evaluate_paired`` and its like, by the data set that each is on:
            ``{"uoft-cs/cifar10": report}``. Without ``push_to_hub`` the card is written to the folder.
        kwargs: for ``model.save_pretrained``; with ``push_to_hub`` also ``private``, ``tags``, ``commit_message``,
            ``commit_description``, ``create_pr`` and ``revision`` (a branch, made if need be).

    Returns:
        With ``push_to_hub`` the commit, whose ``pr_url`` is that of a pull request.

    Raises:
        PruneStateError: the model is not pruned.
        ConfigError: ``save_directory`` is a file, or holds an adapter of PEFT, ``repo_id`` is no name of a repository,
            nobody is logged in who could push, a setting of the push without one, the card that is there cannot be
            read, or reports do not say which run is of this model.
        UnsupportedModelError: ``push_to_hub`` of adapters, or adapters that could not be loaded again.
    """
    config, folder = current_config(model), Path(save_directory)
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder, which is made if need be")
    settings = {**kwargs, "token": token, "repo_id": repo_id if not reports else None}
    idle = [] if push_to_hub else [name for name in (*OF_THE_UPLOAD, "tags", "repo_id", "token") if settings.get(name)]
    if idle:
        raise ConfigError(f"{idle[0]}= has no effect without push_to_hub=True; give both, or leave it out")
    if config is None:
        left = f", and delete the {CONFIG_NAME} in {folder}" if (folder / CONFIG_NAME).exists() else ""
        raise PruneStateError(
            f"this model is not pruned; call prune first, or save it with model.save_pretrained{left}"
        )
    check_saving(model)
    adapters = adapter_folders(model, folder)
    if adapters and (push_to_hub or reports):
        raise UnsupportedModelError(
            "push_to_hub=True and reports are of a whole model, and this one's adapters are saved alone: save without "
            "them, call model.push_to_hub(repo_id), then push_to_hub(repo_id) of its prune config"
        )
    if adapters:
        model.save_pretrained(save_directory, **kwargs)  # type: ignore[operator]
        save_beside_adapters(model, folder, **kwargs)
        return None
    if (folder / ADAPTER_CONFIG_NAME).exists():
        raise ConfigError(
            f"{folder} holds an adapter of PEFT ({ADAPTER_CONFIG_NAME}), which loading puts on a model that is there, "
            "though it may be merged into it already; give another folder"
        )
    if not kwargs.get("is_main_process", True):  # the main one writes, and uploads
        return None
    repo_id = repo_id or folder.resolve().name
    if push_to_hub:
        check_repo_id(repo_id)
        check_login(token)
    for dataset, report in (reports or {}).items():
        row_of(report, config.method, dataset)
    if push_to_hub or reports:
        read_card(folder / CARD_NAME)
    about = {name: kwargs.pop(name) for name in OF_THE_UPLOAD if name in kwargs}
    tags = kwargs.pop("tags", None)
    before = _times(folder)
    save_in_place(model, config, folder, **kwargs)
    card = folder / CARD_NAME
    if push_to_hub:
        saved = [path for path, time in _times(folder).items() if before.get(path) != time or path == card]
        return push_files(saved, model, config, repo_id, tags, reports, token=token, **about)
    if reports:
        write_text(card, str(model_card(model, config, repo_id, read_card(card), reports=reports)))
    return None


def push_files(
    files: Iterable[Path],
    model: nn.Module,
    config: PruneConfig,
    repo_id: str,
    tags: Iterable[str] | None = None,
    reports: Mapping[str, Report] | None = None,
    **kwargs: Any,
) -> CommitInfo:
    """Upload files of a pruned checkpoint and its card.

    Args:
        model: pruned, or dense; the card tells its sizes.
        kwargs: for ``upload``.
    """
    all_tags = [*(getattr(model, "model_tags", None) or ()), *(tags or ())]

    def describe(repo_id: str, card: ModelCard | None, **about: Any) -> ModelCard:
        return model_card(model, config, repo_id, card, tags=all_tags, reports=reports, **about)

    kwargs.setdefault("commit_message", f"Upload {type(model).__name__}, pruned by {config.method}")
    return upload({path.name: path for path in files}, describe, repo_id, **kwargs)


def _times(folder: Path) -> dict[Path, int]:
    """The files of a folder and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}
