"""Schedules of token counts: which there are, what they cost, and the config each one is.

A schedule is a tuple with the prunable tokens left behind each layer; it never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..config import PruneConfig
from ..errors import ConfigError
from ..signals import ModelShape
from ..vision_cost import block_macs, model_cost

Schedule = tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """What one image costs, as a sum over layers: in multiply-adds, or in seconds.

    Attributes:
        fixed: everything that no schedule changes.
        step: (layer, prunable tokens that enter, that leave) -> cost of the layer.
    """

    fixed: float
    step: Callable[[int, int, int], float]


@dataclass(frozen=True)
class Space:
    """The schedules of one method on one shape of model.

    Attributes:
        config: gives everything but the counts.
        shape: of the model.
        costs: of a schedule.
        budget: what a schedule may cost.
    """

    config: PruneConfig
    shape: ModelShape
    costs: Costs
    budget: float

    @property
    def layers(self) -> tuple[int, ...]:
        """Where tokens may leave: in an exact last block all are read, and behind the last one nothing is saved."""
        return tuple(range(self.shape.depth - 1))

    def fewest(self, layer: int, entering: int) -> int:
        """The least that a stage in ``layer`` can leave."""
        return min(entering, self.config.fewest(entering)) if layer in self.layers else entering

    def cost(self, schedule: Schedule) -> float:
        """Of one image."""
        entering = (self.shape.num_prunable, *schedule)
        return self.costs.fixed + sum(map(self.costs.step, range(len(schedule)), entering, schedule))

    def clamped(self, wanted: list[float]) -> Schedule:
        """The schedule nearest to ``wanted`` counts, layer by layer."""
        entering, found = self.shape.num_prunable, []
        for layer, count in enumerate(wanted):
            entering = min(entering, max(int(count + 0.5), self.fewest(layer, entering)))
            found.append(entering)
        return tuple(found)

    def within(self, removed: list[float]) -> Schedule | None:
        """The schedule that removes tokens in these proportions, as few as the budget allows; None: out of reach."""
        weights = [removed[layer] if layer in self.layers else 0.0 for layer in range(self.shape.depth)]

        def at(strength: float) -> Schedule:
            left = float(self.shape.num_prunable)
            wanted = [left := left - strength * weight for weight in weights]
            return self.clamped(wanted)

        low, high = 0.0, 2.0 * self.shape.num_prunable / max(sum(weights), 1e-9)
        if self.cost(at(high)) > self.budget:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cost(at(middle)) <= self.budget else (middle, high)
        return at(high)

    def config_of(self, schedule: Schedule) -> PruneConfig:
        """The config whose stages leave these counts.

        Raises:
            ConfigError: it would prune nothing.
        """
        entering = (self.shape.num_prunable, *schedule)
        counts = {layer: left for layer, left in enumerate(schedule) if left < entering[layer]}
        if not counts:
            raise ConfigError("this schedule removes nothing; lower the budget")
        return self.config.with_counts(self.shape, counts)


def macs_costs(config: PruneConfig, shape: ModelShape) -> Costs:
    """Multiply-adds, as ``hf_tokenprune.cost`` counts them."""
    exact, where = getattr(config, "exact_last_block", False), getattr(config, "where", "mid_block")
    dense = model_cost(shape, exact_last_block=exact)
    protected, last = shape.num_protected, shape.depth - 1

    def step(layer: int, entering: int, left: int) -> float:
        if exact and layer == last:
            return block_macs(shape, "queries", entering + protected, protected)
        place = where if left < entering else "after_block"
        return block_macs(shape, place, entering + protected, left + protected)

    return Costs(dense.macs - sum(block.macs for block in dense.blocks), step)
