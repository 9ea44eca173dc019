"""A budget in seconds: how long a forward takes on this machine, as a sum over blocks.

Of a vision-language model it is the prefill, and blocks are the layers of the language model. What one takes in the
mean is measured inside the whole model (by itself it has the cache to itself): with all blocks left out, and with a
number of tokens dropped in front, without looking at them. Between these numbers time is linear, and blocks that differ
take parts of it as their multiply-adds are. A block in which tokens leave takes the part of that time which its
multiply-adds are, and on top the method's decision, which is what a forward pruned by the method's rule for the budget
takes longer than the sum.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..benchmark.decoder import random_inputs
from ..benchmark.timing import seconds, settings
from ..config import PruneConfig
from ..cost.decoder import TEXT_TOKENS
from ..engine import find_adapter, pruned
from ..errors import ConfigError
from ..registry import get_method
from ..signals import ENTRANCE
from .journal import Journal
from .objective import skipped
from .problem import Problem, Trial
from .space import Costs, Schedule, Space

PARTS = (0.8, 0.6, 0.4, 0.2, 0.05)
"""Of all prunable tokens, the numbers with which blocks are timed."""
WARMUP, ROUNDS = 1, 7
"""Rounds of every measurement that are thrown away, and those whose median counts."""
REFINEMENTS = 2
"""How often the decision is measured: at the rule's schedule without it, then at that with it."""
FITS = 2
"""How often what was found is timed, and fitted to the budget."""


class Latency:
    """Seconds of one forward of ``batch_size`` images through a dense model, which is left as it was.

    Args:
        untimed: the multiply-adds of a config's schedules.
        journal: has the times, or gets them: a search that is started again has the budget it had.
        text_tokens: vision-language models: of each prompt, besides those of its one image; None: 64.

    Attributes:
        dense: seconds of the model as it is.

    Raises:
        ConfigError: ``batch_size`` is below 1.
    """

    def __init__(
        self,
        model: Any,
        batch_size: int,
        untimed: Callable[[PruneConfig], Costs],
        journal: Journal,
        text_tokens: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}: expected at least 1")
        self.model, self.untimed, self.journal = model, untimed, journal
        adapter, parameter = find_adapter(model), next(model.parameters())
        self.shape = shape = adapter.shape(model)
        self.setting = [repr(shape), batch_size, text_tokens, ROUNDS, str(parameter.device), str(parameter.dtype)]
        if shape.kind == "decoder":
            place, self.others = ENTRANCE, TEXT_TOKENS if text_tokens is None else text_tokens
            inputs = random_inputs(model, batch_size, self.others)
            self.run = partial(model, **inputs, use_cache=True, logits_to_keep=1)
        else:
            pixels = torch.randn(batch_size, shape.num_channels, *shape.image_size)
            inputs = adapter.image_inputs(model, pixels.to(parameter.device, parameter.dtype))
            self.run = partial(getattr(model, "get_image_features", model), **inputs)
            place, self.others = 0, shape.num_protected
        uniform = get_method("uniform")()
        dropped = sorted({max(1, round(part * shape.num_prunable)) for part in PARTS} - {shape.num_prunable})
        arms: list[Callable[[], Any]] = [partial(skipped, list(adapter.blocks(model)), lambda entering: entering)]
        arms += [partial(pruned, model, uniform.with_counts(shape, {place: left})) for left in dropped]
        self.dense, outside, *behind = self._timed("blocks", arms)
        whole = (1 - outside) / shape.depth  # of a block, as a part of the dense time
        fewer = shape.depth - 1 - place  # blocks that the dropped ones do not reach
        self.fixed = outside * self.dense
        self.lengths = [self.others + left for left in (*dropped, shape.num_prunable)]
        self.of_block = [self.dense * max(0.0, whole - (1 - part) / fewer) for part in behind] + [self.dense * whole]

    def costs(self, config: PruneConfig, budget: float) -> Costs:
        """Seconds of a schedule of this config's method, the decision measured with its rule for ``budget`` seconds."""
        costs = self._costs(config, 0.0)
        for attempt in range(REFINEMENTS):
            space = Space(config, self.shape, costs, budget)
            rule = space.rule()
            schedule = rule[1] if rule else space.within([1.0] * len(space.places))
            if schedule is None:  # out of reach: whoever searches says so
                break
            costs = self._with_decision(rule[0] if rule else space.config_of(schedule), schedule, attempt)
        return costs

    def fitted(self, problem: Problem, found: Trial, by_rule: bool) -> Trial:
        """The schedule made stronger or weaker until it takes the time of the budget: measured anew, with itself.

        What a search chose among several timed configs is rather one whose time was measured too low.

        Args:
            by_rule: it is the method's rule, and shall stay that.
        """
        for attempt in range(REFINEMENTS, REFINEMENTS + FITS):
            costs = self._with_decision(found.config, found.schedule, attempt)
            space = Space(found.space.config, self.shape, costs, found.space.budget)
            if by_rule:
                fitting = problem.rule(space)
            else:
                removed = [float(a - b) for a, b in pairwise((space.num_tokens, *found.schedule))]
                scaled = space.within(removed)
                fitting = problem.measure(scaled, space=space, discard=False) if scaled else None
            if not fitting:
                raise ConfigError(f"{space.config.method} was found to take longer than {space.budget:.4g} s; raise it")
            found = fitting
        return found

    def _with_decision(self, config: PruneConfig, schedule: Schedule, attempt: int) -> Costs:
        """Seconds of schedules, the decision measured with this one."""
        label = json.dumps([attempt, config.to_dict()])
        _, part = self._timed(label, [partial(pruned, self.model, config)])
        without = Space(config, self.shape, self._costs(config, 0.0), math.inf)
        num_stages = len(set(schedule) - {without.num_tokens})
        return self._costs(config, max(0.0, part * self.dense - without.cost(schedule)) / num_stages)

    def _costs(self, config: PruneConfig, decision: float) -> Costs:
        """With so many seconds for each place that prunes."""
        untimed = self.untimed(config)
        others = self.others + self.shape.num_prunable - config.prunable(self.shape)
        alike = range(self.shape.depth) if self.shape.kind == "decoder" else (0,)  # layers of a decoder may differ

        def step(place: int, entering: int, left: int) -> float:
            choice = decision if left < entering else 0.0
            if place < 0:
                return choice
            mean_seconds = float(np.interp(entering + others, self.lengths, self.of_block))
            mean_macs = statistics.fmean(untimed.step(other, entering, entering) for other in alike)
            return mean_seconds * untimed.step(place, entering, left) / mean_macs + choice

        return Costs(self.dense, self.fixed, step, "s")

    def _timed(self, label: str, arms: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of the dense model, and each arm's time as a part of that in the same round: medians over rounds."""
        key = json.dumps(["seconds", *self.setting, label])
        if not self.journal.read(key):
            rows = []
            with settings(self.model, None):
                for _ in range(WARMUP + ROUNDS):  # interleaved: a machine that slows down slows all of a round
                    row = []
                    for arm in (nullcontext, *arms):
                        with arm():
                            row.append(seconds(self.run))
                    rows.append(row)
            whole = statistics.median(row[0] for row in rows[WARMUP:])
            parts = [statistics.median(row[i] / row[0] for row in rows[WARMUP:]) for i in range(1, len(arms) + 1)]
            self.journal.write(key, [whole, *parts])
        return self.journal.read(key)
