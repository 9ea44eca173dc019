"""Saving a pruned model with its prune config, and uploading both in one commit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from ..config_files import CONFIG_NAME
from ..engine import current_config
from ..errors import PruneStateError, UnsupportedModelError
from .adapters import adapter_folders, save_beside_adapters

OF_THE_COMMIT = ("commit_message", "commit_description", "create_pr", "revision")
OF_THE_REPOSITORY = ("private", "tags")


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    push_to_hub: bool = False,
    repo_id: str | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> None:
    """Save a pruned model as a stock checkpoint with ``prune_config.json`` beside it.

    Of a model with adapters of PEFT these are saved alone, as PEFT does, each with the file beside it.

    Args:
        push_to_hub: upload what was saved as well, in one commit, to ``repo_id`` (None: the folder's name).
        token: of the Hub; None: the one you are logged in with.
        kwargs: for ``model.save_pretrained``; with ``push_to_hub`` also ``private``, ``tags``, ``commit_message``,
            ``commit_description``, ``create_pr`` and ``revision`` (a branch, made if need be).

    Raises:
        PruneStateError: the model is not pruned.
        UnsupportedModelError: ``push_to_hub`` of adapters.
    """
    config, folder = current_config(model), Path(save_directory)
    if config is None:
        left = f", and delete the {CONFIG_NAME} in {folder}" if (folder / CONFIG_NAME).exists() else ""
        raise PruneStateError(
            f"this model is not pruned; call prune first, or save it with model.save_pretrained{left}"
        )
    adapters = adapter_folders(model, folder)
    if adapters and push_to_hub:
        raise UnsupportedModelError(
            "push_to_hub=True uploads a whole model, and this one's adapters are saved alone: call "
            "model.push_to_hub(repo_id), then push_to_hub(repo_id) of its prune config"
        )
    hub = {name: kwargs.pop(name) for name in (*OF_THE_COMMIT, *OF_THE_REPOSITORY) if name in kwargs and push_to_hub}
    before = _times(folder)
    model.save_pretrained(save_directory, **kwargs)  # type: ignore[operator]
    if adapters:
        save_beside_adapters(model, folder, **kwargs)
        return
    config.save_pretrained(folder, also_in_model=True)
    if push_to_hub:
        saved = [path for path, time in _times(folder).items() if before.get(path) != time]
        hub.setdefault("commit_message", f"Upload {type(model).__name__}, pruned by {config.method}")
        hub.setdefault("tags", getattr(model, "model_tags", None))
        _upload(saved, folder / "README.md", repo_id or folder.resolve().name, token, **hub)


def _times(folder: Path) -> dict[Path, int]:
    """The files of a folder and when they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def _upload(
    files: list[Path],
    card: Path,
    repo_id: str,
    token: str | None,
    private: bool | None = None,
    tags: list[str] | None = None,
    **commit: Any,
) -> None:
    """One commit of the files and of a model card, which is the repository's or a new one, as in stock pushing."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from transformers.utils.hub import create_and_tag_model_card

    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    create_and_tag_model_card(repo_id, tags, token=token).save(card)
    revision = commit.get("revision")
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    operations = [CommitOperationAdd(path.name, path) for path in sorted({*files, card})]
    api.create_commit(repo_id, operations, token=token, **commit)
