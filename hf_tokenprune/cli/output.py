"""What a command writes: whether it can, before there is something to write, and what is left of it on ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import typer

from ..errors import ConfigError


def writable_folder(out: Path) -> Path:
    """A folder that can be written to, made if need be: found out before there is something to write.

    Raises:
        ConfigError: it cannot be.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to the folder {out} ({error.strerror}); choose another one") from error
    return out


@contextmanager
def telling_on_interrupt(left: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C inside ends the command, as in a shell with exit code 130, with a line on what is ``left`` of its work."""
    try:
        yield
    except KeyboardInterrupt as error:
        typer.secho(f"interrupted: {left()}", fg=typer.colors.YELLOW, err=True)
        raise typer.Exit(130) from error
