"""What a method sees (``ModelShape``, ``Signals``), what it is in a layer (``Stage``), what it returns (``Reduction``).

Axes: B batch, P protected tokens (always the first ones), N prunable tokens, H heads, D width, d head width, n kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a vision transformer: all that a schedule and its cost depend on.

    Attributes:
        depth: number of blocks.
        width, mlp_width, num_heads, head_dim: of every block.
        image_size: (height, width) in pixels that the checkpoint was made for.
        patch_size: (height, width) in pixels.
        num_channels: of the image.
        num_protected: tokens in front of the patches that are never pruned (CLS, distillation, registers).
        has_cls: whether token 0 is a CLS token.
        head_macs: multiply-adds of everything behind the last block, an image.
    """

    depth: int
    width: int
    mlp_width: int
    num_heads: int
    head_dim: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    num_protected: int
    has_cls: bool
    head_macs: int

    @property
    def num_patches(self) -> int:
        height, width = (size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))
        return height * width


@dataclass(frozen=True)
class Signals:
    """What one pruning layer offers a method. What ``Stage.needs`` does not name is None.

    Attributes:
        tokens: (B, P + N, D) states where the tokens leave: block output, or between attention and MLP.
        inputs: (B, P + N, D) states that entered the block.
        num_protected: P; the first P tokens stay whatever the method says.
        has_cls: whether token 0 is a CLS token.
        attention: consecutive pieces of the batch, each (b, H, P + N, P + N) float32, after softmax; rows are queries
            and sum to 1; no dropout. A piece fits a CPU's cache: go through it with :meth:`map_attention`.
        queries, keys, values: (B, H, P + N, d) as the attention of this block used them.
    """

    tokens: Tensor
    inputs: Tensor
    num_protected: int
    has_cls: bool
    attention: tuple[Tensor, ...] | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    def need(self, name: str) -> Tensor:
        """The tensor called ``name``; it is there if ``Stage.needs`` has it."""
        value: Tensor | None = getattr(self, name)
        assert value is not None, f"a stage that reads {name!r} must list it in `needs`"
        return value

    def map_attention(self, function: Callable[..., Tensor], *batched: Tensor) -> Tensor:
        """``function(attention, *batched)`` for the whole batch, worked out piece by piece and joined."""
        assert self.attention is not None, "a stage that reads 'attention' must list it in `needs`"
        sizes = [len(piece) for piece in self.attention]
        rows = (tensor.split(sizes) for tensor in batched)
        return torch.cat([function(*piece) for piece in zip(self.attention, *rows, strict=True)])


@dataclass(frozen=True)
class Reduction:
    """Which tokens survive a pruning layer.

    Attributes:
        keep: (B, n) int64, ascending positions among the N prunable tokens that entered.
    """

    keep: Tensor


@dataclass(frozen=True)
class Stage:
    """One pruning point: a method with the parameters of one layer. Immutable, picklable, no tensors.

    Attributes:
        layer: 0-based index of the block that scores the tokens and that they leave in.
        where: "after_block", or "mid_block" (between attention and MLP, so that the MLP already runs on fewer tokens).
    """

    layer: int
    where: str

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional :class:`Signals` this stage reads; without "attention" the fused kernel stays."""
        return frozenset()

    def num_kept(self, num_prunable: int) -> int:
        """How many of ``num_prunable`` entering tokens stay. A function of sizes only, so that shapes stay static."""
        raise NotImplementedError

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        """Choose ``n_keep`` tokens for every sample on its own: samples of a batch do not influence each other."""
        raise NotImplementedError
