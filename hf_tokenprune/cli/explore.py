"""``hf-tokenprune explore``: the page that shows what methods do to an image."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from .options import DeviceOpt, device_for, readable_errors


@readable_errors
def explore(
    model: Annotated[
        str | None, typer.Argument(help="To start with: a folder, or owner/name on the Hub. Default: a packaged one.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0: for other machines too.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    device: DeviceOpt = "cpu",
) -> None:
    """Look at what methods do to your images, in the browser: kept tokens layer by layer, answers, costs."""
    from ..evaluation.optional import require

    placement = device_for(device)
    require("gradio", "app")
    typer.echo("starting ...", err=True)
    from ..explorer.models import PACKAGED, Models
    from ..explorer.page import Page

    models, first = Models(placement), model or next(iter(PACKAGED))
    models[first]  # what is wrong with it is said here
    page = Page(models, first)
    try:
        page.blocks.launch(server_name=host, server_port=port, inbrowser=browser, show_error=True)
    except OSError as error:
        asked = f"--port {port} on {host}" if port is not None else host
        raise ConfigError(f"{asked} cannot be listened on; give another --port, or leave it out") from error
