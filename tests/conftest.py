"""What every test may use: where the shared data is, and determinism. Tiny models come from ``tests/families.py``."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports transformers: no test needs a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from .covering import (
    covering,
    each_function_once,
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


@pytest.fixture(autouse=True)
def _no_mixed_precision_of_former_tests() -> Iterator[None]:
    """A `Trainer` with bf16 leaves it to every `Accelerator` of the process."""
    yield
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    if state is not None and state._shared_state.get("_mixed_precision", "no") != "no":
        state._reset_state()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the whole cross product, and slow tests (make test-all)")
    parser.addoption("--rest", action="store_true", help="more combinations than make test, and some slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    factors = [factors_of(*named(item)) for item in items]
    kinds = {**kinds_of_families(), **places_of_methods()}
    alike = kinds_of_methods()

    def part_of(part: list[int], design: Callable[..., list[int]], *of_values: dict[str, str]) -> set[int]:
        return {part[i] for i in design([factors[i] for i in part], *of_values)}

    of_gpu = [
        i for i, item in enumerate(items) if item.get_closest_marker("gpu")
    ]  # where it is skipped it covers nothing
    others = [i for i in range(len(items)) if i not in {*of_gpu}]
    slow = [i for i in others if items[i].get_closest_marker("slow")]
    quick = [i for i in others if i not in {*slow}]
    if config.getoption("--all"):
        numbers = part_of(others, one_of_each, alike) | part_of(of_gpu, one_of_each, alike)
    elif config.getoption("--rest"):
        more = part_of(quick, each_two_in_each_function, kinds) - part_of(quick, covering, kinds, alike)
        light = [i for i in slow if not items[i].get_closest_marker("heavy")]
        numbers = more | part_of(light, each_function_once)
    else:
        numbers = part_of(quick, covering, kinds, alike) | part_of(of_gpu, covering, kinds, alike)
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i not in numbers])
    items[:] = [item for i, item in enumerate(items) if i in numbers]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def named(item: pytest.Item) -> tuple[str, dict[str, Any]]:
    """The test's function, and its parameters."""
    return item.nodeid.partition("[")[0], item.callspec.params if hasattr(item, "callspec") else {}
