"""What a strategy searches: schedules in a space, each with a measured distortion, every measurement noted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from ..config import PruneConfig
from .answers import AnswerObjective
from .free import Free
from .journal import Journal
from .objective import Objective, mean
from .space import Schedule, Space

DISCARD_AFTER = 0.2
"""Part of the inputs after which a candidate may be given up."""
DISCARD_FACTOR = 1.5
"""How many times worse than the best it must be there."""


@dataclass
class Trial:
    """One measured schedule.

    Attributes:
        schedule: prunable tokens left behind each of the space's places.
        distortion: mean over the inputs that it was measured on.
        part: of the inputs; less than 1 if it was given up, or measured for a table only.
        feasible: whether it is within the budget.
        config: what was measured.
        space: what the schedule is one of.
    """

    schedule: Schedule
    distortion: float
    part: float
    feasible: bool
    config: PruneConfig
    space: Space = field(compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        measured = {"distortion": self.distortion, "part": self.part, "feasible": self.feasible}
        return {"schedule": list(self.schedule), **measured, "config": self.config.to_dict()}

    @property
    def whole(self) -> bool:
        """Whether all inputs were run."""
        return self.part == 1


@dataclass
class Problem:
    """Measures schedules, each at most once; what the journal has is read.

    Attributes:
        space: of the schedules that strategies propose.
        free: fields that are chosen before.
    """

    space: Space
    objective: Objective | AnswerObjective
    journal: Journal = field(default_factory=Journal)
    on_trial: Callable[[Trial], None] = lambda trial: None
    free: Free | None = None
    trials: list[Trial] = field(default_factory=list)
    measured: int = 0
    """Trials that were run and not read."""
    table: np.ndarray | None = None
    """Distortions of single layers, where a strategy measures them."""
    _inputs: str = ""

    def __post_init__(self) -> None:
        # What the dense model says of the inputs stands for both.
        said = hashlib.sha256(self.objective.dense.numpy().tobytes())
        if self.objective.labels is not None:
            said.update(self.objective.labels.cpu().numpy().tobytes())
        self._inputs = said.hexdigest()[:16]

    @property
    def best(self) -> Trial | None:
        """The schedule within the budget with the least distortion so far."""
        return self.best_of(None)

    def best_of(self, space: Space | None) -> Trial | None:
        """The same among the schedules of one space; None: of all."""
        feasible = [trial for trial in self.trials if trial.feasible and trial.whole and space in (None, trial.space)]
        return min(feasible, key=lambda trial: trial.distortion, default=None)

    def rule(self, space: Space | None = None) -> Trial | None:
        """The method's rule, with the fields of a space, measured; None: it does not reach the budget."""
        space = space or self.space
        rule = space.rule()
        if rule is None:
            return None
        config, schedule = rule
        done = (trial for trial in self.trials if trial.whole and (trial.config, trial.space) == (config, space))
        return next(done, None) or self.measure(schedule, space=space, config=config, discard=False)

    def measure(
        self,
        schedule: Schedule,
        *,
        space: Space | None = None,
        config: PruneConfig | None = None,
        discard: bool = True,
        part: float = 1.0,
    ) -> Trial:
        """The distortion of a schedule.

        Args:
            space: what it is a schedule of; None: ``self.space``.
            config: that has this schedule; None: the one that the space makes of it.
            discard: give it up early if it is clearly worse than the best one on the same inputs.
            part: of the inputs that are run, at least; whole batches.
        """
        space = space or self.space
        best = self.best if discard else None
        reference = self._values(best.config, None) if best else None
        config = config or space.config_of(schedule)
        values = self._values(config, reference, part)
        trial = Trial(
            schedule,
            mean(self.objective.goal, values),
            part=len(values) / self.objective.n,
            feasible=space.cost(schedule) <= space.budget,
            config=config,
            space=space,
        )
        self.trials.append(trial)
        self.on_trial(trial)
        return trial

    def _values(self, config: PruneConfig, reference: list[float] | None, part: float = 1.0) -> list[float]:
        """Distortion of each input, batch by batch, as far as it was run."""
        key = self._key(config)
        known, n = self.journal.read(key), self.objective.n

        def enough(values: list[float]) -> bool:
            count = len(values)
            if count >= part * n:
                return True
            if reference is None or count < DISCARD_AFTER * n:
                return False
            goal = self.objective.goal
            return mean(goal, values) > DISCARD_FACTOR * mean(goal, reference[:count])

        for count in accumulate(self.objective.sizes):  # what a run without the journal would have stopped at
            if count <= len(known) and enough(known[:count]):
                return known[:count]
        values: list[float] = []
        running = self.objective.values(config)
        try:
            for batch in running:
                values += batch.tolist()
                if enough(values):
                    break
        finally:
            running.close()  # type: ignore[attr-defined]
        self.measured += 1
        self.journal.write(key, values)
        return values

    def _key(self, config: PruneConfig) -> str:
        """What a measurement depends on."""
        measure = f"{self.objective.goal} of each input"
        return json.dumps([self._inputs, measure, self.objective.sizes, config.to_dict()], sort_keys=True)
