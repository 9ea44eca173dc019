"""Multiply-adds (MACs) of a vision transformer, dense and pruned, from its sizes alone.

Counted are the patch embedding, every block and the head: matrix products only, as papers do when they print "GFLOPs".
A block of N tokens of width D costs ``4·N·D² + 2·N²·D`` for attention and ``2·N·D·M`` for an MLP of width M
(``12·N·D² + 2·N²·D`` with M = 4D); ``3·N·D·M`` where it is gated. Where a block attends within windows, N² is the sum
over windows. Choosing the tokens is not counted; ``hf-tokenprune bench`` measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..signals import ModelShape, Stage

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


def model_cost(
    shape: ModelShape,
    stages: tuple[Stage, ...] = (),
    num_patches: int | None = None,
    exact_last_block: bool = False,
) -> ModelCost:
    """MACs of one image through a model of this shape.

    Args:
        stages: pruning points; none for the dense model.
        num_patches: of the image; None: of the size the checkpoint was made for.
        exact_last_block: in it, queries, output projection and MLP are of the protected tokens only.
    """
    prunable = shape.num_patches if num_patches is None else num_patches
    patch_size = shape.patch_size[0] * shape.patch_size[1]
    patch_embedding = prunable * shape.num_channels * patch_size * shape.width
    by_layer = {stage.layer: stage for stage in stages}
    blocks = []
    for layer in range(shape.depth):
        exact = exact_last_block and layer == shape.depth - 1
        stage = None if exact else by_layer.get(layer)
        left = 0 if exact else stage.num_kept(prunable) if stage else prunable
        tokens_in, tokens_out = prunable + shape.num_protected, left + shape.num_protected
        where = "queries" if exact else stage.where if stage else "after_block"
        side = shape.windows[layer] if shape.windows else 0
        macs = block_macs(shape, where, tokens_in, tokens_out, window_pairs(shape.grid, side) if side else None)
        blocks.append(BlockCost(tokens_in, tokens_out, macs))
        prunable = left
    # A head that pools by attention gets every patch back where tokens were merged.
    pooled = blocks[0].tokens_in if any(stage.merges for stage in stages) else blocks[-1].tokens_out
    head = shape.head_macs + shape.head_token_macs * pooled
    return ModelCost(patch_embedding, tuple(blocks), head)


def block_macs(shape: ModelShape, where: str, tokens_in: int, tokens_out: int, pairs: int | None = None) -> int:
    """MACs of a block in which tokens leave at the place ``where`` of a stage; protected ones are counted in.

    Args:
        pairs: of a query and a key; None: every query sees every key.
    """
    inner = shape.num_heads * shape.head_dim
    queries = tokens_out if where == "queries" else tokens_in
    mlp_tokens = tokens_in if where == "after_block" else tokens_out
    pairs = queries * tokens_in if pairs is None else pairs
    attention = 2 * (queries + tokens_in) * shape.width * inner + 2 * pairs * inner
    return attention + shape.mlp_matrices * mlp_tokens * shape.width * shape.mlp_width


def window_pairs(grid: tuple[int, int], side: int) -> int:
    """Pairs of a query and a key of a ``grid`` of patches in square windows, smaller ones at its lower right."""
    rows, columns = (size // side * side**2 + (size % side) ** 2 for size in grid)
    return rows * columns
