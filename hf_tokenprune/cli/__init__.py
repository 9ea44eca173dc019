"""``hf-tokenprune``: list, presets, info, apply, push, eval, compare, search, recover, bench, viz, explore, export,
serve, demo; one file a command.

What a command needs besides its options is imported when it runs, so that help and completion do not wait for it.
"""

from __future__ import annotations

import typer

from .apply import apply
from .bench import bench
from .compare import compare
from .demo import demo
from .eval import evaluate
from .explore import explore
from .export import export
from .info import info
from .list import list_
from .presets import presets
from .push import push
from .recover import recover
from .search import search
from .serve import serve
from .version import VersionOpt
from .viz import viz

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(version: VersionOpt = False) -> None:
    """Training-free token pruning for Hugging Face Transformers."""


app.command("list")(list_)
app.command()(presets)
app.command()(info)
app.command()(apply)
app.command()(push)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(search)
app.command()(recover)
app.command()(bench)
app.command()(viz)
app.command()(explore)
app.command()(export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
app.command()(demo)
