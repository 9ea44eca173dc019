"""Where the file of a config is, on disk or on the Hub, and what is in it. Nothing here knows what a config is."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from .errors import ConfigError, shown

CONFIG_NAME, MODEL_CONFIG_NAME, ADAPTER_CONFIG_NAME = "prune_config.json", "config.json", "adapter_config.json"
MAX_FILE_BYTES = 1 << 20  # a config is a few hundred bytes; a larger file is not one
MAX_OTHER_BYTES = 1 << 24  # of other libraries, whose files may name every class or layer
MAX_VALUES_BYTES = 1 << 26  # of norms and biases, of which the largest models have a few millions
VALUES = ".safetensors"


def find_config_file(
    path_or_repo: str | os.PathLike[str], subfolder: str | None = None, file: str = CONFIG_NAME, **hub_kwargs: Any
) -> Path | None:
    """Where ``prune_config.json`` is, downloaded from the Hub if need be; None if there is none.

    Where the Hub cannot be reached and the cache does not know, that is None too, with a warning; offline without.

    Args:
        file: another name, such as ``adapter_config.json``.

    Raises:
        ConfigError: there is no such folder or repository, it may not be read, or the file is too large to be a config,
            which is found out before it is downloaded.
    """
    path = Path(path_or_repo)
    if os.path.isfile(path):  # unlike Path.is_file, False for a name that is too long for a file
        return path
    if os.path.isdir(path):
        path = path / (subfolder or "") / file
        if not os.path.lexists(path):
            return None
    if os.path.lexists(path):
        if not path.is_file():  # reading a pipe or a device might never end
            raise ConfigError(f"{path} is no file: a folder, a pipe, a device, or a link to what is not there")
        return path
    name = str(path_or_repo)
    if is_path(name):
        raise ConfigError(f"{name!r} is neither a local path nor a Hub repository: no such file or folder is here")
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        return _downloaded(name, file, subfolder=subfolder or None, **hub_kwargs)
    except hub.LocalEntryNotFoundError as error:  # of a connection that is lost, and of a machine that is offline
        offline = constants.HF_HUB_OFFLINE or hub_kwargs.get("local_files_only")
        if not offline and not _known_to_have_none(name, file, subfolder, **hub_kwargs):
            warnings.warn(
                f"the Hub cannot be reached, so it is not known whether {name!r} has a {file}; "
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


def _downloaded(name: str, file: str, **hub_kwargs: Any) -> Path:
    """A file of a repository, unless it is too large. Of one in the cache the Hub is asked no more often for that."""
    from huggingface_hub import hf_hub_download

    about = hf_hub_download(name, file, dry_run=True, **hub_kwargs)
    if about.will_download:
        check_size(about.file_size or 0, file, f"{file!r} of {name!r}: ")
    elif _in_cache(name, file, **hub_kwargs) == about.local_path:  # else the cache is to learn what is the last commit
        return Path(about.local_path)
    return Path(hf_hub_download(name, file, **hub_kwargs))


def _known_to_have_none(name: str, file: str, subfolder: str | None, **hub_kwargs: Any) -> bool:
    """Whether the Hub said so when it was asked before, and the cache remembers."""
    from huggingface_hub import _CACHED_NO_EXIST

    return _in_cache(name, file, subfolder, **hub_kwargs) is _CACHED_NO_EXIST


def found_commit(path_or_repo: str | os.PathLike[str] | None, **hub_kwargs: Any) -> str | None:
    """The commit of a repository from which Transformers has just read ``config.json``; None where that is not known,
    as of a folder.

    So that what belongs to it is read from the same, whatever is pushed in between.
    """
    if path_or_repo is None or os.path.exists(path_or_repo) or is_path(str(path_or_repo)):
        return None
    found = _in_cache(str(path_or_repo), MODEL_CONFIG_NAME, **hub_kwargs)
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", Path(found).as_posix()) if isinstance(found, str) else None
    return commit[1] if commit else None


def _in_cache(name: str, file: str, subfolder: str | None = None, **hub_kwargs: Any) -> Any:
    """What ``huggingface_hub.try_to_load_from_cache`` says of a file."""
    from huggingface_hub import try_to_load_from_cache

    where = {key: hub_kwargs[key] for key in ("cache_dir", "revision") if key in hub_kwargs}
    return try_to_load_from_cache(name, f"{subfolder}/{file}" if subfolder else file, **where)


def is_path(name: str) -> bool:
    """Whether a name is written as that of a file or folder, so that it is no repository of the Hub."""
    return os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1 or name.endswith(("/", ".json"))


def read_json(path: Path) -> Any:
    """What is in a small JSON file; a link is followed, since the Hub's cache is made of links.

    Raises:
        ConfigError: it is too large, not JSON, has a key twice, or a number that is none.
    """
    check_size(path.stat().st_size, CONFIG_NAME)
    try:
        return json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
        )
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # malformed, not UTF-8, an integer of thousands of digits; too deep
        raise ConfigError(f"not valid JSON ({error}); write it again with PruneConfig.save_pretrained") from error


def read_other(path: Path) -> dict[str, Any]:
    """What another library has written into a JSON file: an object.

    Raises:
        ConfigError: it is too large, not JSON, or no object; the message names it.
    """
    check_size(path.stat().st_size, path.name, f"{path}: ")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); save it again, or download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {shown(value)}")
    return value


def read_beside(path_or_repo: str | os.PathLike[str], file: str, **hub_kwargs: Any) -> tuple[Path, bytes]:
    """Where a file is that a ``prune_config.json`` names, and its bytes.

    Args:
        path_or_repo: where the config is: it itself, its folder, or its repository.
        file: a plain name, without folders.

    Raises:
        ConfigError: it is not there, or too large.
    """
    where = Path(path_or_repo)
    path = find_config_file(where.parent if os.path.isfile(where) else path_or_repo, file=file, **hub_kwargs)
    if path is None:
        raise ConfigError(
            f"{str(path_or_repo)!r} holds a {CONFIG_NAME} that names {file!r}, and no such file: copy or download both"
        )
    check_size(path.stat().st_size, file, f"{path}: ")
    return path, path.read_bytes()


def check_size(size: int, file: str, where: str = "") -> None:
    """Raise ConfigError for a file that is too large to be what its name says."""
    most = MAX_FILE_BYTES if file == CONFIG_NAME else MAX_VALUES_BYTES if file.endswith(VALUES) else MAX_OTHER_BYTES
    if size > most:
        what = "a prune config" if file == CONFIG_NAME else f"a file {file}"
        raise ConfigError(f"{where}{size} bytes; {what} has at most {most}")


def _refuse_constant(name: str) -> None:
    raise ConfigError(f"{name} is not a JSON number; expected a finite one")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ConfigError(f"field {shown(key)} stands twice; keep one")
        unique[key] = value
    return unique
