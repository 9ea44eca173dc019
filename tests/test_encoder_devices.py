"""Encoders whose blocks are on two devices, as a ``device_map`` spreads them: what blocks tell each other follows."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_tokenprune import PruneConfig, prune, record
from hf_tokenprune.registry import get_adapter

from .families import first_tensor, images, inputs_for, methods_for, refused, supported_classes, tiny_model
from .two_devices import FIRST, SECOND, Devices, put, spread

ADAPTERS = list({type(get_adapter(family)): (family, cls) for family, cls in supported_classes()}.values())


def configs() -> list[PruneConfig]:
    """Every method as it is and restored; those that can before the queries, there too."""
    found = []
    for name in methods_for("vision"):
        config = PruneConfig.for_method(name)
        found.append(config)
        if hasattr(config, "restore") and name != "exact":
            found.append(replace(config, exact_last_block=False, restore=True))  # type: ignore[call-arg]
        if hasattr(config, "where") and name != "zero_tprune":
            found.append(replace(config, where="queries"))  # type: ignore[call-arg]
    return list(dict.fromkeys(found))


def on_two_devices(model: Any) -> None:
    """The second half of the blocks, and what stands behind them, on the second device."""
    blocks = get_adapter(model.config.model_type).blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    behind = False
    for module in model.modules():
        behind = behind or module is blocks[-1]
        if module not in inside and not any(child in inside for child in module.modules()):
            spread(module, SECOND if behind else FIRST)
    for index, block in enumerate(blocks):
        spread(block, FIRST if index < len(blocks) // 2 else SECOND)
    for tensor in (*model.parameters(recurse=True), *model.buffers()):
        if not hasattr(tensor, "emulated_device"):
            put(tensor, FIRST)


@pytest.mark.parametrize("family", ADAPTERS, ids=lambda pair: pair[0])
@pytest.mark.parametrize("config", configs(), ids=lambda c: f"{c.method}-{c.where if hasattr(c, 'where') else ''}")
def test_blocks_on_two_devices(family: Any, config: PruneConfig) -> None:
    model = tiny_model(*family, num_hidden_layers=4)
    if refused(model, config):
        pytest.skip("this family lacks what the method needs")
    prune(model, config)
    inputs = inputs_for(model, images())
    with torch.no_grad(), record(model) as alone:
        expected = first_tensor(model(**inputs))
        kept = dict(alone.kept)
    on_two_devices(model)
    with Devices(), torch.no_grad(), record(model) as rec:
        moved = {name: put(value, FIRST) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        found = first_tensor(model(**moved))
        kept_there = dict(rec.kept)
    torch.testing.assert_close(found, expected)
    assert all(torch.equal(kept_there[name], kept[name]) for name in kept)
