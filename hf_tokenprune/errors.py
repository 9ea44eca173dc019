"""The errors this package raises. Every message names the value, what is allowed and the next step."""

import difflib
from collections.abc import Iterable

DOCS = "https://github.com/hf-tokenprune/hf_tokenprune/blob/main/docs"
"""Where messages send a reader: an installed package has no folder of pages."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'tome'?"`` where one of the known names is close to this one, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


class TokenPruneError(ValueError):
    """Base of all errors raised on purpose by ``hf_tokenprune``."""


class ConfigError(TokenPruneError):
    """A prune config, or the file it comes from, cannot be used."""


class UnsupportedModelError(TokenPruneError):
    """A model, a head or a forward argument cannot work with pruned tokens."""


class PruneStateError(TokenPruneError):
    """The model is already pruned, or not pruned when it should be."""


class DataError(TokenPruneError):
    """An image, a label file or a folder for evaluation cannot be read."""
