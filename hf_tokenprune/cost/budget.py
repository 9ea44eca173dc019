"""A method within a budget, at once and from sizes alone: what :meth:`PruneConfig.for_budget` does."""

from __future__ import annotations

from typing import Any, TypeVar

from ..config import PruneConfig
from .model import counter, weakest
from ..engine import counts, options, plan
from ..errors import ConfigError

C = TypeVar("C", bound=PruneConfig)


def config_within(
    model: Any, config: C, *, macs: float | None, speedup: float | None, keep: float | None, text_tokens: int | None
) -> C:
    """The weakest config of this method's rule that meets exactly one of the budgets; see ``for_budget``."""
    given = {name: value for name, value in (("macs", macs), ("speedup", speedup), ("keep", keep)) if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give one of macs, speedup and keep, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    shape, count = counter(model, None, text_tokens, None)
    if shape.kind not in config.prunes:
        plan(config, shape)  # raises, and says what the method works on
    dense = float(count(()).macs)
    low, high = {"macs": (0.0, dense), "speedup": (1.0, float("inf")), "keep": (0.0, 1.0)}[name]
    if not low < value < high:
        raise ConfigError(f"{name}={value:.4g}: expected more than {low:g} and less than {high:.4g}")

    def macs_of(candidate: PruneConfig) -> float:
        return float(count(candidate.stages_for(shape), **options(candidate)).macs)

    def kept(candidate: PruneConfig) -> float:
        left = [n_keep for _, _, n_keep in counts(candidate.stages_for(shape), shape)]
        return left[-1] / shape.num_prunable

    measure, limit = (kept, value) if name == "keep" else (macs_of, dense / value if name == "speedup" else value)
    found = weakest(config, lambda strength: config.by_rule(strength, shape), measure, limit, name)
    assert isinstance(found, type(config))
    plan(found, shape)  # a config that is asked for and does nothing is an error
    return found
