"""Where the file of a config is, on disk or on the Hub, and what is in it. Nothing here knows what a config is."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from .errors import ConfigError, shown

CONFIG_NAME, MODEL_CONFIG_NAME, ADAPTER_CONFIG_NAME = "prune_config.json", "config.json", "adapter_config.json"
MAX_FILE_BYTES = 1 << 20  # a config is a few hundred bytes; a larger file is not one


def find_config_file(
    path_or_repo: str | os.PathLike[str], subfolder: str | None = None, **hub_kwargs: Any
) -> Path | None:
    """Where ``prune_config.json`` is, downloaded from the Hub if need be; None if there is none.

    Where the Hub cannot be reached and the cache does not know, that is None too, with a warning; offline without.
    """
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
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import errors as hub

    try:
        return Path(hf_hub_download(name, CONFIG_NAME, subfolder=subfolder or None, **hub_kwargs))
    except hub.LocalEntryNotFoundError as error:  # of a connection that is lost, and of a machine that is offline
        offline = constants.HF_HUB_OFFLINE or hub_kwargs.get("local_files_only")
        if not offline and not _known_to_have_none(name, subfolder, **hub_kwargs):
            warnings.warn(
                f"the Hub cannot be reached, so it is not known whether {name!r} has a {CONFIG_NAME}; "
                f"going on as if it had none: {error}",
                stacklevel=3,
            )
        return None
    except hub.EntryNotFoundError:
        return None
    except hub.GatedRepoError as error:
        raise ConfigError(
            f"the repository {name!r} is gated: ask for access on its page, then log in (hf auth login) or "
            f"give token=: {error}"
        ) from error
    except (hub.HFValidationError, hub.RepositoryNotFoundError) as error:
        raise ConfigError(f"{name!r} is neither a local path nor a Hub repository: {error}") from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(f"the repository {name!r} has no revision={hub_kwargs.get('revision')!r}: {error}") from error


def _known_to_have_none(name: str, subfolder: str | None, **hub_kwargs: Any) -> bool:
    """Whether the Hub said so when it was asked before, and the cache remembers."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    file = f"{subfolder}/{CONFIG_NAME}" if subfolder else CONFIG_NAME
    where = {key: hub_kwargs[key] for key in ("cache_dir", "revision") if key in hub_kwargs}
    return try_to_load_from_cache(name, file, **where) is _CACHED_NO_EXIST


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
