"""What every test may use: where the shared data is, and determinism. Tiny models come from ``tests/families.py``."""

import os
from pathlib import Path
from typing import Any

# Before anything imports transformers: no test needs a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from .covering import (
    covering,
    each_two_in_each_function,
    factors_of,
    kinds_of_families,
    kinds_of_methods,
    one_of_each,
    places_of_methods,
)

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, ten times as long on a busy machine

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """Folder with golden vectors and real data, beside the checkout; its tests skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"golden vectors and real data are not at {SHARED}")
    return SHARED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole cross product, and slow tests (make test-all)")
    parser.addoption("--rest", action="store_true", help="more combinations than make test, and some slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {} if torch.cuda.is_available() else {"gpu": "no CUDA device"}
    if not (config.getoption("--all") or config.getoption("--rest")):
        skips["slow"] = "slow: run with --all"
    skipped = set()
    for item in items:
        for mark in filter(item.get_closest_marker, skips):
            item.add_marker(pytest.mark.skip(reason=skips[mark]))
            skipped.add(item)
    run = [item for item in items if item not in skipped]  # a test that is skipped covers nothing
    factors = [factors_of(*named(item)) for item in run]
    kinds = {**kinds_of_families(), **places_of_methods()}
    alike = kinds_of_methods()

    def some_of(part: list[int]) -> set[int]:
        return {part[i] for i in covering([factors[i] for i in part], kinds, alike)}

    slow = [i for i, item in enumerate(run) if item.get_closest_marker("slow")]
    quick = [i for i, item in enumerate(run) if not item.get_closest_marker("slow")]
    if config.getoption("--all"):
        numbers = {*one_of_each(factors, alike)}
    elif config.getoption("--rest"):
        rest = each_two_in_each_function([factors[i] for i in quick], kinds)
        numbers = {quick[i] for i in rest} - some_of(quick) | some_of(slow)
    else:
        numbers = some_of(quick)
    chosen = {run[i] for i in numbers} | skipped
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def named(item: pytest.Item) -> tuple[str, dict[str, Any]]:
    """The test's function, and its parameters."""
    return item.nodeid.partition("[")[0], item.callspec.params if hasattr(item, "callspec") else {}
