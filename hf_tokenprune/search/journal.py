"""Measurements that survive: a file of JSON lines, read back by a search that is started again."""

from __future__ import annotations

import json
from pathlib import Path


class Journal:
    """Lists of numbers by key, kept in memory and, with a ``path``, in a file that only grows."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.known: dict[str, list[float]] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
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
                file.write(json.dumps({"key": key, "values": values}) + "\n")
