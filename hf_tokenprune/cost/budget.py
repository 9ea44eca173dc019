"""A schedule within a budget, at once and from sizes alone; ``PruneConfig.for_budget`` calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..config import PruneConfig
from ..engine import ConfigLike, as_config, counts, options, plan, plan_on
from ..errors import ConfigError
from ..signals import ModelShape, Shape
from .model import counter

C = TypeVar("C", bound=PruneConfig)


def config_within(
    model: Any,
    config: C,
    *,
    macs: float | None,
    speedup: float | None,
    keep: float | None,
    text_tokens: int | None,
    image_size: tuple[int, int] | None,
) -> C:
    """The weakest config of this method's rule that meets exactly one of the budgets; see ``for_budget``."""
    given = {name: value for name, value in (("macs", macs), ("speedup", speedup), ("keep", keep)) if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give one of macs, speedup and keep, got {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    shape, count = budget_counter(model, image_size, text_tokens)
    if shape.kind not in config.prunes:
        plan(config, shape)  # raises, and says what the method works on
    dense = float(count(()).macs)
    low, high = {"macs": (0.0, dense), "speedup": (1.0, float("inf")), "keep": (0.0, 1.0)}[name]
    if not low < value < high:
        raise ConfigError(f"{name}={value:.4g}: expected more than {low:g} and less than {high:.4g}")

    def macs_of(candidate: PruneConfig) -> float:
        return float(count(candidate.stages_for(shape), **options(candidate, shape)).macs)

    def kept(candidate: PruneConfig) -> float:
        left = [n_keep for _, _, n_keep in counts(candidate.stages_for(shape), shape)]
        return left[-1] / shape.num_prunable

    measure, limit = (kept, value) if name == "keep" else (macs_of, dense / value if name == "speedup" else value)
    unit = "" if name == "keep" else " MACs"
    found = weakest(
        config, lambda strength: config.by_rule(strength, shape), measure, limit, f"{name}={value:.4g}", unit
    )
    assert isinstance(found, type(config))
    plan_on(model, found, shape)  # a config that is asked for and does nothing is an error, and what prune refuses
    return found


def budget_counter(
    model: Any, image_size: tuple[int, int] | None, text_tokens: int | None
) -> tuple[Shape, Callable[..., Any]]:
    """What ``counter`` returns. A vision encoder is planned for the size of its checkpoint alone."""
    shape, count = counter(model, image_size, text_tokens, None)
    if image_size is not None and isinstance(shape, ModelShape):
        raise ConfigError(
            f"image_size={image_size}: budgets of a vision encoder are for images of the checkpoint's own size, "
            f"{shape.image_size}; leave it out"
        )
    return shape, count


def config_for_macs(
    model: nn.Module,
    config: ConfigLike,
    macs: float,
    *,
    text_tokens: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> PruneConfig:
    """The config with its removals scaled (``PruneConfig.scaled``) so that one image costs at most ``macs``.

    All are scaled alike; what whole tokens leave unused of the budget goes to ``keep_ratios``, where a config has them.

    Args:
        model: a model with an adapter.
        config: gives method and shape of the schedule; a config, its dictionary, or where one is saved.
        macs: budget for one image; of a vision-language model for the prefill.
        text_tokens: as for ``cost``.
        image_size: as for ``cost``.

    Returns:
        The config nearest below the budget. Tokens are whole, so a little of it stays unused.

    Raises:
        ConfigError: the dense model is within the budget already, no strength of this schedule reaches it, or it has
            none.
    """
    config = as_config(config)
    shape, count = budget_counter(model, image_size, text_tokens)
    if shape.kind not in config.prunes:
        plan(config, shape)  # raises, and says what the method works on
    dense = count(()).macs
    if not 0 < macs < dense:
        raise ConfigError(f"macs={macs:.4g}: expected more than 0 and less than the dense model's {dense:.4g} MACs")

    def macs_of(candidate: PruneConfig) -> float:
        return float(count(candidate.stages_for(shape), **options(candidate, shape)).macs)

    return weakest(config, config.scaled, macs_of, macs, f"macs={macs:.4g}")


def weakest(
    config: PruneConfig,
    at_strength: Callable[[float], PruneConfig],
    measure: Callable[[PruneConfig], float],
    limit: float,
    called: str,
    unit: str = " MACs",
) -> PruneConfig:
    """The config of least strength whose ``measure``, in ``unit``, is at most ``limit``, in an error ``called`` so.

    Raises:
        ConfigError: no strength reaches it, or the method has no schedule to scale.
    """
    try:
        at_strength(1.0)
    except NotImplementedError as error:
        raise ConfigError(f"{called}: {error}; set the fields of this config instead of a budget") from error

    def least(candidate: Callable[[float], PruneConfig], high: float) -> float:
        """The least strength up to ``high``, which is within the limit, that is within it too."""
        low = 0.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if measure(candidate(middle)) <= limit else (middle, high)
        return high

    high = 1.0
    while measure(at_strength(high)) > limit:
        if high > 100:
            raise ConfigError(
                f"{called} is out of reach of this {config.method} schedule, which ends at "
                f"{measure(at_strength(high)):.4g}{unit}; prune in more or earlier layers"
            )
        high *= 2
    best = at_strength(least(at_strength, high))
    if not hasattr(best, "keep_ratios"):
        return best

    def with_ratios_of(strength: float) -> PruneConfig:
        return replace(best, keep_ratios=at_strength(strength).keep_ratios)  # type: ignore[attr-defined, call-arg]

    # Counts that are the same in every layer (num_similar) come in large steps; the ratios fill what is left.
    return with_ratios_of(least(with_ratios_of, high))
