"""What the annotations of a config's fields allow: values from JSON are turned into it, or refused."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_VALUES = 1024  # entries of a tuple field: no model has more blocks
MAX_INT = 2**63 - 1  # what tensors, and readers of JSON in other languages, have room for


def field_types(config_class: type) -> dict[str, Any]:
    """The annotation of each field of a dataclass."""
    hints = get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def few_values(hint: Any) -> tuple[Any, ...]:
    """All values of an annotation that has few, such as bool; none of others."""
    if hint is bool:
        return (False, True)
    return get_args(hint) if get_origin(hint) is Literal else ()


def convert(value: Any, hint: Any) -> Any:
    """``value`` as what a field's annotation asks for (lists become tuples, int becomes float), or TypeError.

    A class with ``from_dict`` is a config inside another one.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for arg in args:
            try:
                return convert(value, arg)
            except TypeError:
                continue
    elif origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)) and len(value) <= MAX_VALUES:
            if args[-1] is Ellipsis:
                return tuple(convert(item, args[0]) for item in value)
            if len(args) == len(value):
                return tuple(convert(item, arg) for item, arg in zip(value, args, strict=True))
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    elif hasattr(hint, "from_dict"):
        if isinstance(value, hint):
            return value
        if isinstance(value, dict) and "method" in value:
            return hint.from_dict(value)
    elif type(value) is hint and (hint is not int or abs(value) <= MAX_INT):
        return value
    raise TypeError


def describe(hint: Any) -> str:
    """An annotation in words, for messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is tuple:
        length = f"at most {MAX_VALUES}" if args[-1] is Ellipsis else len(args)
        return f"a list of {length} values, each {describe(args[0])}"
    names = {float: "a finite number", int: "an integer", bool: "true or false", str: "a string", type(None): "None"}
    config = "a prune config, such as {'method': 'divprune'}"
    return config if hasattr(hint, "from_dict") else names.get(hint, str(hint))
