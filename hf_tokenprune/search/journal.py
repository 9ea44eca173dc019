"""What survives of a search: its measurements, which one that is started again reads; and results, never replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import CONFIG_NAME
from ..errors import ConfigError

JOURNAL = "journal.jsonl"
REPORT = "search.json"


class Journal:
    """Lists of numbers by key, kept in memory and, with a ``path``, in a file that only grows."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.known: dict[str, list[float]] = {}
        self._torn = False
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            self._torn = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    self.known[entry["key"]] = [float(value) for value in entry["values"]]
                except (ValueError, KeyError, TypeError):
                    continue  # the line that was being written when the search was stopped

    def read(self, key: str) -> list[float]:
        """What was written last; empty if nothing was."""
        return self.known.get(key, [])

    def write(self, key: str, values: list[float]) -> None:
        self.known[key] = values
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + json.dumps({"key": key, "values": values}) + "\n")
            self._torn = False


def check_same_search(out: Path, asked: dict[str, Any]) -> None:
    """Raise ConfigError if the folder holds the result of a search that was ``asked`` something else.

    Args:
        asked: JSON values; what a report has under this name.
    """
    report, rule = out / REPORT, "one folder holds one search; give another --out"
    if not report.exists():
        if (out / CONFIG_NAME).exists():
            raise ConfigError(
                f"{out} holds a {CONFIG_NAME} that no search wrote, and a result would replace it; {rule}"
            )
        return
    try:
        before = _flat(json.loads(report.read_text(encoding="utf-8"))["asked"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{report} does not say what was searched for ({error!r}); {rule}") from error
    now = _flat(json.loads(json.dumps(asked)))
    differ = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differ:
        had, has = (", ".join(f"{name}={values.get(name)!r}" for name in differ) for values in (before, now))
        raise ConfigError(
            f"{out} holds the result of another search, which had {had}; this one has {has}; {rule} (a copy of "
            f"{JOURNAL} in it spares what both measure)"
        )


def _flat(asked: dict[str, Any]) -> dict[str, Any]:
    """With the fields of the config beside the rest."""
    rest = {name: value for name, value in asked.items() if name != "config"}
    return {**rest, **{name: value for name, value in asked["config"].items() if name != "format_version"}}
