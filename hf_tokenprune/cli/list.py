"""``hf-tokenprune list``: methods and model families."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from .options import JsonOpt, readable_errors, show

WIDTH = 120


@readable_errors
def list_(as_json: JsonOpt = False) -> None:
    """Methods, what they prune, and their fields with the defaults; and model families."""
    from ..registry import get_method, list_adapters, list_methods

    methods = {name: get_method(name) for name in list_methods()}
    prunes = {name: sorted(method.prunes) for name, method in methods.items()}
    defaults = {name: method().to_dict() for name, method in methods.items()}
    names, kinds = max(map(len, methods)), max(len(", ".join(kinds)) for kinds in prunes.values())
    lines = ["methods, what they prune, and their fields with the defaults, for -s field=value"]
    for name, method in methods.items():
        first_line = (method.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<{names}}  {', '.join(prunes[name]):<{kinds}}  {first_line}")
        lines += _fields(defaults[name])
    lines += ["model families (model_type)", *(f"  {name}" for name in list_adapters())]
    show(as_json, {"methods": defaults, "prunes": prunes, "adapters": list_adapters()}, "\n".join(lines))


def _fields(config: dict[str, Any]) -> list[str]:
    """As ``--set`` takes them, in lines."""
    fields = {name: value for name, value in config.items() if name not in ("method", "format_version")}
    items = [f"{name}={value if isinstance(value, str) else _compact(value)}" for name, value in fields.items()]
    indent = " " * 6
    return textwrap.wrap(
        " ".join(items), WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
