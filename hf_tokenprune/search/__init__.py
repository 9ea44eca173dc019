"""The best schedule of a method for a budget, found on some inputs, without labels and without training.

``search`` needs a model, a method and inputs; a budget of multiply-adds or of time on this machine says how much may be
left. ``hf-tokenprune search`` does the same on a folder of images, or of questions about images.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import PruneConfig
from ..cost.decoder import TEXT_TOKENS
from ..engine import ConfigLike, as_config, current_config, find_adapter, options, plan
from ..errors import ConfigError, PruneStateError
from ..evaluation.turns import eval_mode
from ..signals import Shape
from .answers import AnswerObjective
from .free import Free, free_names
from .journal import Journal
from .latency import Latency
from .objective import Goal, Objective, check_goal
from .problem import Problem, Trial
from .space import Costs, Space, macs_costs, prefill_costs
from .strategies import FRACTIONS, STRATEGIES, TABLE_PART, additivity, check_strategy, choose_fields, every_place

__all__ = ["AnswerObjective", "Costs", "Objective", "Problem", "SearchResult", "Space", "Trial", "search"]


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        config: the best one.
        distortion: its mean distortion on the inputs of the search.
        rule: what the method's rule has within the same budget: its config and distortion; None: it does not reach it.
        cost, budget: of one image (of the prefill of a prompt with one), in MACs; or of a batch, in seconds.
        trials: schedules that were measured, in their order.
        measured: how many of them were run, and not read from a journal.
        additivity: for "dynamic", how well the sum over layers predicts what was measured.
        settings: what the result depends on.
    """

    config: PruneConfig
    distortion: float
    rule: tuple[PruneConfig, float] | None
    cost: float
    budget: float
    trials: tuple[Trial, ...]
    measured: int
    additivity: dict[str, float] | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        rule = None if self.rule is None else {"config": self.rule[0].to_dict(), "distortion": self.rule[1]}
        found = {"config": self.config.to_dict(), "distortion": self.distortion, "rule": rule}
        numbers = {"cost": self.cost, "budget": self.budget, "measured": self.measured, "additivity": self.additivity}
        return {**found, **numbers, "settings": self.settings, "trials": [trial.to_dict() for trial in self.trials]}


def search(
    model: Any,
    config: ConfigLike,
    batches: Sequence[Mapping[str, Tensor]] | Callable[[], Sequence[Mapping[str, Tensor]]],
    *,
    macs: float | None = None,
    seconds: float | None = None,
    speedup: float | None = None,
    strategy: str = "dynamic",
    goal: Goal | None = None,
    labels: Tensor | None = None,
    run: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    seed: int = 0,
    trials: int | None = None,
    latency_batch_size: int | None = None,
    text_tokens: int | None = None,
    new_tokens: int | None = None,
    free: Sequence[str] | None = None,
    fixed: Collection[str] = (),
    journal: Path | None = None,
    on_start: Callable[[int, int, float], None] = lambda evaluations, inputs, seconds: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> SearchResult:
    """The schedule of a method that changes the model's answers least within a budget.

    Args:
        model: dense, with an adapter; left as it was.
        config: the method, and the values of all fields that are not searched.
        batches: inputs of the model, on its device; they need no labels. Of a vision-language model inputs of
            ``generate``, padded on the left. Or a function that makes them: it is called when nothing else is wrong.
        macs: budget of one image in multiply-adds; of a vision-language model that of the prefill of a prompt with one.
        seconds: budget of a forward of ``latency_batch_size`` images (None: 1) on this machine; of a vision-language
            model that of the prefill of as many prompts with one image each.
        speedup: the same as the dense model's time over the budget. Exactly one of the three.
        strategy: "dynamic" (programming over each layer's own distortion, then coordinate descent for ``trials``),
            "coordinate" (descent), "monte_carlo", or "optuna" (an extra); or "rule", which chooses free fields and no
            schedule. A method with one stage has one number, which the budget decides: of it every place is measured
            instead.
        goal: "geometric_kl", "kl", "agreement" or "accuracy", which needs ``labels``; see ``Objective`` and
            ``AnswerObjective``. None: "geometric_kl", of answers "kl".
        labels: (n,) classes; or (n, L) tokens of the answers that a vision-language model is measured on, negative
            behind the end of each (None: its own).
        run: what maps a batch to (B, C) logits; None: the ``logits`` of the model.
        seed: of strategies that draw; the same seed gives the same config.
        trials: schedules to measure (after the table, for "dynamic"); None: 30 for "dynamic", else 100.
        text_tokens: vision-language models: tokens of the prompt that the budget is about, besides those of its image;
            None: 64.
        new_tokens: vision-language models: tokens of a dense answer, at most; None: 16.
        free: fields to choose beside the counts, each of a few values, such as "where"; () for none. None: those of the
            method's ``search_fields`` that ``config`` leaves at their defaults, as far as the model works with others.
        fixed: fields that are not chosen then, though they are at their defaults.
        journal: file of measurements: a search that is interrupted goes on where it was.
        on_start: told how many evaluations are coming, on how many inputs, and how many seconds they take at most.
        on_trial: told every measurement.

    Raises:
        ConfigError: not exactly one budget, one out of reach, an unknown strategy, a method without a schedule, an
            argument without an effect on this kind of model or with this strategy, a free field without a choice.
        UnsupportedModelError: the method does not fit the model.
        PruneStateError: the model is pruned.
    """
    config, adapter = as_config(config), find_adapter(model)
    shape = adapter.shape(model)
    is_decoder = shape.kind == "decoder"
    if current_config(model) is not None:
        raise PruneStateError("search compares with the dense model; call unprune(model) first")
    check_strategy(strategy, trials)
    goal = goal or ("kl" if is_decoder else "geometric_kl")
    check_goal(goal)
    name, value = one_budget(macs=macs, seconds=seconds, speedup=speedup)
    if macs is not None and latency_batch_size is not None:
        raise ConfigError(f"latency_batch_size={latency_batch_size} has no effect on a budget of MACs; leave it out")
    idle = {"run": run} if is_decoder else {"text_tokens": text_tokens, "new_tokens": new_tokens}
    for argument in (argument for argument, value in idle.items() if value is not None):
        kind = "vision-language model" if is_decoder else "vision encoder"
        raise ConfigError(f"{argument} has no effect on a {kind}; leave it out")
    if not batches:
        raise ConfigError("batches is empty: give inputs to search on")
    places = config.search_places(shape), config.prunable(shape)

    def check(candidate: PruneConfig) -> None:
        adapter.check(model, plan(_sample(candidate, shape), shape), **options(candidate, shape))
        if (candidate.search_places(shape), candidate.prunable(shape)) != places:
            raise ConfigError("schedules of this config are about other tokens or places")

    check(config)
    names = free_names(config, free, fixed, shape, check)
    if strategy == "rule" and not names:
        raise ConfigError("strategy='rule' chooses free fields, and there are none; without a search a budget gives it")
    with eval_mode(model):
        notes = Journal(journal)

        def untimed(candidate: PruneConfig) -> Costs:
            return prefill_costs(model, candidate, text_tokens) if is_decoder else macs_costs(candidate, shape)

        batch_size = 1 if latency_batch_size is None else latency_batch_size
        dense = untimed(config).dense
        latency = None if macs is not None else Latency(model, batch_size, untimed, notes, text_tokens)
        if latency is not None:
            dense = latency.dense
        budget = value
        if speedup is not None:
            budget = dense / speedup if speedup > 0 else 0.0
        if not 0 < budget < dense:
            unit = "MACs" if latency is None else "s"
            raise ConfigError(
                f"{name}={value:.4g} means a budget of {budget:.4g} {unit}: expected more than 0 and less than the "
                f"dense model's {dense:.4g} {unit}"
            )

        @cache
        def space_of(candidate: PruneConfig) -> Space:
            costs = latency.costs(candidate, budget) if latency else untimed(candidate)
            return Space(candidate, shape, costs, budget)

        space, fields = space_of(config), Free(names, shape, check, space_of)
        start = fields.first_within(space, by_rule=strategy == "rule")
        batches = batches() if callable(batches) else batches
        objective: Objective | AnswerObjective
        settings: dict[str, Any] = {"strategy": strategy, "goal": goal, "seed": seed}
        if is_decoder:
            objective = AnswerObjective(model, batches, goal, labels, new_tokens)
            settings |= {"text_tokens": text_tokens or TEXT_TOKENS, "new_tokens": objective.new_tokens}
        else:
            objective = Objective(model, batches, goal, labels, run)
        problem = Problem(space, objective, notes, on_trial, fields)
        find = STRATEGIES[strategy]
        count = trials if trials is not None else {"dynamic": 30, "rule": 0}.get(strategy, 100)
        if strategy != "rule" and (config.one_stage or len(space.slots) == 1):
            settings["strategy"], find, count = "every_place", every_place, len(space.slots)
        evaluations, time = _estimate(problem, settings["strategy"], count)
        on_start(evaluations, objective.n, time)
        rule = problem.rule()
        problem.space = start
        choose_fields(problem)
        rule_of_fields = problem.rule()
        best = find(problem, seed, count)
        if latency:
            best = latency.fitted(problem, best, by_rule=best is rule_of_fields)
    return SearchResult(
        config=best.config,
        distortion=best.distortion,
        rule=(rule.config, rule.distortion) if rule else None,
        cost=best.space.cost(best.schedule),
        budget=budget,
        trials=tuple(problem.trials),
        measured=problem.measured,
        additivity=None if problem.table is None else additivity(problem, problem.table),
        settings={**settings, "free": list(names), "trials": count, "inputs": objective.n},
    )


def one_budget(**budgets: float | None) -> tuple[str, float]:
    """The one that is given; ConfigError if that is not exactly one."""
    given = [(name, value) for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        *others, last = (f"{name}=" for name in budgets)
        got = ", ".join(f"{name}=" for name, _ in given) or "none"
        raise ConfigError(f"give one of {', '.join(others)} and {last}, got {got}")
    return given[0]


def _sample(config: PruneConfig, shape: Shape) -> PruneConfig:
    """A candidate that has a stage wherever one may be.

    Raises:
        ConfigError: the method has no schedule, or no place on a model of this shape.
    """
    if shape.kind not in config.prunes:
        plan(config, shape)  # raises, and says what the method works on
    space = Space(config, shape, Costs(0.0, 0.0, lambda place, entering, left: 0.0), 0.0)
    if not space.slots:
        raise ConfigError(f"{config} has no place to prune at on a model of {shape.depth} layers")
    fewest = space.clamped([0.0] * len(space.places))
    slots = space.slots[:1] if config.one_stage else space.slots
    try:
        return config.with_counts(shape, {space.places[slot]: fewest[slot] for slot in slots})
    except NotImplementedError as error:
        one = "pyramiddrop" if shape.kind == "decoder" else "salience_merge"
        raise ConfigError(f"{error}; give a method whose counts are free, such as {one!r}") from error


def _estimate(problem: Problem, strategy: str, trials: int) -> tuple[int, float]:
    """Evaluations to come, two of rules and that of the solution included, and seconds; of early blocks less is run."""
    space, objective = problem.space, problem.objective
    places = [space.places[slot] for slot in space.slots] if strategy == "dynamic" else []
    alone = [TABLE_PART * objective.part_run(place) for place in places for _ in FRACTIONS]
    free = problem.free
    chosen = [name for name in free.names if name != "exact_last_block"] if free else []
    values = sum(len(space.config.choices(name, space.shape)) for name in chosen)
    return len(alone) + values + trials + 3, objective.seconds * (sum(alone) + values + trials + 3)
