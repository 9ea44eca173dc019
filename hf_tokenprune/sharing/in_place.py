"""Saving a pruned checkpoint so that a folder holds, wherever that is interrupted, the former one or the new one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from ..atomic import beside, put
from ..config import PruneConfig
from ..config_files import CONFIG_NAME, MODEL_CONFIG_NAME
from ..engine import unwrapped
from ..weights import RECOVERY_NAME, originals

WEIGHTS = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.safetensors(?P<index>\.index(?P<variant>\..+)?\.json)?")
"""Weights and indices of shards: ``model.fp16.safetensors``, but ``model.safetensors.index.fp16.json``."""


def save_in_place(model: nn.Module, config: PruneConfig, folder: Path, **kwargs: Any) -> None:
    """``model.save_pretrained(folder, **kwargs)``, with the prune config beside it.

    All is written before any of it is moved into place, file by file. Moving takes no time, yet it is no single step: a
    process killed there leaves weights that are whole, the former or the new, or a folder that loading refuses.
    """
    if kwargs.get("distributed_checkpoint"):  # written by all processes into one folder, for going on with training
        _save(model, config, folder, **kwargs)
        config.save_pretrained(folder, also_in_model=True)
        return
    with beside(folder) as new:
        _save(model, config, new, **kwargs)
        config.save_pretrained(new, also_in_model=True)
        *names, last = sorted(os.listdir(new), key=_order)
        former = _former(folder, names)
        if any(path.name in names for path in former if "-of-" in path.name):  # shards of both would be loaded together
            for path in former:
                if _is_index(path.name):
                    path.unlink()
        for name in names:
            put(new / name, folder / name)
        for path in former:  # Transformers would load one file rather than shards, whichever is newer
            if path.name not in names:
                path.unlink(missing_ok=True)
        put(new / last, folder / last)


def _save(model: Any, config: PruneConfig, folder: Path, **kwargs: Any) -> None:
    """``model.save_pretrained``, of the weights that it had before recovered values came in: these have their file."""
    if config.recovery is None:
        model.save_pretrained(folder, **kwargs)
        return
    about = unwrapped(model).config
    carried = about.prune_config
    about.prune_config = config.to_dict()
    try:
        weights = kwargs.pop("state_dict", None) or model.state_dict()
        model.save_pretrained(folder, state_dict={**weights, **originals(model)}, **kwargs)
    finally:
        about.prune_config = carried


def _order(name: str) -> int:
    """When a file is moved: the two configs first and last. In between they disagree, which loading refuses."""
    if name in (CONFIG_NAME, MODEL_CONFIG_NAME):
        return -1 if name == CONFIG_NAME else 2
    return int(_is_index(name))


def _is_index(name: str) -> bool:
    match = WEIGHTS.fullmatch(name)
    return match is not None and match["index"] is not None


def _former(folder: Path, names: list[str]) -> list[Path]:
    """The weights in a folder that those called ``names`` take the place of: files, shards and their index.

    And recovered values, which belong to the config that is replaced.
    """
    stems = {_stem(name) for name in (*names, RECOVERY_NAME)} - {None}
    return [path for path in folder.iterdir() if _stem(path.name) in stems]


def _stem(name: str) -> str | None:
    """What a file of weights, its shards and their index have in common; None for other files."""
    match = WEIGHTS.fullmatch(name)
    return match and match["stem"] + (match["variant"] or "")
