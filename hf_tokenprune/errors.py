"""The errors this package raises. Every message names the value, what is allowed and the next step."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any

DOCS = "https://github.com/hf-tokenprune/hf_tokenprune/blob/main/docs"
"""Where messages send a reader: an installed package has no folder of pages."""


SHOWN = 200
"""Characters of a value in a message, at most."""


class _Short(reprlib.Repr):
    """``repr`` that looks no further into a value than is shown of it: a file may hold any number, list or depth."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 8
        self.maxtuple = self.maxlist = self.maxdict = 32
        self.maxstring = self.maxother = self.maxlong = 2 * SHOWN + 3  # of longer ones the middle is left out

    def repr_int(self, value: int, level: int) -> str:
        bits = value.bit_length()  # thousands of digits are refused, after a long time in old versions of Python
        return super().repr_int(value, level) if bits <= 4096 else f"<an integer of {bits} bits>"


def shown(value: Any) -> str:
    """A value from a config in messages, in ASCII: letters of other alphabets that look like these are told apart."""
    return _Short().repr(value).encode("ascii", "backslashreplace").decode()[:SHOWN]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'tome'?"`` where one of the known names is close to this one, else nothing."""
    close = difflib.get_close_matches(str(name)[:SHOWN], list(known), 1)
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
