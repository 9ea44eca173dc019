"""Where the file of a config is, on disk or on the Hub, and what is in it. Nothing here knows what a config is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import ConfigError, shown

CONFIG_NAME, MODEL_CONFIG_NAME = "prune_config.json", "config.json"
MAX_FILE_BYTES = 1 << 20  # a config is a few hundred bytes; a larger file is not one


def find_config_file(
    path_or_repo: str | os.PathLike[str], subfolder: str | None = None, **hub_kwargs: Any
) -> Path | None:
    """Where ``prune_config.json`` is, downloaded from the Hub if need be; None if there is none."""
    path = Path(path_or_repo)
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long for a file
        return path
    if os.path.isdir(path):
        path = path / (subfolder or "") / CONFIG_NAME
        if not os.path.lexists(path):
            return None
    if os.path.lexists(path):
        if not path.is_file():  # reading a pipe or a device might never end
            raise ConfigError(f"{path} is no file: a folder, a pipe, a device, or a link to what is not there")
        return path
    name = str(path_or_repo)
    if is_path(name):
        raise ConfigError(f"{name!r} is neither a local path nor a Hub repository: no such file or folder is here")
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, CONFIG_NAME, subfolder=subfolder or None, **hub_kwargs))
    except hub.EntryNotFoundError:  # also what an offline machine gets for a file that is not in its cache
        return None
    except (hub.HFValidationError, hub.RepositoryNotFoundError) as error:
        raise ConfigError(f"{name!r} is neither a local path nor a Hub repository: {error}") from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(f"the repository {name!r} has no revision={hub_kwargs.get('revision')!r}: {error}") from error


def is_path(name: str) -> bool:
    """Whether a name is written as that of a file or folder, so that it is no repository of the Hub."""
    return os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith(("/", ".json"))


def read_json(path: Path) -> Any:
    """What is in a small JSON file; a link is followed, since the Hub's cache is made of links.

    Raises:
        ConfigError: it is too large, not JSON, has a key twice, or a number that is none.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path.stat().st_size} bytes; a prune config has at most {MAX_FILE_BYTES}")
    try:
        return json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, an integer of thousands of digits; too deep
        raise ConfigError(f"not valid JSON ({error}); write it again with PruneConfig.save_pretrained") from error


def _refuse_constant(name: str) -> None:
    raise ConfigError(f"{name} is not a JSON number; expected a finite one")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ConfigError(f"field {shown(key)} stands twice; keep one")
        unique[key] = value
    return unique
