"""Tables as text, and numbers as their cells. The first column is text, the others stand to the right."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, two spaces between columns."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *escaped])


def filled(columns: Mapping[str, Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows from columns by title; those with "-" in all cells are left out."""
    kept = {title: cells for title, cells in columns.items() if any(cell != "-" for cell in cells)}
    return list(kept), [list(cells) for cells in zip(*kept.values(), strict=True)]


def number(value: float | None, form: str, scale: float = 1.0) -> str:
    """A cell for ``value * scale``; "-" for None."""
    return "-" if value is None else f"{value * scale:{form}}"


def with_interval(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    """A cell for a value and its interval, if there is one."""
    if interval is None:
        return number(value, form)
    return f"{number(value, form)} [{interval[0]:{form}}, {interval[1]:{form}}]"


def plain(value: Any) -> Any:
    """A value that JSON can hold: tuples become lists, numbers that are not finite None, in dictionaries too."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
