"""``hf-tokenprune``: list, info, apply, eval, compare, search, bench and demo from a shell; one file a command."""

from __future__ import annotations

import typer

from .apply import apply
from .bench import bench
from .compare import compare
from .demo import demo
from .eval import evaluate
from .info import info
from .list import list_
from .search import search

app = typer.Typer(
    help="Training-free token pruning for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("list")(list_)
app.command()(info)
app.command()(apply)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(search)
app.command()(bench)
app.command()(demo)
