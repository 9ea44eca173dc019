"""Configs that come with the package, by name: ``"<method>/<model>@<budget>"``, each with where it comes from."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ..config import PruneConfig
from ..errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """A config with its provenance.

    Attributes:
        name: of the method, the shape of the model and the budget: GMACs an image, or the fraction of tokens it keeps.
        config: for a model of that shape.
        provenance: ``source`` is "searched" (with what, on what and with which result) or "rule" (from sizes alone).
    """

    name: str
    config: PruneConfig
    provenance: dict[str, Any]


def list_presets() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(_read())


def describe_presets() -> dict[str, dict[str, Any]]:
    """JSON values of all presets by name: ``config`` and ``provenance``. No method is imported for it."""
    return {name: dict(entry) for name, entry in sorted(_read().items())}


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigError: there is none; the message lists close ones.
    """
    presets = _read()
    if name not in presets:
        close = difflib.get_close_matches(name, presets, 3, 0.4)
        raise ConfigError(
            f"preset={name!r}: no such preset (close: {', '.join(close) or 'none'}); list_presets() has all"
        )
    entry = presets[name]
    return Preset(name, PruneConfig.from_dict(entry["config"]), entry["provenance"])


@cache
def _read() -> dict[str, Any]:
    presets: dict[str, Any] = json.loads(files(__package__).joinpath("presets.json").read_text(encoding="utf-8"))
    return presets
