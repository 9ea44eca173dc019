"""``hf-tokenprune presets``: the configs that come with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from .options import JsonOpt, readable_errors, show


@readable_errors
def presets(
    method: Annotated[str | None, typer.Option("--method", "-m", help="Those of this method.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Those for models with this in their name: deit, clip-base.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Configs that come with the package, for --prune-config of other commands; by --json their fields too."""
    from ..presets import describe_presets

    everything = describe_presets()
    chosen = {
        name: entry
        for name, entry in everything.items()
        if method in (None, entry["config"]["method"]) and (model or "") in model_of(name)
    }
    if not chosen:
        methods = sorted({entry["config"]["method"] for entry in everything.values()})
        raise ConfigError(
            f"no preset has --method {method or '(any)'} and --model {model or '(any)'}; there are presets of "
            f"{', '.join(methods)}, for {', '.join(sorted(set(map(model_of, everything))))}"
        )
    width = max(map(len, chosen))
    lines = [f"{name:<{width}}  {origin(entry['provenance'])}" for name, entry in chosen.items()]
    show(as_json, chosen, "\n".join([*lines, "", "use: hf-tokenprune info MODEL -c PRESET, and so eval, apply, ..."]))


def model_of(name: str) -> str:
    """Of "tome/deit-tiny@0.85g": deit-tiny."""
    return name.partition("/")[2].partition("@")[0]


def origin(provenance: dict[str, object]) -> str:
    """Where a preset comes from, in a few words."""
    source = str(provenance["source"])
    gmacs = f", {provenance['gmacs']:.4g} GMACs" if "gmacs" in provenance else ""
    where = f", {provenance['from']}" if "from" in provenance else ""
    on = f" on {provenance['inputs']} {provenance['on']}" if "on" in provenance else ""
    return f"{source}{on}{where}{gmacs}"
