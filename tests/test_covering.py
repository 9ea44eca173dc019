"""The design that thins the cross product of tests."""

from itertools import combinations, product

from .covering import (
    covering,
    each_function_once,
    each_two_in_each_function,
    factors_of,
    kinds_of_families,
    one_of_each,
)

AXES = {"method": "abcdef", "family": "uvwxyz", "where": "12"}


def pairs_of(tests: list) -> set:
    return {pair for test in tests for pair in combinations(sorted(test), 2)}


def test_every_pair_stays_and_most_triples_go() -> None:
    tests = [
        factors_of(f"test_{number}", dict(zip(AXES, values, strict=True)))
        for number in range(9)
        for values in product(*AXES.values())
    ]
    chosen = covering(tests)
    assert pairs_of([tests[i] for i in chosen]) == pairs_of(tests)
    assert len(chosen) <= 2 * 9 * 6 and len(tests) == 648, "54 pairs of the two largest axes are the least there can be"


def test_pairs_are_spread_over_the_functions() -> None:
    """Else the first function would run the whole product of methods and families, and the others nearly nothing."""
    tests = [
        factors_of(f"test_{number}", {"pair": (family, method)})
        for number in range(6)
        for family, method in product(AXES["family"], AXES["method"])
    ]
    chosen = covering(tests)
    share = [sum(1 for i in chosen if tests[i][0][1] == f"test_{number}") for number in range(6)]
    assert max(share) <= 2 * min(share) and sum(share) < len(tests) / 2


def test_values_of_one_kind_are_one_beside_a_function_alone() -> None:
    tests = [
        factors_of(f"test_{number}", {"pair": (family, method)})
        for number in range(6)
        for family, method in product(AXES["family"], AXES["method"])
    ]
    kinds = {repr(value): value for value in AXES["family"] + AXES["method"]} | {repr("u"): "one", repr("v"): "one"}
    chosen = [tests[i] for i in covering(tests, kinds)]
    assert {tuple(test[1:]) for test in chosen} == {tuple(test[1:]) for test in tests}, "each method meets each family"
    met = {(test[0], kinds[test[1][1]]) for test in chosen}
    assert met == set(product({test[0] for test in tests}, ["one", *AXES["family"][2:]]))
    assert len(chosen) <= len(covering(tests))


def test_values_of_one_kind_are_one_beside_what_a_function_adds_too() -> None:
    """A further parameter makes variants of one test; it is no reason to try each family with each of them."""
    tests = [
        factors_of("test_it", {"pair": (family, method), "how": how})
        for how, family, method in product("123", AXES["family"], AXES["method"])
    ]
    kinds = dict.fromkeys(map(repr, AXES["family"]), "family") | dict.fromkeys(map(repr, AXES["method"]), "method")
    chosen = [tests[i] for i in covering(tests, kinds)]
    assert {tuple(test[1:3]) for test in chosen} == {tuple(test[1:3]) for test in tests}, (
        "each method meets each family"
    )
    assert len(chosen) <= 36 + 3
    assert {test[3][1] for test in chosen} == {repr(how) for how in "123"}


def test_values_that_have_met_under_other_names_have_met() -> None:
    tests = [
        [("function", name), (f"{name}.0", family), (f"{name}.1", method)]
        for name in ("test_it", "test_that")
        for family, method in product(AXES["family"], AXES["method"])
    ]
    kinds = dict.fromkeys(AXES["family"], "family") | dict.fromkeys(AXES["method"], "method")
    chosen = [tests[i] for i in covering(tests, kinds)]
    assert 36 <= len(chosen) < 36 * 2


def test_one_of_the_values_that_are_alike_meets_each_other_and_each_is_in_a_test() -> None:
    tests = [
        factors_of(f"test_{number}", {"pair": (family, method), "where": where})
        for number in range(6)
        for family, method, where in product(*(AXES[name] for name in ("family", "method", "where")))
    ]
    kinds = dict.fromkeys(map(repr, AXES["family"]), "family") | {repr(method): method for method in AXES["method"]}
    alike = {repr(method): "early" for method in "abc"}
    chosen = [tests[i] for i in covering(tests, kinds, alike)]
    assert {factor for test in chosen for factor in test} == {factor for test in tests for factor in test}

    def met(some: list) -> set:
        return {(function, method) for function, _, method, _ in some} | {
            (family, alike.get(method[1], method)) for _, family, method, _ in some
        }

    assert met(chosen) == met(tests)
    assert len(chosen) < len(covering(tests, kinds))


def test_of_tests_that_differ_in_values_that_are_alike_one_is_run() -> None:
    tests = [
        factors_of(f"test_{number}", dict(zip(AXES, values, strict=True)))
        for number in range(9)
        for values in product(*AXES.values())
    ]
    alike = {repr(m): "early" for m in "abcd"}
    chosen = [tests[i] for i in one_of_each(tests, alike)]
    kinds = {tuple((name, alike.get(value, value)) for name, value in test) for test in tests}
    assert {tuple((name, alike.get(value, value)) for name, value in test) for test in chosen} == kinds
    without = [[factor for factor in test if factor[0] != "function"] for test in (tests + chosen)]
    assert pairs_of(without[: len(tests)]) == pairs_of(without[len(tests) :]), "each method, each family, each place"
    assert len(kinds) <= len(chosen) < len(tests) * 0.7
    assert one_of_each(tests, {}) == list(range(len(tests)))


def test_families_with_the_same_adapter_are_of_one_kind() -> None:
    kinds = kinds_of_families()
    assert kinds["'smolvlm'"] == kinds["'idefics3'"] != kinds["'llava'"]


def test_a_test_that_is_asked_for_alone_is_run() -> None:
    assert covering([factors_of("test_it", {})]) == [0]
    assert covering([factors_of("test_it", {"method": "a", "family": "u"})]) == [0]


def test_values_are_told_apart_by_name_and_place() -> None:
    first, second = factors_of("f", {"pair": (("vit", int), 1)}), factors_of("f", {"pair": (("vit", float), 1)})
    assert first[:2] == second[:2] and first[2] == ("pair.0.1", "int") and second[2] == ("pair.0.1", "float")


def test_each_two_values_meet_in_each_function_and_no_three_need_to() -> None:
    axes = {**AXES, "how": "345"}
    tests = [
        factors_of(f"test_{number}", dict(zip(axes, values, strict=True)))
        for number in range(3)
        for values in product(*axes.values())
    ]
    kinds = {repr("u"): "one", repr("v"): "one"}

    def met(some: list) -> set:
        by_kind = [(function, *((name, kinds.get(value, value)) for name, value in rest)) for function, *rest in some]
        return {(function, *pair) for function, *rest in by_kind for pair in combinations(rest, 2)}

    chosen = each_two_in_each_function(tests, kinds)
    assert met([tests[i] for i in chosen]) == met(tests)
    assert 3 * 6 * 5 <= len(chosen) <= len(tests) / 3, "of each function the pairs of its two largest axes at least"
    assert each_two_in_each_function([[("function", name)] for name in "ab"], {}) == [0, 1]


def test_of_each_function_one_test() -> None:
    tests = [[("function", name), ("family", family)] for name in "abc" for family in "xyz"[: "abc".index(name) + 1]]
    assert [tests[i][0][1] for i in each_function_once(tests)] == ["a", "b", "c"]
