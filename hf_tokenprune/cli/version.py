"""``hf-tokenprune --version``: what a report of a fault should name."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .. import __version__

BESIDE = ("transformers", "torch")


def print_version(asked: bool) -> None:
    """Print the versions and leave, if asked."""
    if asked:
        beside = ", ".join(f"{package} {_installed(package)}" for package in BESIDE)
        typer.echo(f"hf-tokenprune {__version__} ({beside}, Python {platform.python_version()})")
        raise typer.Exit


VersionOpt = Annotated[
    bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
]


def _installed(package: str) -> str:
    """From its metadata: importing it takes seconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
