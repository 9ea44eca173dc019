"""Uploading to the Hub: files and their model card, in one commit."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..config import PruneConfig
from ..config_files import ADAPTER_CONFIG_NAME, CONFIG_NAME, MODEL_CONFIG_NAME
from ..errors import ConfigError
from ..weights import RECOVERY_NAME
from .card import config_card, read_card

CARD_NAME = "README.md"
HOLDS = {MODEL_CONFIG_NAME: "model", ADAPTER_CONFIG_NAME: "adapter of PEFT"}
"""What a repository holds that has a file of this name."""
OF_TRAINING = ("trainer_state.json", "latest", "zero_to_fp32.py")
"""What a ``Trainer``, or DeepSpeed, puts into its checkpoints beside the model and pickles."""
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
        ConfigError: ``repo_id`` is no name of a repository, nobody is logged in, or the card that is there cannot be
            read.
    """
    check_repo_id(repo_id)
    check_login(token)
    api = HfApi(token=token)
    branch = None if revision is None or revision.startswith("refs/pr/") else revision
    own = files.get(CARD_NAME)
    card = read_card(own) if isinstance(own, Path) else None
    with _answering(api):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch is not None and not create_pr:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        card = describe(
            repo_id,
            card or read_card(_card_of(repo_id, revision, token)),
            revision=None if create_pr else branch,
        )
        operations = [CommitOperationAdd(*each) for each in sorted({**files, CARD_NAME: str(card).encode()}.items())]
        return api.create_commit(repo_id, operations, revision=revision, create_pr=create_pr, **commit)


@contextmanager
def _answering(api: HfApi) -> Iterator[None]:
    """Where the Hub gives no answer inside, that is a ConnectionError."""
    try:
        yield
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


def check_login(token: str | None = None) -> None:
    """Raise ConfigError where there is no token to push with, before there is anything to upload; nothing is asked."""
    if not token and get_token() is None:
        raise ConfigError("nobody is logged in to the Hub, so nothing can be pushed: hf auth login, or set HF_TOKEN")


def check_user() -> None:
    """Ask the Hub whether it knows who is logged in.

    Raises:
        ConfigError: nobody is.
        HfHubHTTPError: the Hub does not know the token.
        ConnectionError: there is no answer.
    """
    check_login()
    api = HfApi()
    with _answering(api):
        api.whoami()


def files_of_model(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder that are of a model, and those that are not: the state of a ``Trainer``, and pickles, which
    run code when they are loaded. Hidden files and folders are in neither.

    Raises:
        ConfigError: there are no weights among the former.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    left = [path for path in files if path.name in OF_TRAINING or _is_pickle(path)]
    kept = [path for path in files if path not in left]
    if not any(path.suffix == ".safetensors" and path.name != RECOVERY_NAME for path in kept):
        raise ConfigError(
            f"the folder {str(folder)!r} holds no weights in *.safetensors, and no others are uploaded: load the model "
            "and save it anew, with hf_tokenprune.save_pretrained or `hf-tokenprune apply`"
        )
    return kept, left


def _is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, or what ``torch.save`` makes of several, whatever it is called."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    with path.open("rb") as file:
        mark, *version = file.read(2) or b"\0"
    return mark == pickle.PROTO[0] and bool(version) and version[0] <= pickle.HIGHEST_PROTOCOL


def push_config(
    config: PruneConfig, repo_id: str, files: Mapping[str, bytes], tags: Sequence[str], **kwargs: Any
) -> CommitInfo:
    """Upload a config alone, see ``PruneConfig.push_to_hub``; ``files`` are those that it is written to."""

    def describe(repo_id: str, card: ModelCard | None, **about: Any) -> ModelCard:
        api, at = HfApi(token=kwargs.get("token")), about["revision"]
        there = (what for file, what in HOLDS.items() if api.file_exists(repo_id, file, revision=at))
        return config_card(config, repo_id, card, tags=tags, beside=next(there, None), **about)

    kwargs.setdefault("commit_message", f"Upload {CONFIG_NAME} ({config.method})")
    return upload(files, describe, repo_id, **kwargs)


def _card_of(repo_id: str, revision: str | None, token: str | None) -> Path | None:
    """The card of a repository, downloaded."""
    try:
        return Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token))
    except LocalEntryNotFoundError:  # no answer: a card that may be there must not be written over
        raise
    except EntryNotFoundError:
        return None
