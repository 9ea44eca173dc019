"""Schedules of token counts: which there are, what they cost, and the config each one is.

A schedule is a tuple with the prunable tokens of one image left behind each place; it never rises. Places are the
layers and, in front of a decoder's, its vision tower and its entrance, where the method works there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..config import PruneConfig
from ..cost.budget import weakest
from ..cost.decoder import TEXT_TOKENS, layer_macs
from ..cost.model import counter
from ..cost.vision import block_macs, model_cost
from ..engine import counts
from ..errors import ConfigError
from ..signals import VISION_TOWER, DecoderShape, ModelShape, Shape

Schedule = tuple[int, ...]


@dataclass(frozen=True)
class Costs:
    """What one image costs, as a sum over places: in multiply-adds, or in seconds.

    Attributes:
        dense: of the model as it is.
        fixed: everything that no schedule changes.
        step: (place, prunable tokens that enter, that leave) -> cost of the layer; of a place in front of them 0.
        unit: of all of them, "MACs" or "s".
    """

    dense: float
    fixed: float
    step: Callable[[int, int, int], float]
    unit: str = "MACs"


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
    shape: Shape
    costs: Costs
    budget: float

    @cached_property
    def places(self) -> tuple[int, ...]:
        """What the counts of a schedule stand behind: all layers, and what ``config`` has in front of them."""
        return tuple(sorted({*self.config.search_places(self.shape), *range(self.shape.depth)}))

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Where in a schedule tokens may leave, as indices of ``places``."""
        return tuple(map(self.places.index, self.config.search_places(self.shape)))

    @cached_property
    def num_tokens(self) -> int:
        """Prunable tokens of one image."""
        return self.config.prunable(self.shape)

    def fewest(self, slot: int, entering: int) -> int:
        """The least that a stage at this place can leave."""
        if slot not in self.slots:
            return entering
        if isinstance(self.shape, DecoderShape) and self.places[slot] == VISION_TOWER:
            return self.shape.tower_images * self.config.fewest(self.shape.tower_tokens)
        return min(entering, self.config.fewest(entering))

    def possible(self, slot: int, count: int) -> int:
        """The most that a stage at this place, where something leaves, can leave of ``count`` tokens.

        In a vision tower every crop of an image keeps equally many tokens, and what joins the crops is made behind it.
        """
        if isinstance(self.shape, DecoderShape) and self.places[slot] == VISION_TOWER:
            of_each = min(count // self.shape.tower_images, self.shape.tower_tokens - 1)
            return self.shape.tower_images * of_each
        return count

    def cost(self, schedule: Schedule) -> float:
        """Of one image."""
        entering = (self.num_tokens, *schedule)
        return self.costs.fixed + sum(map(self.costs.step, self.places, entering, schedule))

    @cached_property
    def tightest(self) -> Schedule:
        """The schedule that costs least: as many tokens as may be leave, in the first places, and in as many as pay."""
        stages = self.slots[:1] if self.config.one_stage else self.slots
        wanted = ([0.0] * (slot + 1) + [float(self.num_tokens)] * (len(self.places) - slot - 1) for slot in stages)
        return min(map(self.clamped, wanted), key=self.cost)

    def check_reach(self, by_rule: bool = False) -> None:
        """Raise ConfigError if no schedule, or not that of the method's rule, is within the budget."""
        if by_rule and self.rule():
            return
        unit, least = self.costs.unit, self.cost(self.tightest)
        asked = f"a budget of {self.budget:.4g} {unit} is out of reach of"
        if least > self.budget:
            raise ConfigError(
                f"{asked} {self.config.method} on this model, whose strongest schedule takes {least:.4g} {unit}; raise "
                "it, or take another method"
            )
        if by_rule:
            raise ConfigError(
                f"{asked} the rule of {self.config.method} on this model; raise it, or search its schedules, on images"
            )

    def clamped(self, wanted: list[float]) -> Schedule:
        """The schedule nearest to ``wanted`` counts, place by place."""
        entering, found = self.num_tokens, []
        for slot, count in enumerate(wanted):
            left = min(entering, max(int(count + 0.5), self.fewest(slot, entering)))
            entering = self.possible(slot, left) if left < entering else entering
            found.append(entering)
        return tuple(found)

    def within(self, removed: list[float]) -> Schedule | None:
        """The schedule that removes tokens in these proportions, as few as the budget allows; None: out of reach."""
        weights = [weight if slot in self.slots else 0.0 for slot, weight in enumerate(removed)]

        def at(strength: float) -> Schedule:
            left = float(self.num_tokens)
            wanted = [left := left - strength * weight for weight in weights]
            return self.clamped(wanted)

        low, high = 0.0, 2.0 * self.num_tokens / max(sum(weights), 1e-9)
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
        steps = zip(self.places, (self.num_tokens, *schedule), schedule, strict=False)
        left_at = {place: left for place, entering, left in steps if left < entering}
        if not left_at:
            raise ConfigError("this schedule removes nothing; lower the budget")
        return self.config.with_counts(self.shape, left_at)

    def rule(self) -> tuple[PruneConfig, Schedule] | None:
        """The method's rule within the budget, as its config and its schedule; None: it does not reach it."""

        def cost(config: PruneConfig) -> float:
            return self.cost(self._schedule_of(config))

        try:
            found = weakest(
                self.config, lambda strength: self.config.by_rule(strength, self.shape), cost, self.budget, "budget"
            )
        except ConfigError:
            return None
        return found, self._schedule_of(found)

    def _schedule_of(self, config: PruneConfig) -> Schedule:
        """What a config of the same method leaves behind each place."""
        left = {stage.place: n_keep for stage, _, n_keep in counts(config.stages_for(self.shape), self.shape)}
        safe, found = self.shape.num_prunable - self.num_tokens, [self.num_tokens]
        for slot, place in enumerate(self.places):
            found.append(left[place] - safe if place in left and slot in self.slots else found[-1])
        return tuple(found[1:])


def macs_costs(config: PruneConfig, shape: ModelShape) -> Costs:
    """Multiply-adds, as ``hf_tokenprune.cost`` counts them."""
    exact, where = getattr(config, "exact_last_block", False), getattr(config, "where", "mid_block")
    dense = model_cost(shape)
    protected, last = shape.num_protected, shape.depth - 1

    def step(layer: int, entering: int, left: int) -> float:
        if exact and layer == last:
            return block_macs(shape, "queries", entering + protected, protected)
        place = where if left < entering else "after_block"
        return block_macs(shape, place, entering + protected, left + protected)

    return Costs(dense.macs, dense.macs - sum(block.macs for block in dense.blocks), step)


def prefill_costs(model: Any, config: PruneConfig, text_tokens: int | None) -> Costs:
    """Multiply-adds of the prefill of a vision-language model, as ``hf_tokenprune.cost`` counts them.

    Args:
        text_tokens: of the prompt, besides those of its one image; None: 64.
    """
    shape, count = counter(model, None, text_tokens, None)
    assert isinstance(shape, DecoderShape)
    dense, decoder = count(()), shape
    others = (text_tokens or TEXT_TOKENS) + shape.num_prunable - config.prunable(shape)

    def step(place: int, entering: int, left: int) -> float:
        return layer_macs(decoder, place, entering + others) if place >= 0 else 0.0

    return Costs(dense.macs, dense.macs - sum(layer.macs for layer in dense.layers), step)
