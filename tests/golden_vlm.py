"""Vectors of official programs and of equations worked out apart from this package: golden/README.md."""

import importlib.util
import json
from typing import Any

import numpy as np
import pytest

from .conftest import SHARED

GOLDEN = SHARED / "golden"
NAME = "vlm_methods_2"
needs_golden = pytest.mark.skipif(not (GOLDEN / f"{NAME}.npz").exists(), reason="golden vectors are not here")


def values() -> dict[str, np.ndarray]:
    """All vectors by key; empty where they are not here."""
    path = GOLDEN / f"{NAME}.npz"
    return dict(np.load(path)) if path.exists() else {}


VALUES = values()
CASES: dict[str, dict[str, dict[str, Any]]] = json.loads(str(VALUES["cases"])) if VALUES else {}


def case_names(method: str) -> list[str]:
    """Names of the cases of a method, for ``parametrize``."""
    return list(CASES.get(method, ()))


def inputs(method: str, case: str) -> dict[str, Any]:
    """What a case's method reads, made from its seed."""
    spec = importlib.util.spec_from_file_location(f"{NAME}_inputs", GOLDEN / f"{NAME}_inputs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: dict[str, Any] = module.inputs(method, CASES[method][case])
    return made
