"""The packages of ``hf-tokenprune[eval]`` and other extras, imported only when something needs them."""

from importlib import import_module
from types import ModuleType


def missing(error: ModuleNotFoundError, extra: str = "eval") -> ImportError:
    """The error to raise instead of ``error``: it names the package and how to install it."""
    return ImportError(
        f'this needs the package {error.name!r}, which is not installed: pip install "hf-tokenprune[{extra}]"'
    )


def require(module: str, extra: str = "eval") -> ModuleType:
    """Import ``module``.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error, extra) from error
