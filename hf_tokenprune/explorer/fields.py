"""Controls for the fields of a config, from their types."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from ..config import PruneConfig
from ..errors import ConfigError
from ..field_types import few_values, field_types

EMPTY = "null"


@dataclass(frozen=True)
class Control:
    """How one field is set.

    Attributes:
        kind: "tick" for a bool, "list" where a field has few values, "text" for JSON.
        value: of the field; for "text" as JSON.
        values: of a list.
        help: what the docstring of the config says of it.
    """

    name: str
    kind: Literal["tick", "list", "text"]
    value: Any
    values: tuple[Any, ...]
    help: str


def controls(config: PruneConfig) -> Iterator[Control]:
    """One for each field of a config, in the order of the fields."""
    told, start = told_of(type(config)), config.to_dict()
    for name, hint in field_types(type(config)).items():
        value, values = start[name], few_values(hint)
        kind: Literal["tick", "list", "text"] = "tick" if hint is bool else "list" if values else "text"
        yield Control(name, kind, json.dumps(value) if kind == "text" else value, values, told.get(name, ""))


def value_of(control: Control, given: Any) -> Any:
    """What a control says, as a value of the field.

    Raises:
        ConfigError: a text is not JSON.
    """
    if control.kind != "text":
        return given
    try:
        return json.loads(given.strip() or EMPTY)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{control.name} is {given!r}; expected JSON, such as 0.5, [1, 2] or null; it was {control.value}"
        ) from error


def told_of(config_class: type) -> dict[str, str]:
    """The first sentence about each field in the docstrings of a config class and its bases."""
    told: dict[str, str] = {}
    for base in config_class.__mro__:
        for names, text in re.findall(r"^        ([\w, ]+?): (.*(?:\n {12,}.*)*)", base.__doc__ or "", re.MULTILINE):
            sentence = re.split(r"(?<=\.)\s", " ".join(text.replace("``", "").split()), maxsplit=1)[0]
            for name in names.split(", "):
                told.setdefault(name, sentence)
    return told
