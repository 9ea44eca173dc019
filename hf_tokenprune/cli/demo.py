"""``hf-tokenprune demo``: the packaged models, by every method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import JsonOpt, readable_errors, show
from .output import writable_folder


@readable_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where the pictures and the pruned checkpoint go.")] = Path("demo_output"),
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images of each model.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Three packaged models (ViT, CLIP, LLaVA), dense and pruned by every method: accuracy, speed, pictures."""
    from ..demo.run import run_demo

    result = run_demo(writable_folder(out), limit=limit, progress=not as_json)
    show(as_json, result.to_dict(), result.summary())
