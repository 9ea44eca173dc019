"""``hf-tokenprune list``: methods and model families."""

from __future__ import annotations

from .options import JsonOpt, readable_errors, show


@readable_errors
def list_(as_json: JsonOpt = False) -> None:
    """Methods, what they prune and their default configs; and model families."""
    from ..registry import get_method, list_adapters, list_methods

    methods = {name: get_method(name) for name in list_methods()}
    prunes = {name: sorted(method.prunes) for name, method in methods.items()}
    lines = ["methods, and what they prune"]
    for name, method in methods.items():
        first_line = (method.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<14}{', '.join(prunes[name]):<17}{first_line}")
    lines += ["model families (model_type)", *(f"  {name}" for name in list_adapters())]
    data = {"methods": {name: method().to_dict() for name, method in methods.items()}, "prunes": prunes}
    show(as_json, {**data, "adapters": list_adapters()}, "\n".join(lines))
