"""Ways through a space of schedules: each measures schedules of a ``Problem`` and returns the best one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..evaluation.optional import require
from .problem import Problem, Trial
from .space import Schedule, Space

FRACTIONS = (1 / 8, 1 / 4, 1 / 2)
"""Parts of the tokens removed at one layer alone whose distortion is measured."""
TABLE_PART = 1 / 4
"""Part of the inputs that it is measured on: more of either did not lead to better schedules (docs/search.md)."""
BINS = 3000
"""Steps in which the exact solution counts cost: it uses the budget to within a part of a thousand."""


def choose_fields(problem: Problem) -> None:
    """One free field after the other gets the value whose rule has the least distortion within the budget.

    What a strategy proposes afterwards are schedules of the method with these values. An exact last block is not
    measured but taken where it is possible: it gives the same answers for less work.
    """
    free = problem.free
    for name in free.names if free else ():
        others = free.others(problem.space, name) if free else []
        if name == "exact_last_block":
            exact = [space for space in others if getattr(space.config, name)]
            problem.space = next(iter(exact), problem.space)
            continue
        spaces = [problem.space, *others]
        rules = [(space, rule) for space in spaces if (rule := space.rule())]
        measured = [
            problem.measure(schedule, space=space, config=config, discard=False) for space, (config, schedule) in rules
        ]
        problem.space = min(measured, key=lambda trial: trial.distortion).space if measured else problem.space


def dynamic_programming(problem: Problem, seed: int = 0, trials: int = 0) -> Trial:
    """Measure each layer by itself, suppose that distortions add, and solve for the budget exactly.

    The idea is that of layer-adaptive pruning by dynamic programming (for weights: Xu et al., "Efficient Joint
    Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks", ICCV 2023, arXiv 2308.10438), here for
    tokens. The distortion of a step from n to m of N tokens in layer l is supposed to be

        D_l(1 - m / n) · N / n

    where D_l(f) is measured with the part f of all N tokens removed in layer l alone: a token that is left where n of N
    are stands for N / n of them. How well that fits is reported by ``additivity``. ``trials`` further schedules around
    the solution are measured by ``coordinate_descent``.
    """
    table = distortion_table(problem)
    problem.measure(solve(problem, table), discard=False)
    if trials:
        coordinate_descent(problem, seed, trials)
    return _best(problem)


def distortion_table(problem: Problem) -> np.ndarray:
    """(places, len(FRACTIONS) + 1) distortions of removing a part of all tokens at one place; column 0 is 0."""
    space = problem.space
    num_tokens, num_places = space.num_tokens, len(space.places)
    table = np.zeros((num_places, len(FRACTIONS) + 1))
    for slot in space.slots:
        for column, fraction in enumerate(FRACTIONS, 1):
            left = min(round(num_tokens * (1 - fraction)), num_tokens - 1)
            schedule = space.clamped([*[num_tokens] * slot, *[left] * (num_places - slot)])
            table[slot, column] = problem.measure(schedule, discard=False, part=TABLE_PART).distortion
    problem.table = np.maximum.accumulate(table, axis=1)  # removing more is never better; what looks so is noise
    return problem.table


def solve(problem: Problem, table: np.ndarray) -> Schedule:
    """The schedule of least predicted distortion within the budget, exact up to the rounding of costs.

    Raises:
        ConfigError: the budget is out of reach.
    """
    space = problem.space
    num_tokens, step = space.num_tokens, space.costs.step
    stride = max(1, num_tokens // 200)
    counts = [*range(num_tokens, 0, -stride)]
    unit = (space.budget - space.costs.fixed) / BINS
    best = np.full((len(counts), BINS + 1), np.inf)
    best[0, 0] = 0.0
    choices = []
    for slot, place in enumerate(space.places):
        new, choice = np.full_like(best, np.inf), np.full(best.shape, -1, np.int16)
        for i, entering in enumerate(counts):
            if not np.isfinite(best[i]).any():
                continue
            fewest = space.fewest(slot, entering)
            for j in range(i, len(counts)):
                if counts[j] < fewest:
                    break
                bins = int(np.ceil(step(place, entering, counts[j]) / unit))
                if bins > BINS:
                    continue
                value = best[i, : BINS + 1 - bins] + step_distortion(table[slot], entering, counts[j], num_tokens)
                target = new[j, bins:]
                better = value < target
                target[better] = value[better]
                choice[j, bins:][better] = i
        best = new
        choices.append(choice)
    if not np.isfinite(best).any():  # costs are rounded up, and counts come in strides
        return _tightest(space)
    j, used = (int(index) for index in np.unravel_index(np.argmin(best), best.shape))
    found: list[float] = [counts[j]]
    for place, choice in zip(reversed(space.places), reversed(choices), strict=True):
        i = int(choice[j, used])
        used -= int(np.ceil(step(place, counts[i], counts[j]) / unit))
        found.append(counts[i])
        j = i
    return space.clamped(found[-2::-1])


def step_distortion(row: np.ndarray, entering: int, left: int, num_tokens: int) -> float:
    """D(1 - left / entering) · num_tokens / entering, between the measured fractions linear, beyond them growing on."""
    fraction = 1 - left / entering
    if fraction <= FRACTIONS[-1]:
        value = float(np.interp(fraction, (0.0, *FRACTIONS), row))
    else:  # from the last two: as a power of the part that stays
        growth = np.log(max(row[-1], 1e-12) / max(row[-2], 1e-12)) / np.log((1 - FRACTIONS[-2]) / (1 - FRACTIONS[-1]))
        value = float(max(row[-1], 1e-12) * ((1 - FRACTIONS[-1]) / max(1 - fraction, 1e-3)) ** max(growth, 1.0))
    return value * num_tokens / entering


def additivity(problem: Problem, table: np.ndarray) -> dict[str, float]:
    """How well the supposition predicts the schedules that were measured whole: rank correlation and mean ratio."""
    num_tokens = problem.space.num_tokens
    measured, expected = [], []
    for trial in problem.trials:
        steps = [(a, b) for a, b in pairwise((num_tokens, *trial.schedule))]
        if trial.space == problem.space and trial.whole and sum(a > b for a, b in steps) > 1:
            measured.append(trial.distortion)
            expected.append(sum(step_distortion(table[slot], a, b, num_tokens) for slot, (a, b) in enumerate(steps)))
    if len(measured) < 3:
        return {"schedules": len(measured)}
    ranks = np.array([np.argsort(np.argsort(values)) for values in (measured, expected)], float)
    ratio = float(np.exp(np.mean(np.log(np.array(measured) / np.array(expected)))))
    return {"schedules": len(measured), "spearman": float(np.corrcoef(ranks)[0, 1]), "measured_over_predicted": ratio}


def coordinate_descent(problem: Problem, seed: int = 0, trials: int = 60) -> Trial:
    """Move removed tokens from one layer to another and keep what is better, in ever smaller moves.

    It starts from the best schedule that was measured, such as the method's rule; without one, as many leave in every
    layer.
    """
    rng = np.random.default_rng(seed)
    space = problem.space
    start = problem.best_of(space)
    if start is None:
        evenly = space.within([1.0] * len(space.places))
        start = problem.measure(evenly or _tightest(space), discard=False)
    current, value, num_tokens = start.schedule, start.distortion, space.num_tokens
    size = num_tokens / 8
    for _ in range(trials):
        removed = [float(a - b) for a, b in pairwise((num_tokens, *current))]
        source, target = rng.choice(space.slots, 2, replace=False)
        moved = min(removed[source], rng.uniform(1, max(size, 2)))
        removed[source] -= moved
        removed[target] += moved
        candidate = space.within(removed)
        size *= 0.97
        if candidate is None or candidate == current:
            continue
        trial = problem.measure(candidate)
        if trial.whole and trial.distortion < value:
            current, value = candidate, trial.distortion
    return _best(problem)


def monte_carlo(problem: Problem, seed: int = 0, trials: int = 100) -> Trial:
    """Measure random schedules within the budget, as Zero-TPrune picks its own."""
    space, rng = problem.space, np.random.default_rng(seed)
    places, found = np.array(space.places), 0
    for _ in range(100 * trials):
        if found == trials:
            break
        starts = (places < 0) | (places >= rng.integers(max(space.shape.depth // 2, 1)))
        weights = rng.random(len(places)) ** 2 * starts
        tilt = np.linspace(1.0, rng.uniform(0.3, 3.0), len(places))
        candidate = space.within(list(weights * tilt))
        if candidate is not None:
            problem.measure(candidate)
            found += 1
    return _best(problem)


def _tightest(space: Space) -> Schedule:
    """The schedule that costs least, where there is no choice; ConfigError if that is too much."""
    space.check_reach()
    return space.tightest


def _best(problem: Problem) -> Trial:
    """The best schedule that was measured; where none of those proposed was within the budget, the tightest one."""
    return problem.best or problem.measure(_tightest(problem.space), discard=False)


def with_optuna(problem: Problem, seed: int = 0, trials: int = 100) -> Trial:
    """Let Optuna's tree-structured Parzen estimator propose in which proportions the layers remove tokens.

    Raises:
        ImportError: Optuna is not installed.
    """
    optuna = require("optuna", "optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = problem.space

    def objective(proposal: Any) -> float:
        weights = dict.fromkeys(range(len(space.places)), 0.0)
        weights |= {slot: proposal.suggest_float(f"layer {space.places[slot]}", 0.0, 1.0) for slot in space.slots}
        candidate = space.within([*weights.values()])
        if candidate is None:
            raise optuna.TrialPruned
        return problem.measure(candidate).distortion

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({f"layer {space.places[slot]}": 1.0 for slot in space.slots})
    study.optimize(objective, n_trials=trials)
    return _best(problem)


def every_place(problem: Problem, seed: int = 0, trials: int = 0) -> Trial:
    """Let all tokens leave at one place, as few as the budget asks for, and measure each place where that is enough."""
    space = problem.space
    for slot in space.slots:
        candidate = space.within([float(other == slot) for other in range(len(space.places))])
        if candidate is not None:
            problem.measure(candidate)
    return _best(problem)


def rule_alone(problem: Problem, seed: int = 0, trials: int = 0) -> Trial:
    """No schedule but the method's rule, with the fields that were chosen.

    For inputs that tell fields apart better than schedules, such as images made from the model.

    Raises:
        ConfigError: the rule does not reach the budget.
    """
    problem.space.check_reach(by_rule=True)
    found = problem.rule()
    assert found is not None
    return found


STRATEGIES: dict[str, Callable[..., Trial]] = {
    "dynamic": dynamic_programming,
    "coordinate": coordinate_descent,
    "monte_carlo": monte_carlo,
    "optuna": with_optuna,
    "rule": rule_alone,
}


def check_strategy(strategy: str, trials: int | None) -> None:
    """Raise ConfigError unless there is this strategy, and a number of trials has an effect on it.

    Raises:
        ImportError: what it needs is not installed.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}")
    if strategy == "rule" and trials is not None:
        raise ConfigError(f"trials={trials} has no effect with strategy='rule', which tries no schedules; leave it out")
    if strategy == "optuna":
        require("optuna", "optuna")
