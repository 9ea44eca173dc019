"""``hf-tokenprune apply``: a checkpoint that carries its config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .options import (
    ConfigOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    SetOpt,
    configs_for,
    load_dense,
    new_folder,
    readable_errors,
    save_processor,
    show,
)
from .output import writable_folder


@readable_errors
def apply(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="Folder to write to; must be new or empty.")],
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a copy of a checkpoint that carries its prune config (weights unchanged)."""
    from ..cost import cost
    from ..engine import prune
    from ..sharing import save_pretrained

    writable_folder(new_folder(out))
    loaded = load_dense(model, "cpu")
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    if len(variants) != 1:
        raise ConfigError(f"apply writes one config, got {len(variants)} ({', '.join(variants)}); choose one")
    ((name, config),) = variants.items()
    save_pretrained(prune(loaded, config), out)
    save_processor(model, loaded, out)
    report = cost(loaded)
    text = f"{out}: {name}, {report.dense.macs / 1e9:.3f} -> {report.pruned.macs / 1e9:.3f} GMACs an image"
    show(as_json, {"path": str(out), "config": config.to_dict(), **report.to_dict()}, text)
