"""A budget in seconds: how long a forward takes on this machine, as a sum over blocks.

All blocks of a model have the same sizes, so one of them is timed, with several numbers of tokens; between these, time
is linear. A block in which tokens leave takes the part of that time which its multiply-adds are, and on top the
method's decision, which is what one pruned forward takes longer than the sum.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..config import PruneConfig
from ..engine import counts, find_adapter, plan, pruned
from ..errors import ConfigError
from ..timing import seconds, settings
from .journal import Journal
from .space import Costs, macs_costs

PARTS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.05)
"""Of all patches, the numbers with which a block is timed."""
WARMUP = 2


def latency_costs(model: Any, config: PruneConfig, batch_size: int, journal: Journal, rounds: int = 9) -> Costs:
    """Seconds of one forward of ``batch_size`` images through a dense model, which is left as it was.

    Args:
        config: whose method decides, and whose schedule shows how long that takes.
        journal: has the times, or gets them: a search that is started again has the budget it had.
        rounds: of every measurement; medians count.

    Raises:
        ConfigError: a count below 1, or a config that does not fit the model.
    """
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise ConfigError(f"{name}={value}: expected at least 1")
    adapter = find_adapter(model)
    shape, parameter = adapter.shape(model), next(model.parameters())
    macs, num_patches = macs_costs(config, shape), shape.num_patches
    lengths = sorted({max(1, round(part * num_patches)) for part in PARTS})
    key = json.dumps(["seconds", batch_size, rounds, str(parameter.device), str(parameter.dtype), config.to_dict()])
    if not journal.read(key):
        journal.write(key, _times(model, config, batch_size, lengths, rounds))
    whole, measured, *of_block = journal.read(key)

    def without_decision(layer: int, entering: int, left: int) -> float:
        full = float(np.interp(entering, lengths, of_block))
        return full * macs.step(layer, entering, left) / macs.step(0, entering, entering)

    fixed = whole - shape.depth * of_block[-1]
    stages = {stage.layer: n_keep for stage, _, n_keep in counts(plan(config, shape), shape)}
    left = [num_patches]
    for layer in range(shape.depth):
        left.append(stages.get(layer, left[-1]))
    expected = fixed + sum(without_decision(layer, a, b) for layer, (a, b) in enumerate(pairwise(left)))
    decision = max(0.0, measured - expected) / len(stages)
    return Costs(fixed, lambda layer, a, b: without_decision(layer, a, b) + (decision if b < a else 0.0))


def _times(model: Any, config: PruneConfig, batch_size: int, lengths: list[int], rounds: int) -> list[float]:
    """Seconds of the dense model, of the pruned one, and of a block with each number of prunable tokens."""
    adapter, parameter = find_adapter(model), next(model.parameters())
    shape = adapter.shape(model)
    block, run = adapter.blocks(model)[shape.depth // 2], getattr(model, "get_image_features", model)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(batch_size, *size).to(parameter.device, parameter.dtype)

    inputs = adapter.image_inputs(model, random(shape.num_channels, *shape.image_size))
    rows = []
    with settings(model, None):
        states = [random(length + shape.num_protected, shape.width) for length in lengths]
        for _ in range(WARMUP + rounds):  # interleaved: a machine that slows down slows all of a round
            row = [seconds(partial(run, **inputs))]
            with pruned(model, config):
                row.append(seconds(partial(run, **inputs)))
            rows.append(row + [seconds(partial(block, each)) for each in states])
    rows = rows[WARMUP:]
    whole = statistics.median(row[0] for row in rows)
    # The others as parts of the dense model's time in the same round, as in the benchmark.
    return [whole * statistics.median(row[i] / row[0] for row in rows) for i in range(len(rows[0]))]
