"""Errors of the library, which name arguments and units of Python, in the words of the command line."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from typer.models import ArgumentInfo, ParameterInfo

ARGUMENTS = {
    "macs": "--gmacs",
    "seconds": "--ms",
    "latency_batch_size": "--latency-batch",
    "batch_sizes": "--batch-size",
    "templates": "--template",
    "questions": "--question",
    "preset": "--prune-config",
    "keep_ratio": "--resize",
}
"""What options are called in the library where that is not their own name with underscores."""
UNITS = {"--gmacs": ("MACs", "GMACs", 1e-9), "--ms": ("s", "ms", 1e3)}
"""Of options in another unit than the library's: both, and how many of the one the other is."""
ELSEWHERE = {
    "list_presets() has all": "`hf-tokenprune presets` lists all",
    "label_column=None, --no-labels": "--no-labels",
    "None to evaluate without labels (--no-labels)": "evaluate without labels (--no-labels)",
    "label_column, --label-column": "--label-column",
    "split, --split": "--split",
    "int8=True": "--int8",
}
"""What Python has and a command does instead."""

_VALUE = r"'[^']*'|\"[^\"]*\"|\[[^]]*\]|\([^)]*\)|[^\s,;:()]*"


def in_flags(message: str, flags: Collection[str]) -> str:
    """A message of the library with ``name=value`` as ``--name value``, where that is an option of the command.

    Args:
        message: arguments stand in it as ``name=value`` or ``name=``, quantities as ``1.2e+09 MACs`` or ``0.012 s``;
            ``name=value in RandomConfig`` is a field of a config and no argument.
        flags: the options of the command.
    """

    def argument(match: re.Match[str]) -> str:
        name, value = match.groups()
        flag = ARGUMENTS.get(name, "--" + name.replace("_", "-"))
        if flag not in flags or re.match(r" in \w+Config\b", match.string[match.end() :]):
            return match[0]
        if value[:1] in "'\"" and " " not in value:
            value = value[1:-1]
        return f"{flag} {_scaled(value, UNITS[flag][2]) if flag in UNITS else value}".rstrip()

    for python, command in ELSEWHERE.items():
        message = message.replace(python, command)
    message = re.sub(rf"(?<![\w./'\"-])([a-z]\w*)=({_VALUE})", argument, message)
    for flag in set(UNITS).intersection(flags):
        here, there, factor = UNITS[flag]
        message = re.sub(
            rf"(?<![\w.])(\d[\d.]*(?:e[+-]\d+)?) {here}\b",
            lambda match, factor=factor, there=there: f"{_scaled(match[1], factor)} {there}",  # type: ignore[misc]
            message,
        )
    return message


def _scaled(value: str, factor: float) -> str:
    try:
        return f"{float(value) * factor:.4g}"
    except ValueError:
        return value


@contextmanager
def warnings_in_lines(words: Callable[[Warning | str], str]) -> Iterator[None]:
    """Inside, a warning of this package is a line on stderr in these words, without a place in its source."""
    package = Path(__file__).parents[1]
    with warnings.catch_warnings():
        show = warnings.showwarning

        def line(message: Warning | str, category: type[Warning], filename: str, *place: Any, **more: Any) -> None:
            if issubclass(category, UserWarning) and package in Path(filename).parents:
                typer.secho(f"warning: {words(message)}", fg=typer.colors.YELLOW, err=True)
            else:
                show(message, category, filename, *place, **more)

        warnings.showwarning = line
        yield


def flags_of(command: Callable[..., Any]) -> set[str]:
    """The long options of a command."""
    found = set()
    for parameter, hint in get_type_hints(command, include_extras=True).items():
        infos = list(_infos(hint))
        if parameter == "return" or any(isinstance(info, ArgumentInfo) for info in infos):
            continue
        # Beside a type, typer has the first name of an option in the place of its default.
        names = [name for info in infos for name in (info.default, *(info.param_decls or ()))]
        long = [name for name in names if isinstance(name, str) and name.startswith("--")]
        found.update(long or ["--" + parameter.replace("_", "-")])
    return found


def _infos(hint: Any) -> Iterator[ParameterInfo]:
    """Of an annotation; Python 3.10 puts ``Optional`` around one whose default is None."""
    yield from (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, ParameterInfo))
    for part in get_args(hint):
        yield from _infos(part)
