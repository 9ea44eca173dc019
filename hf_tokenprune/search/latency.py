"""A budget in seconds: how long a forward takes on this machine, as a sum over blocks.

All blocks of a model have the same sizes. What one takes is measured inside the whole model (by itself it has the cache
to itself): with all blocks left out, and with a number of tokens dropped behind the first one, without looking at them.
Between these numbers time is linear. A block in which tokens leave takes the part of that time which its multiply-adds
are, and on top the method's decision, which is what a forward pruned by the method's rule for the budget takes longer
than the sum.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from ..config import PruneConfig
from ..engine import find_adapter, pruned
from ..errors import ConfigError
from ..registry import get_method
from ..timing import seconds, settings
from ..vision_cost import block_macs
from .journal import Journal
from .objective import skipped
from .space import Costs, Space, macs_costs

PARTS = (0.8, 0.6, 0.4, 0.2, 0.05)
"""Of all patches, the numbers with which blocks are timed."""
WARMUP = 1
REFINEMENTS = 2
"""How often the decision is measured: at the rule's schedule without it, then at that with it."""


class Latency:
    """Seconds of one forward of ``batch_size`` images through a dense model, which is left as it was.

    Args:
        journal: has the times, or gets them: a search that is started again has the budget it had.
        rounds: of every measurement; medians count.

    Attributes:
        dense: seconds of the model as it is.

    Raises:
        ConfigError: a count below 1.
    """

    def __init__(self, model: Any, batch_size: int, journal: Journal, rounds: int = 7) -> None:
        for name, value in (("batch_size", batch_size), ("rounds", rounds)):
            if value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")
        self.model, self.batch_size, self.journal, self.rounds = model, batch_size, journal, rounds
        self.adapter = find_adapter(model)
        self.shape, parameter = self.adapter.shape(model), next(model.parameters())
        size = (self.shape.num_channels, *self.shape.image_size)
        pixels = torch.randn(batch_size, *size).to(parameter.device, parameter.dtype)
        self.inputs = self.adapter.image_inputs(model, pixels)
        num_patches = self.shape.num_patches
        dropped = sorted({max(1, round(part * num_patches)) for part in PARTS} - {num_patches})
        uniform = get_method("uniform")()
        arms: list[Callable[[], Any]] = [partial(skipped, list(self.adapter.blocks(model)), lambda entering: entering)]
        arms += [partial(pruned, model, uniform.with_counts(self.shape, {0: left})) for left in dropped]
        self.dense, outside, *behind = self._timed("blocks", arms)
        whole = (1 - outside) / self.shape.depth  # of a block, as a part of the dense time
        self.fixed = outside * self.dense
        self.lengths = [*dropped, num_patches]
        others = self.shape.depth - 1
        self.of_block = [self.dense * max(0.0, whole - (1 - part) / others) for part in behind] + [self.dense * whole]

    def costs(self, config: PruneConfig, budget: float) -> Costs:
        """Seconds of a schedule of this config's method, the decision measured with its rule for ``budget`` seconds."""
        decision = 0.0
        for _ in range(REFINEMENTS):
            space = Space(config, self.shape, self._costs(config, decision), budget)
            rule = space.rule()
            schedule = rule[1] if rule else space.within([1.0] * len(space.places))
            if schedule is None:  # out of reach: whoever searches says so
                break
            found = space.config_of(schedule)
            _, part = self._timed(json.dumps(found.to_dict()), [partial(pruned, self.model, found)])
            num_stages = len(set(schedule) - {space.num_tokens})
            without = Space(config, self.shape, self._costs(config, 0.0), budget).cost(schedule)
            decision = max(0.0, part * self.dense - without) / num_stages
        return self._costs(config, decision)

    def _costs(self, config: PruneConfig, decision: float) -> Costs:
        """With so many seconds for each layer that prunes."""
        macs = macs_costs(config, self.shape)

        def step(layer: int, entering: int, left: int) -> float:
            block = float(np.interp(entering, self.lengths, self.of_block))
            tokens = entering + self.shape.num_protected
            part = macs.step(layer, entering, left) / block_macs(self.shape, "after_block", tokens, tokens)
            return block * part + (decision if left < entering else 0.0)

        return Costs(self.dense, self.fixed, step)

    def _timed(self, label: str, arms: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of the dense model, and each arm's time as a part of that in the same round: medians over rounds."""
        parameter = next(self.model.parameters())
        key = json.dumps(["seconds", self.batch_size, self.rounds, str(parameter.device), str(parameter.dtype), label])
        if not self.journal.read(key):
            run, rows = getattr(self.model, "get_image_features", self.model), []
            with settings(self.model, None):
                for _ in range(WARMUP + self.rounds):  # interleaved: a machine that slows down slows all of a round
                    row = []
                    for arm in (nullcontext, *arms):
                        with arm():
                            row.append(seconds(partial(run, **self.inputs)))
                    rows.append(row)
            whole = statistics.median(row[0] for row in rows[WARMUP:])
            parts = [statistics.median(row[i] / row[0] for row in rows[WARMUP:]) for i in range(1, len(arms) + 1)]
            self.journal.write(key, [whole, *parts])
        return self.journal.read(key)
