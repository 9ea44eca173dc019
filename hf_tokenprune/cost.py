"""Multiply-adds (MACs) of a model, dense and pruned, from sizes alone.

Counted are the patch embedding, every block and the head: matrix products only, as papers do when they print "GFLOPs".
A block of N tokens of width D costs ``4·N·D² + 2·N²·D`` for attention and ``2·N·D·M`` for an MLP of width M
(``12·N·D² + 2·N²·D`` with M = 4D). Choosing the tokens is not counted; ``hf-tokenprune bench`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .config import PruneConfig
from .engine import ConfigLike, as_config, current_config, find_adapter, plan
from .errors import ConfigError
from .signals import ModelShape, Stage

COUNTED = "patch embedding + blocks + head, matrix products only; choosing the tokens is not counted"


@dataclass(frozen=True)
class BlockCost:
    """One block: tokens that enter and leave it (protected ones included) and its MACs for one image."""

    tokens_in: int
    tokens_out: int
    macs: int


@dataclass(frozen=True)
class ModelCost:
    """MACs of one image through a model, part by part."""

    patch_embedding: int
    blocks: tuple[BlockCost, ...]
    head: int

    @property
    def macs(self) -> int:
        """All parts together."""
        return self.patch_embedding + sum(block.macs for block in self.blocks) + self.head


@dataclass(frozen=True)
class CostReport:
    """Dense beside pruned, for one image."""

    dense: ModelCost
    pruned: ModelCost

    @property
    def ratio(self) -> float:
        """Fraction of the dense MACs that is left."""
        return self.pruned.macs / self.dense.macs

    @property
    def ideal_speedup(self) -> float:
        """Dense MACs over pruned MACs: the speed-up if time followed work."""
        return self.dense.macs / self.pruned.macs

    def to_dict(self) -> dict[str, Any]:
        """JSON values: MACs of both models, their ratio, and the tokens that enter each block."""
        return {
            "dense_macs": self.dense.macs,
            "pruned_macs": self.pruned.macs,
            "ratio": self.ratio,
            "ideal_speedup": self.ideal_speedup,
            "tokens_in": [block.tokens_in for block in self.pruned.blocks],
            "tokens_out": self.pruned.blocks[-1].tokens_out,
            "counted": COUNTED,
        }

    def summary(self) -> str:
        """A table with a row for each part, and the totals."""
        rows = [f"{'part':<16}{'tokens in':>10}{'out':>6}{'dense GMACs':>13}{'pruned GMACs':>14}"]

        def row(name: str, tokens: tuple[Any, Any], dense: int, pruned: int) -> None:
            rows.append(f"{name:<16}{tokens[0]:>10}{tokens[1]:>6}{dense / 1e9:>13.4f}{pruned / 1e9:>14.4f}")

        row("patch embedding", ("", ""), self.dense.patch_embedding, self.pruned.patch_embedding)
        for i, (dense, pruned) in enumerate(zip(self.dense.blocks, self.pruned.blocks, strict=True)):
            row(f"block {i}", (pruned.tokens_in, pruned.tokens_out), dense.macs, pruned.macs)
        row("head", ("", ""), self.dense.head, self.pruned.head)
        row("total", ("", ""), self.dense.macs, self.pruned.macs)
        rows.append(f"{self.ratio:.3f} of the dense MACs, ideal speed-up {self.ideal_speedup:.2f}x ({COUNTED})")
        return "\n".join(rows)


def model_cost(shape: ModelShape, stages: tuple[Stage, ...] = (), num_patches: int | None = None) -> ModelCost:
    """MACs of one image through a model of this shape.

    Args:
        stages: pruning points; none for the dense model.
        num_patches: of the image; None: of the size the checkpoint was made for.
    """
    prunable = shape.num_patches if num_patches is None else num_patches
    inner = shape.num_heads * shape.head_dim
    patch_size = shape.patch_size[0] * shape.patch_size[1]
    patch_embedding = prunable * shape.num_channels * patch_size * shape.width
    by_layer = {stage.layer: stage for stage in stages}
    blocks = []
    for layer in range(shape.depth):
        stage = by_layer.get(layer)
        left = stage.num_kept(prunable) if stage else prunable
        tokens_in, tokens_out = prunable + shape.num_protected, left + shape.num_protected
        mlp_tokens = tokens_out if stage and stage.where == "mid_block" else tokens_in
        attention = 4 * tokens_in * shape.width * inner + 2 * tokens_in**2 * inner
        blocks.append(BlockCost(tokens_in, tokens_out, attention + 2 * mlp_tokens * shape.width * shape.mlp_width))
        prunable = left
    return ModelCost(patch_embedding, tuple(blocks), shape.head_macs)


def cost(model: nn.Module, config: ConfigLike | None = None, image_size: tuple[int, int] | None = None) -> CostReport:
    """MACs of ``model``, dense and pruned, for one image; the model is not run and not changed.

    Args:
        model: a model with an adapter, pruned or not.
        config: None: the config the model is pruned with; a dense model then costs the same twice.
        image_size: (height, width) in pixels, for use with ``interpolate_pos_encoding``; None: the checkpoint's own.

    Raises:
        ConfigError: the config does not fit the model.
    """
    shape = find_adapter(model).shape(model)
    config = current_config(model) if config is None else as_config(config)
    stages = plan(config, shape) if config is not None else ()
    num_patches = None
    if image_size is not None:
        if len(image_size) != 2 or any(size < patch for size, patch in zip(image_size, shape.patch_size, strict=True)):
            raise ConfigError(
                f"image_size={image_size}: expected (height, width) in pixels, at least one patch {shape.patch_size}"
            )
        num_patches = (image_size[0] // shape.patch_size[0]) * (image_size[1] // shape.patch_size[1])
    return CostReport(model_cost(shape, (), num_patches), model_cost(shape, stages, num_patches))


def config_for_macs(model: nn.Module, config: ConfigLike, macs: float) -> PruneConfig:
    """The config with its removals scaled (:meth:`PruneConfig.scaled`) so that one image costs at most ``macs``.

    All are scaled alike; what whole tokens leave unused of the budget goes to ``keep_ratios``, where a config has them.

    Args:
        model: a model with an adapter.
        config: gives method and shape of the schedule; a config, its dictionary, or where one is saved.
        macs: budget for one image.

    Returns:
        The config nearest below the budget. Tokens are whole, so a little of it stays unused.

    Raises:
        ConfigError: the dense model is within the budget already, or no strength of this schedule reaches it.
    """
    config = as_config(config)
    shape = find_adapter(model).shape(model)
    dense = model_cost(shape).macs
    if not 0 < macs < dense:
        raise ConfigError(f"macs={macs:.4g}: expected more than 0 and less than the dense model's {dense:.4g}")

    def macs_of(candidate: PruneConfig) -> int:
        return model_cost(shape, candidate.stages(shape)).macs

    def least(candidate: Callable[[float], PruneConfig], high: float) -> float:
        """The least strength up to ``high``, which is within the budget, that is within it too."""
        low = 0.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if macs_of(candidate(middle)) <= macs else (middle, high)
        return high

    high = 1.0
    while macs_of(config.scaled(high)) > macs:
        if high > 100:
            raise ConfigError(
                f"macs={macs:.4g} is out of reach of this {config.method} schedule, which ends at "
                f"{macs_of(config.scaled(high)):.4g}; prune in more or earlier layers"
            )
        high *= 2
    best = config.scaled(least(config.scaled, high))
    if not hasattr(best, "keep_ratios"):
        return best

    def with_ratios_of(strength: float) -> PruneConfig:
        return replace(best, keep_ratios=config.scaled(strength).keep_ratios)  # type: ignore[attr-defined, call-arg]

    # Counts that are the same in every layer (num_similar) come in large steps; the ratios fill what is left.
    return with_ratios_of(least(with_ratios_of, high))
