"""What the times of repeated rounds say, and when they say nothing: medians beside their quartiles.

On a machine that does other work the median of a few rounds can be anything. A figure is given only where the quartiles
agree about it, so that noise is not read as a result; the quartiles are always given.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

ROUNDS = 3
"""The fewest that have quartiles worth the name."""

NOISE = "noise"
"""What stands in a table in the place of a figure that cannot be told."""

Quartiles = tuple[float, float]
Measured = tuple[float | None, Quartiles | None]
"""A median, None where it cannot be told from noise, and the lower and upper quartile, None of fewer than `ROUNDS`."""


def quartiles(values: Sequence[float]) -> Quartiles | None:
    """Lower and upper quartile; None of fewer than `ROUNDS` values."""
    if len(values) < ROUNDS:
        return None
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


def speed_up(dense: Sequence[float], other: Sequence[float]) -> Measured:
    """Median of dense time over the other's within each round; None where the quartiles have 1 between them."""
    ratios = [d / o for d, o in zip(dense, other, strict=True)]
    spread = quartiles(ratios)
    told = spread is not None and not spread[0] < 1 < spread[1]
    return statistics.median(ratios) if told else None, spread


def decision_share(dense: Sequence[float], pruned: Sequence[float], given: Sequence[float]) -> Measured:
    """Median of (pruned - given) / dense within each round; None where the lower quartile is below 0.

    "given" drops as many tokens without choosing them, so that less than nothing is noise.
    """
    shares = [(p - g) / d for d, p, g in zip(dense, pruned, given, strict=True)]
    spread = quartiles(shares)
    told = spread is not None and spread[0] >= 0
    return statistics.median(shares) if told else None, spread


def over(value: float | None, other: float) -> float | None:
    """``value / other``, None of None."""
    return None if value is None else value / other


def cell(value: float | None, spread: Quartiles | None, form: str) -> str:
    """What stands in a table: the figure or `NOISE`, and the quartiles; "-" where there are too few rounds."""
    if spread is None:
        return "-"
    return f"{NOISE if value is None else format(value, form)} [{spread[0]:{form}}, {spread[1]:{form}}]"


def shown(value: float | None, form: str) -> str:
    """What stands in a table for a number that is derived from a figure; "-" without one."""
    return "-" if value is None else format(value, form)


def explained(table: str, rounds: int, what: str = "rounds") -> str:
    """What stands under a table of `cell`: what [ ] are, and `NOISE` or "-" if they are in it."""
    if rounds < ROUNDS:
        return f"no speed-up from {rounds} {what}, it takes at least {ROUNDS}"
    if f"{NOISE} [" not in table:
        return "[ ] quartiles"
    return f"[ ] quartiles; {NOISE}: not measurable here (quartiles on both sides of 1; a decision's below 0)"
