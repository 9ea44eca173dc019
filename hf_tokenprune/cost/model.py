"""Multiply-adds (MACs) of a model, dense and pruned, from sizes alone; and the schedule that meets a budget of them.

What is counted is said in ``vision_cost`` and ``generation_cost``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..config import PruneConfig
from ..engine import ConfigLike, as_config, current_config, find_adapter, options, plan
from ..errors import ConfigError
from .decoder import NEW_TOKENS, TEXT_TOKENS, GenerationCostReport, generation_cost
from ..signals import DecoderShape, Shape, Stage
from .vision import CostReport, ModelCost, model_cost

Count = Callable[..., Any]


def cost(
    model: nn.Module,
    config: ConfigLike | None = None,
    image_size: tuple[int, int] | None = None,
    *,
    text_tokens: int | None = None,
    new_tokens: int | None = None,
) -> CostReport | GenerationCostReport:
    """MACs of ``model``, dense and pruned, for one image; the model is not run and not changed.

    Args:
        model: a model with an adapter, pruned or not.
        config: None: the config the model is pruned with; a dense model then costs the same twice.
        image_size: (height, width) in pixels, for use with ``interpolate_pos_encoding`` or where an image is cut into
            crops; None: the checkpoint's own.
        text_tokens: vision-language models: tokens of the prompt besides those of its one image; None: 64.
        new_tokens: vision-language models: tokens to generate; None: 32.

    Returns:
        Of a vision encoder a ``CostReport``; of a vision-language model a ``GenerationCostReport``, which splits
        prefill, decode and cache.

    Raises:
        ConfigError: the config does not fit the model, or an argument is out of range or has no effect on it.
    """
    shape, count = counter(model, image_size, text_tokens, new_tokens)
    config = current_config(model) if config is None else as_config(config)
    dense = pruned = count(())
    if config is not None:
        pruned = count(plan(config, shape), **options(config))
    if isinstance(shape, DecoderShape):
        return GenerationCostReport(dense, pruned, text_tokens or TEXT_TOKENS, new_tokens or NEW_TOKENS)
    return CostReport(dense, pruned)


def config_for_macs(
    model: nn.Module, config: ConfigLike, macs: float, *, text_tokens: int | None = None
) -> PruneConfig:
    """The config with its removals scaled (:meth:`PruneConfig.scaled`) so that one image costs at most ``macs``.

    All are scaled alike; what whole tokens leave unused of the budget goes to ``keep_ratios``, where a config has them.

    Args:
        model: a model with an adapter.
        config: gives method and shape of the schedule; a config, its dictionary, or where one is saved.
        macs: budget for one image; of a vision-language model for the prefill.
        text_tokens: as for :func:`cost`.

    Returns:
        The config nearest below the budget. Tokens are whole, so a little of it stays unused.

    Raises:
        ConfigError: the dense model is within the budget already, no strength of this schedule reaches it, or it has
            none.
    """
    config = as_config(config)
    shape, count = counter(model, None, text_tokens, None)
    if shape.kind not in config.prunes:
        plan(config, shape)  # raises, and says what the method works on
    dense = count(()).macs
    if not 0 < macs < dense:
        raise ConfigError(f"macs={macs:.4g}: expected more than 0 and less than the dense model's {dense:.4g}")

    def macs_of(candidate: PruneConfig) -> float:
        return float(count(candidate.stages_for(shape), **options(candidate)).macs)

    return weakest(config, config.scaled, macs_of, macs, "macs")


def weakest(
    config: PruneConfig,
    at_strength: Callable[[float], PruneConfig],
    measure: Callable[[PruneConfig], float],
    limit: float,
    name: str,
) -> PruneConfig:
    """The config of least strength whose ``measure`` is at most ``limit``; ``name`` is what an error calls it.

    Raises:
        ConfigError: no strength reaches it, or the method has no schedule to scale.
    """
    try:
        at_strength(1.0)
    except NotImplementedError as error:
        raise ConfigError(f"{name}={limit:.4g}: {error}; set the fields of this config instead of a budget") from error

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
                f"{name}={limit:.4g} is out of reach of this {config.method} schedule, which ends at "
                f"{measure(at_strength(high)):.4g}; prune in more or earlier layers"
            )
        high *= 2
    best = at_strength(least(at_strength, high))
    if not hasattr(best, "keep_ratios"):
        return best

    def with_ratios_of(strength: float) -> PruneConfig:
        return replace(best, keep_ratios=at_strength(strength).keep_ratios)  # type: ignore[attr-defined, call-arg]

    # Counts that are the same in every layer (num_similar) come in large steps; the ratios fill what is left.
    return with_ratios_of(least(with_ratios_of, high))


def counter(
    model: Any, image_size: tuple[int, int] | None, text_tokens: int | None, new_tokens: int | None
) -> tuple[Shape, Count]:
    """The model's shape, and the function from stages (and ``options``) to a ``ModelCost`` or ``GenerationCost``."""
    adapter = find_adapter(model)
    shape: Shape = adapter.shape(model)
    if isinstance(shape, DecoderShape):
        return _decoder_counter(model, shape, image_size, text_tokens, new_tokens)
    for name, value in (("text_tokens", text_tokens), ("new_tokens", new_tokens)):
        if value is not None:
            raise ConfigError(f"{name}={value}: has no effect on a vision encoder, leave it out")
    num_patches = None
    if image_size is not None:
        if len(image_size) != 2 or any(size < patch for size, patch in zip(image_size, shape.patch_size, strict=True)):
            raise ConfigError(
                f"image_size={image_size}: expected (height, width) in pixels, at least one patch {shape.patch_size}"
            )
        num_patches = (image_size[0] // shape.patch_size[0]) * (image_size[1] // shape.patch_size[1])

    def count(stages: tuple[Stage, ...], exact_last_block: bool = False, restore: bool = False) -> ModelCost:
        return model_cost(shape, stages, num_patches, exact_last_block)  # restoring makes no products

    return shape, count


def _decoder_counter(
    model: Any,
    shape: DecoderShape,
    image_size: tuple[int, int] | None,
    text_tokens: int | None,
    new_tokens: int | None,
) -> tuple[Shape, Count]:
    if image_size is not None:
        if not shape.newline_tokens:
            raise ConfigError(
                f"image_size={image_size}: has no effect on this model, every image has {shape.image_tokens} tokens; "
                "leave it out"
            )
        if len(image_size) != 2 or min(image_size) < 1:
            raise ConfigError(f"image_size={image_size}: expected (height, width) in pixels")
        shape = find_adapter(model).shape(model, image_size)
    for name, value, least in (("text_tokens", text_tokens, 1), ("new_tokens", new_tokens, 2)):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: expected at least {least}")
    if model.get_output_embeddings() is None:  # of a base model
        shape = replace(shape, vocab_size=0)
    sized = partial(
        generation_cost,
        text_tokens=text_tokens or TEXT_TOKENS,
        new_tokens=new_tokens or NEW_TOKENS,
        element_size=model.dtype.itemsize,
    )
    return shape, lambda stages: sized(shape, stages)
