"""Uploading to the Hub: files and their model card, in one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..config import PruneConfig
from ..config_files import ADAPTER_CONFIG_NAME, CONFIG_NAME, MODEL_CONFIG_NAME
from ..errors import ConfigError
from .card import config_card, read_card

CARD_NAME = "README.md"
HOLDS = {MODEL_CONFIG_NAME: "model", ADAPTER_CONFIG_NAME: "adapter of PEFT"}
"""What a repository holds that has a file of this name."""
Describe = Callable[..., ModelCard]
NO_ANSWER = HfHubHTTPError.__bases__[0]
"""Of the client's HTTP library, which is another one from release to release."""


def upload(
    files: Mapping[str, Path | bytes],
    describe: Describe,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool | None = None,
    **commit: Any,
) -> CommitInfo:
    """One commit, or one pull request, of files and their card.

    Args:
        files: by their names in the repository. A card among them counts for more than the one that is there.
        describe: from ``(repo_id, card, revision=)`` to the card, where ``card`` is the one that is there, or None.
        repo_id: created if need be.
        private: if it is created.
        revision: a branch, made if need be; of a pull request the branch it is for, which has to be there.
        commit: for ``HfApi.create_commit``.

    Raises:
        HfHubHTTPError: the Hub refuses; its message says why.
        ConnectionError: there is no answer.
        ConfigError: ``repo_id`` is no name of a repository, or the card that is there cannot be read.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token)
    branch = None if revision is None or revision.startswith("refs/pr/") else revision
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch is not None and not create_pr:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        own = files.get(CARD_NAME)
        there = own if isinstance(own, Path) else _card_of(repo_id, revision, token)
        card = describe(repo_id, read_card(there), revision=None if create_pr else branch)
        operations = [CommitOperationAdd(*each) for each in sorted({**files, CARD_NAME: str(card).encode()}.items())]
        return api.create_commit(repo_id, operations, revision=revision, create_pr=create_pr, **commit)
    except HfHubHTTPError:  # an answer, with its reason
        raise
    except (NO_ANSWER, LocalEntryNotFoundError) as error:
        raise ConnectionError(f"the connection to {api.endpoint} is lost, nothing was committed: {error}") from error


def check_repo_id(repo_id: str) -> None:
    """Raise ConfigError for what is no name of a repository, before there is anything to upload."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"repo_id={repo_id!r}: expected owner/name. {error}") from error


def push_config(config: PruneConfig, repo_id: str, content: bytes, tags: Sequence[str], **kwargs: Any) -> CommitInfo:
    """Upload a config alone, see ``PruneConfig.push_to_hub``; ``content`` is that of its file."""

    def describe(repo_id: str, card: ModelCard | None, **about: Any) -> ModelCard:
        api, at = HfApi(token=kwargs.get("token")), about["revision"]
        there = (what for file, what in HOLDS.items() if api.file_exists(repo_id, file, revision=at))
        return config_card(config, repo_id, card, tags=tags, beside=next(there, None), **about)

    kwargs.setdefault("commit_message", f"Upload {CONFIG_NAME} ({config.method})")
    return upload({CONFIG_NAME: content}, describe, repo_id, **kwargs)


def _card_of(repo_id: str, revision: str | None, token: str | None) -> Path | None:
    """The card of a repository, downloaded."""
    try:
        return Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token))
    except LocalEntryNotFoundError:  # no answer: a card that may be there must not be written over
        raise
    except EntryNotFoundError:
        return None
