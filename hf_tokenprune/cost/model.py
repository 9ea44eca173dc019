"""Multiply-adds (MACs) of a model, dense and pruned, from sizes alone.

What is counted is said in ``cost.vision`` and ``cost.decoder``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..engine import ConfigLike, as_config, current_config, find_adapter, options, plan_on, unwrapped
from ..errors import ConfigError
from ..signals import DecoderShape, Shape, Stage
from .decoder import NEW_TOKENS, TEXT_TOKENS, GenerationCostReport, generation_cost
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

    Adapters of PEFT do not count: merged into the model, they cost nothing.

    Args:
        model: a model with an adapter, pruned or not.
        config: None: the config the model is pruned with; a dense model then costs the same twice.
        image_size: (height, width) in pixels, for use with ``interpolate_pos_encoding``, or where an image may have any
            size or is cut into crops; None: the checkpoint's own, or a usual size.
        text_tokens: vision-language models: tokens of the prompt besides those of its one image; None: 64.
        new_tokens: vision-language models: tokens to generate; None: 32.

    Returns:
        Of a vision encoder a ``CostReport``; of a vision-language model a ``GenerationCostReport``, which splits
        prefill, decode and cache.

    Raises:
        ConfigError: the config does not fit the model, or an argument is out of range or has no effect on it.
        UnsupportedModelError: ``hf_tokenprune.prune`` would refuse a dense model with this config.
    """
    shape, count = counter(model, image_size, text_tokens, new_tokens)
    config = current_config(model) if config is None else as_config(config)
    dense = pruned = count(())
    if config is not None:
        pruned = count(plan_on(model, config, shape), **options(config, shape))
    if isinstance(shape, DecoderShape):
        size = shape.tower.image_size if shape.tower_images == 1 else image_size
        tokens = (text_tokens or TEXT_TOKENS, new_tokens or NEW_TOKENS, shape.image_tokens)
        return GenerationCostReport(dense, pruned, *tokens, size)
    return CostReport(dense, pruned)


def counter(
    model: Any, image_size: tuple[int, int] | None, text_tokens: int | None, new_tokens: int | None
) -> tuple[Shape, Count]:
    """The model's shape, and the function from stages (and ``options``) to a ``ModelCost`` or ``GenerationCost``."""
    model = unwrapped(model)
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
        if len(image_size) != 2 or min(image_size) < 1:
            raise ConfigError(f"image_size={image_size}: expected (height, width) in pixels")
        height, width = image_size
        others = [(2 * height, 2 * width), (height, 2 * width)]  # the number of tokens may depend on size or aspect
        usual, (shape, *larger) = shape, (find_adapter(model).shape(model, size) for size in [image_size, *others])
        if not usual.newline_tokens and all(other == usual for other in [shape, *larger]):
            raise ConfigError(
                f"image_size={image_size}: has no effect on this model, every image has {shape.image_tokens} tokens; "
                "leave it out"
            )
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
    return shape, lambda stages, **asked: sized(shape, stages, **asked)
