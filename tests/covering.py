"""Which tests of a cross product are run: a covering design by rule.

Tests are products: a feature (the test function) × methods × model classes × places, attentions, ... Nearly every fault
found so far needed one value, or two that meet. So a test is run only if it brings two values together that no test
before it has brought together, where the function is a value like any other. Then each method meets each model class in
some test, each test function meets each kind of method, and of model class; what is left out are combinations of three,
and those of a model class, or a method, with what one function alone varies besides.

Families whose adapters are one and the same are of one kind, and so are methods for decoders that prune in the same
place. Beside families, methods that read the same in one place, which is all that adapters know of them, count as one.
The whole product leaves out nothing but these.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from hf_tokenprune import list_adapters
from hf_tokenprune.registry import get_adapter

from .decoder_families import CASES, built, stages_of

Factor = tuple[str, str]

STRIDE = 7
"""Tests are gone through along diagonals of the product, which spreads pairs over the functions. Any number gives a
covering design; of those up to 40 this one left the fewest tests."""


def covering(
    tests: Sequence[Sequence[Factor]],
    kinds: Mapping[str, str] | None = None,
    alike: Mapping[str, str] | None = None,
) -> list[int]:
    """Ascending positions of the tests to run, each given as its factors: a name and a value.

    Tests with one factor are all run: there is nothing to combine.

    Args:
        tests: the function comes first.
        kinds: what model classes and methods stand for beside a function. They meet each other, under whatever names,
            and nothing else.
        alike: what they stand for beside each other; None, or not among them: for themselves.
    """
    kinds, alike = kinds or {}, alike or {}
    chosen: list[int] = []
    seen: set[Any] = set()

    for test in diagonally(tests):
        function, *parameters = tests[test]
        met: set[Any] = {*parameters, *((function, name, kinds.get(value, value)) for name, value in parameters)}
        classes = [alike.get(value, value) for _, value in parameters if value in kinds]
        met |= set(map(frozenset, combinations(classes, 2)))
        met |= set(combinations([factor for factor in parameters if factor[1] not in kinds], 2))
        if not met or not met <= seen:
            seen |= met
            chosen.append(test)
    return sorted(chosen)


def one_of_each(tests: Sequence[Sequence[Factor]], alike: Mapping[str, str]) -> list[int]:
    """Ascending positions of the whole product but for tests that differ from another only in values that are alike.

    Each two values still meet in some test.
    """
    chosen: list[int] = []
    seen: set[Any] = set()
    for test in diagonally(tests):
        function, *parameters = tests[test]
        kind = (function, *((name, alike.get(value, value)) for name, value in parameters))
        pairs = {frozenset(pair) for pair in combinations(parameters, 2)}
        if not {kind, *pairs} <= seen:
            seen |= {kind, *pairs}
            chosen.append(test)
    return sorted(chosen)


def each_two_in_each_function(tests: Sequence[Sequence[Factor]], kinds: Mapping[str, str]) -> list[int]:
    """Ascending positions of tests in which each two values that a function can have together, counted by their kinds,
    meet in this function: a design of strength three, where `covering` is one of strength two.
    """
    chosen: list[int] = []
    seen: set[Any] = set()
    for test in diagonally(tests):
        function, *parameters = tests[test]
        values = [(name, kinds.get(value, value)) for name, value in parameters]
        met = {(function, *sorted(some)) for size in (1, 2) for some in combinations(values, size)}
        if not met or not met <= seen:
            seen |= met
            chosen.append(test)
    return sorted(chosen)


def each_function_once(tests: Sequence[Sequence[Factor]]) -> list[int]:
    """Ascending positions of one test of each function."""
    first = {tests[test][0]: test for test in reversed(diagonally(tests))}
    return sorted(first.values())


def diagonally(tests: Sequence[Sequence[Factor]]) -> list[int]:
    """Positions of tests along diagonals of their product."""
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    for factors in tests:
        for name, value in factors:
            numbers[name].setdefault(value, len(numbers[name]))

    def diagonal(test: int) -> int:
        return sum(numbers[name][value] for name, value in tests[test]) % STRIDE

    return sorted(range(len(tests)), key=diagonal)


def factors_of(function: str, parameters: dict[str, Any]) -> list[Factor]:
    """The function and every parameter of a test; a parameter that is a tuple is as many as it has items."""
    return [("function", function), *(factor for name, value in parameters.items() for factor in _parts(name, value))]


def kinds_of_families() -> dict[str, str]:
    """The class that a family's adapter has all its code from, by the family's name as ``factors_of`` gives it."""

    def is_own(name: str, value: Any) -> bool:
        return not (name.startswith("__") or isinstance(value, str))  # a name of a part, or a reason, is no code

    classes = {name: type(get_adapter(name)).__mro__ for name in list_adapters()}
    return {
        repr(name): next(each.__qualname__ for each in mro if any(is_own(*member) for member in vars(each).items()))
        for name, mro in classes.items()
    }


def places_of_methods() -> dict[str, str]:
    """Where a method for decoders prunes, and whether it reads anything, by its case as ``factors_of`` gives it."""
    model = built("llava")
    stages = {case: stages_of(model, case.config(model)) for case in CASES}
    return {
        repr(case): repr((sorted({stage.where for stage in of_case}), any(stage.needs for stage in of_case)))
        for case, of_case in stages.items()
    }


def kinds_of_methods() -> dict[str, str]:
    """Where a method for decoders prunes and what it reads there, by its case as ``factors_of`` gives it."""
    model = built("llava")
    return {
        repr(case): repr(
            [(stage.where, sorted(stage.needs), stage.text_rows) for stage in stages_of(model, case.config(model))]
        )
        for case in CASES
    }


def _parts(name: str, value: Any) -> Iterator[Factor]:
    if isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _parts(f"{name}.{number}", item)
    else:
        yield name, getattr(value, "__qualname__", repr(value))
