"""Which tests of a cross product are run: a covering design by rule.

Tests are products: a feature (the test function) × methods × model classes × places, attentions, ... Nearly every fault
found so far needed one value, or two that meet. So a test is run only if it brings two values together that no test
before it has brought together, where the function is a value like any other. Then each method meets each model class in
some test, each test function meets each method, and each model class; what is left out are combinations of three.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

Factor = tuple[str, str]

STRIDE = 7
"""Tests are gone through along diagonals of the product, which spreads pairs over the functions. Any number gives a
covering design; of those up to 40 this one left the fewest tests."""


def covering(tests: Sequence[Sequence[Factor]]) -> list[int]:
    """Ascending positions of the tests to run, each given as its factors: a name and a value.

    Tests with one factor are all run: there is nothing to combine.
    """
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    for factors in tests:
        for name, value in factors:
            numbers[name].setdefault(value, len(numbers[name]))

    def diagonal(test: int) -> int:
        return sum(numbers[name][value] for name, value in tests[test]) % STRIDE

    chosen, seen = [], set()
    for test in sorted(range(len(tests)), key=diagonal):
        pairs = set(combinations(sorted(tests[test]), 2))
        if not pairs or not pairs <= seen:
            seen |= pairs
            chosen.append(test)
    return sorted(chosen)


def factors_of(function: str, parameters: dict[str, Any]) -> list[Factor]:
    """The function and every parameter of a test; a parameter that is a tuple is as many as it has items."""
    return [("function", function), *(factor for name, value in parameters.items() for factor in _parts(name, value))]


def _parts(name: str, value: Any) -> Iterator[Factor]:
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _parts(f"{name}.{number}", item)
    else:
        yield name, getattr(value, "__qualname__", repr(value))
