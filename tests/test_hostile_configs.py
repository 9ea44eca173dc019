"""Configs that nobody wrote by hand: drawn from the types of the fields of every method, mutated, hostile."""

import dataclasses
import functools
import json
import os
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, ViTForImageClassification

import hf_tokenprune
from hf_tokenprune import PruneConfig, RandomConfig, list_methods, prune
from hf_tokenprune.config import CONFIG_NAME
from hf_tokenprune.config_files import MAX_FILE_BYTES
from hf_tokenprune.errors import ConfigError
from hf_tokenprune.field_types import field_types
from hf_tokenprune.registry import get_method

from .families import tiny_model

LONGEST = 3000
"""Characters of a message: names of all methods or fields, and what is shown of values."""


# -- drawn configs ---------------------------------------------------------------------------------------------------


@functools.cache
def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that the annotation of a field allows, most of them small; ranges are for the config to check."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(values(args[0]), max_size=4).map(lambda found: tuple(sorted(found, key=repr)))
        return st.tuples(*map(values, args))
    if hasattr(hint, "from_dict"):
        return st.deferred(configs)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        float: st.sampled_from([0.0, 0.25, 0.5, 1 / 3, 0.1, 1.0]) | st.floats(allow_nan=False, allow_infinity=False),
        int: st.integers(0, 12) | st.integers(-(2**63), 2**63),
        bool: st.booleans(),
        str: st.text(max_size=8),
        type(None): st.none(),
    }
    return simple[hint]


@functools.cache
def some_of(names: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), max_size=4, unique=True)


@st.composite
def configs(draw: Any) -> PruneConfig:
    """A config of any method with up to four fields that are not its defaults."""
    config_class = get_method(draw(st.sampled_from(list_methods())))
    types_of = field_types(config_class)
    names = draw(some_of(tuple(types_of))) if types_of else []
    try:
        return config_class(**{name: draw(values(types_of[name])) for name in names})
    except ConfigError:
        assume(False)
        raise


JUNK = st.sampled_from(
    [
        *(
            "",
            "../../etc/passwd",
            "/dev/zero",
            "random\0",
            "r\u0430ndom",
            "\u202emodnar",
            "__class__",
            "\ud800",
            "os.system",
        ),
        *("hf_tokenprune.methods.random", "random.__init__", "x" * 20_000, "auto", "nan", "1"),
        *(
            0,
            -1,
            2**31,
            2**63,
            -(2**64),
            10**400,
            10**4000,
            1e308,
            5e-324,
            float("nan"),
            float("inf"),
            True,
            False,
            None,
        ),
        *([], {}, [[]], [0.5] * 1025, [1] * 20_000, {"method": "random"}, {"method": {"method": "stack"}}),
        {"method": "stack", "stages": [{"method": "stack"}] * 3},
    ]
)
NESTED = st.integers(2, 3000).map(lambda depth: "[" * depth + "]" * depth)
"""Text: an object of that depth may be more than Python can write."""


def replaced(tree: Any, path: list[int], change: Callable[[Any], Any]) -> Any:
    """``tree`` with one of its values changed: the one at ``path``, as far as there is something below."""
    if not path or not isinstance(tree, (list, dict)) or not tree:
        return change(tree)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[path[0] % len(keys)]
    changed = tree.copy()
    changed[key] = replaced(tree[key], path[1:], change)
    return changed


@st.composite
def mutated(draw: Any) -> bytes:
    """The file of a config with a few of its values, fields or characters changed."""
    tree: Any = draw(configs()).to_dict()
    for _ in range(draw(st.integers(1, 3))):
        what = draw(st.sampled_from(["value", "value", "nested", "field", "gone", "swap"]))
        path = draw(st.lists(st.integers(0, 20), min_size=1, max_size=3))
        junk = draw(JUNK)
        if what == "value":
            tree = replaced(tree, path, lambda _, junk=junk: junk)
        elif what == "nested":
            tree = replaced(tree, path, lambda value: [value])
        elif not isinstance(tree, dict) or not tree:
            continue
        elif what == "field":
            tree = {**tree, draw(JUNK.filter(lambda name: isinstance(name, str))): junk}
        elif what == "gone":
            tree = {name: value for name, value in tree.items() if name != list(tree)[path[0] % len(tree)]}
        else:  # values of two fields
            one, other = (list(tree)[number % len(tree)] for number in (path[0], path[-1] + 1))
            tree = {**tree, one: tree[other], other: tree[one]}
    text = bytearray(json.dumps(tree, indent=draw(st.sampled_from([None, 2]))).encode())
    if draw(st.integers(0, 4)) == 0:
        place = draw(st.integers(0, len(text)))
        text[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | NESTED.map(str.encode))
    return bytes(text)


def drawn(cases: int) -> Callable[[Any], Any]:
    everything = list(HealthCheck)
    return settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=everything
    )


def check_round_trip(config: PruneConfig) -> None:
    again = PruneConfig.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))
    assert again == config and hash(again) == hash(config) and str(again) == str(config)
    assert type(again) is type(config) and again.to_dict() == config.to_dict()
    for name in field_types(type(config)):
        assert type(getattr(again, name)) is type(getattr(config, name))
    assert dataclasses.replace(config) == config


CASES = [pytest.param(150, id="few"), pytest.param(5000, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("cases", CASES)
def test_every_config_is_the_same_after_a_round_trip(cases: int) -> None:
    found: set[str] = set()

    @drawn(cases)
    @given(configs())
    def check(config: PruneConfig) -> None:
        check_round_trip(config)
        found.add(config.method)

    check()
    assert len(found) > len(list_methods()) // 2


@pytest.mark.parametrize("cases", CASES)
def test_a_mutated_file_is_a_config_or_an_error_that_says_what_is_wrong(cases: int, tmp_path: Path) -> None:
    outcomes = set()
    file = tmp_path / CONFIG_NAME

    @drawn(cases)
    @given(mutated())
    def check(text: bytes) -> None:
        file.write_bytes(text)
        try:
            config = PruneConfig.from_pretrained(tmp_path)
        except ConfigError as error:
            assert len(str(error)) < LONGEST and str(file) in str(error)
            outcomes.add("refused")
        else:
            check_round_trip(config)
            outcomes.add("taken")

    check()
    assert outcomes == {"refused", "taken"}


# -- files -----------------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        PruneConfig.from_pretrained(folder)
    assert len(str(error.value)) < LONGEST
    return str(error.value)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / CONFIG_NAME).write_bytes(pickle.dumps(Opened(), protocol))
        assert "not valid JSON" in refused(tmp_path)
    assert not (tmp_path / "opened").exists()


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / CONFIG_NAME).open("wb") as file:
        file.truncate(100 << 30)  # takes no room on the disk
    assert f"{100 << 30} bytes; a prune config has at most {MAX_FILE_BYTES}" in refused(tmp_path)


PLACES: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to nothing": lambda path: path.symlink_to("not here"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a folder": lambda path: path.symlink_to(path.parent),
}


@pytest.mark.parametrize("make", PLACES.values(), ids=PLACES)
def test_what_is_no_file_is_neither_read_nor_overlooked(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """Overlooked, the model would be a dense one."""
    tiny_model("vit", ViTForImageClassification).save_pretrained(tmp_path)
    make(tmp_path / CONFIG_NAME)
    assert f"{tmp_path / CONFIG_NAME} is no file" in refused(tmp_path)
    with pytest.raises(ConfigError, match="is no file"):
        hf_tokenprune.from_pretrained(tmp_path)


def test_a_link_is_followed(tmp_path: Path) -> None:
    """The Hub's cache has a folder of links for each revision, and what they lead to outside of it."""
    file = RandomConfig(seed=5).save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / CONFIG_NAME).symlink_to(file)
    assert PruneConfig.from_pretrained(tmp_path / "checkpoint") == RandomConfig(seed=5)
    secret = tmp_path / "elsewhere" / "secret"
    secret.write_text('{"password": "hunter2"')
    (tmp_path / "checkpoint" / CONFIG_NAME).unlink()
    (tmp_path / "checkpoint" / CONFIG_NAME).symlink_to(secret)
    assert "hunter2" not in refused(tmp_path / "checkpoint")


@pytest.mark.parametrize("key", ["tome", "elsewhere", "owner/name", "tome/deit-tiny@0.85g", ["tome"], 3], ids=str)
def test_the_key_of_config_json_is_no_name_to_look_up(key: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Else a checkpoint could make its reader open any file or repository."""
    RandomConfig().save_pretrained(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint"
    model = tiny_model("vit", ViTForImageClassification)
    model.config.prune_config = key
    model.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).prune_config == key
    stock = ViTForImageClassification.from_pretrained(folder)
    for load in (lambda: hf_tokenprune.from_pretrained(folder), lambda: prune(stock)):
        with pytest.raises(ConfigError, match="a prune config is an object with a 'method', got"):
            load()


def test_letters_that_look_alike_are_told_apart() -> None:
    for name in ("r\u0430ndom", "random\u200b", "\u202emodnar", "random\0", "RANDOM", "\uff52andom"):
        with pytest.raises(ConfigError) as error:
            PruneConfig.from_dict({"method": name})
        message = str(error.value)
        assert message.isascii() and message.isprintable() and "no such method" in message


def test_numbers_of_thousands_of_digits_in_dictionaries() -> None:
    """Python refuses to write them."""
    large = 10**5000
    for value in (large, -large, [large], {"a": large}):
        for data in (
            {"method": "random", "seed": value},
            {"method": value},
            {"method": "random", "format_version": value},
        ):
            with pytest.raises(ConfigError, match="<an integer of 16610 bits>"):
                PruneConfig.from_dict(data)


@pytest.mark.parametrize("depth", [10, 900, 10_000])
def test_values_that_nest(depth: int) -> None:
    value: Any = []
    for _ in range(depth):
        value = [value]
    for data in ({"method": "random", "layers": value}, {"method": value}, value, {"method": "stack", "stages": value}):
        with pytest.raises(ConfigError) as error:
            PruneConfig.from_dict(data)
        assert len(str(error.value)) < LONGEST
