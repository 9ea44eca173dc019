"""What every test may use: where the shared data is, and determinism. Tiny models come from ``tests/families.py``."""

import os
from pathlib import Path
from zlib import crc32

# Before anything imports transformers: no test needs a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

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
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of tests with parameters, one in N, by name")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Which ones differs from test to test, so that every pair of a family and a method is in some of the contract.
    one_in = config.getoption("--one-in")
    items[:] = [item for item in items if not hasattr(item, "callspec") or crc32(item.nodeid.encode()) % one_in == 0]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
