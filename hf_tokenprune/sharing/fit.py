"""Which models a config fits, as far as it says so itself; and whether a checkpoint is one, before its weights are."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from ..config import PruneConfig
from ..engine import KINDS, find_adapter, options, plan
from ..errors import ConfigError
from ..registry import list_methods
from ..weights import fitting

NAME_LAYERS = ("layer", "layers")
"""Fields of configs that name blocks or decoder layers, by numbers from 0."""


def fits(config: PruneConfig) -> str:
    """In words: "vision encoders with at least 6 blocks". Fields that leave the layers open fit any depth."""
    words, tower, last = [], config.tower_part, max(_layers(config), default=-1)
    # In a decoder tokens leave where the layer behind a named one begins.
    depth = {"vision": f" with at least {last + 1} blocks", "decoder": f" of at least {last + 2} layers"}
    for kind in sorted(config.prunes, reverse=True):
        words.append(KINDS[kind] + (depth[kind] if last >= 0 else ""))
    if tower is not None and (blocks := max(_layers(tower), default=-1) + 1):
        words.append(f"a vision tower of at least {blocks} blocks")
    return " and ".join(words)


def check_fit(model_class: Any, model_config: Any, config: PruneConfig, checkpoint: Any, source: str) -> None:
    """Raise for a checkpoint that a config does not fit, from its sizes alone: nothing but its config is loaded.

    Args:
        model_class: a class of models, or an auto class.
        source: of the config, in words.

    Raises:
        ConfigError: it is of another kind than the config is for, or a field does not fit it.
        UnsupportedModelError: it cannot be pruned.
    """
    if not isinstance(model_config, getattr(model_class, "config_class", None) or object):
        return  # a part of the checkpoint's model, such as its vision tower, whose config only loading finds
    make = getattr(model_class, "from_config", None) or model_class._from_config
    with torch.device("meta"):
        model = make(copy.deepcopy(model_config))
    adapter = find_adapter(model)
    shape = adapter.shape(model)
    does_not_fit = f"{source} fits {fits(config)}, not {str(checkpoint)!r}"
    if shape.kind not in config.prunes:
        usable = ", ".join(list_methods(shape.kind))
        raise ConfigError(f"{does_not_fit}, which is one of the {KINDS[shape.kind]}; methods for it: {usable}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to say is said when the model is pruned
            adapter.check(model, plan(config, shape), **options(config, shape))
        if config.recovery is not None:
            fitting(model, config.recovery)
    except ConfigError as error:
        raise ConfigError(f"{does_not_fit}: {error}") from error


def _layers(config: PruneConfig) -> Iterator[int]:
    """Those that a config names, and the parts of a stack; not of the part for the blocks of a vision tower."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values = value if isinstance(value, tuple) else (value,)
        for each in values:
            if isinstance(each, PruneConfig):
                if each != config.tower_part:
                    yield from _layers(each)
            elif field.name in NAME_LAYERS and isinstance(each, int):
                yield each
