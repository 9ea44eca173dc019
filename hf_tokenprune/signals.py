"""What a method sees (``ModelShape``, ``Signals``), what it is in a layer (``Stage``).

Axes: B batch, P protected tokens (always the first ones), N prunable tokens, H heads, D width, d head width, n kept,
R rows of text, K layers, F frames.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .reductions import Merging, Reduction
from .tokens import row_numbers

VISION_TOWER, ENTRANCE = -2, -1
"""Places in front of a decoder's first layer, in the order in which tokens pass them."""


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
        head_token_macs: further ones for every token that is left (heads that pool by attention).
        mlp_matrices: matrices of a block's MLP; 3 where it is gated.
        windows: sides in patches of the square windows that each block attends within, 0: the whole image; empty: the
            whole image in all of them.
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
    head_token_macs: int = 0
    mlp_matrices: int = 2
    windows: tuple[int, ...] = ()

    kind: ClassVar[str] = "vision"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = (size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))
        return height, width

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def num_prunable(self) -> int:
        """Tokens of one image that may leave."""
        return self.num_patches


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a vision-language model whose image tokens pass a decoder (LLaVA and its relatives).

    Attributes:
        depth: number of decoder layers.
        width, mlp_width, num_heads, num_key_value_heads, head_dim: of every decoder layer.
        vocab_size: rows of the language modelling head.
        tower: sizes of the vision tower.
        tower_images: images that the tower encodes for one image of the prompt (NeXT: the whole and its crops).
        image_tokens: tokens in the decoder of one image of the prompt, newline tokens included.
        tower_tokens: tokens that one of these gives: its patches, or what squares of them become.
        projector_macs: multiply-adds of the projector for one token.
        newline_tokens: how many of ``image_tokens`` are newline tokens.
        position_axes: axes of the positions that tokens are rotated by; where there are several, tokens keep theirs.
        token_macs: multiply-adds of one token in each layer, without its products with other tokens; empty: those of
            attention and a gated MLP of these widths in all of them.
        recurrent: layers that have no attention and hold a state of fixed size instead of keys and values.
        feature_depth: blocks of the tower whose output becomes image tokens; None: all of them.
    """

    depth: int
    width: int
    mlp_width: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tower: ModelShape
    tower_images: int
    tower_tokens: int
    image_tokens: int
    projector_macs: int
    newline_tokens: int
    position_axes: int = 1
    token_macs: tuple[int, ...] = ()
    recurrent: frozenset[int] = frozenset()
    feature_depth: int | None = None

    kind: ClassVar[str] = "decoder"

    @property
    def encoder(self) -> ModelShape:
        """The tower as a method for vision encoders sees it: without blocks behind those that make the features."""
        return self.tower if self.feature_depth is None else replace(self.tower, depth=self.feature_depth)

    @property
    def num_prunable(self) -> int:
        """Tokens of one image that may leave."""
        return self.image_tokens


Shape = ModelShape | DecoderShape


@dataclass(frozen=True)
class Signals:
    """What one pruning layer offers a method. What ``Stage.needs`` does not name is None.

    Attributes:
        tokens: (B, P + N, D) states where the tokens leave: block output, between attention and MLP, or block input.
        inputs: (B, P + N, D) states that entered the block.
        num_protected: P; the first P tokens stay whatever the method says.
        has_cls: whether token 0 is a CLS token.
        attention: consecutive pieces of the batch, each (b, H, P + N, P + N) float32, after softmax; rows are queries
            and sum to 1; no dropout. A piece fits a CPU's cache: go through it with ``map_attention``.
        queries, keys, values: (B, H, P + N, d) as the attention of this block used them.
        cls_attention: (B, H, P + N) float32, the row of ``attention`` that belongs to token 0, without the others.
        received_attention: vision towers: (B, H, P + N) float32, the mean of the rows of ``attention``.
        sizes: (B, P + N) float32, how many patches each token stands for, where tokens have been merged before.
        text_attention: decoders: (B, H, R, N) float32, the share of each image token in the attention of R rows of text
            (softmax over all keys), as ``Stage.text_rows`` asks. Rows are aligned at the end: the last one is the last
            token of the sample.
        text_mask: (B, R) bool: which rows of text are text of this sample that ``Stage.text_rows`` names, not filling.
        layer_scores: decoders: (B, K, N) float32, what ``Stage.observe`` returned in the layers ``Stage.observes``.
        tower_features: vision towers of decoders: (B, N, D') the states that the projector or merger reads of each
            token, averaged over its patches.
        earlier_attention: of decoders: (B, H, P + N), ``received_attention`` of the block ``Stage.earlier_block``.
        text: decoders: (B, R, D) states, at the entrance embeddings, of the same rows as in ``text_attention``.
        text_keys: decoders: (B, H', R, d) keys of these rows in the attention that ``Stage.text_rows`` names, rotated
            by positions counted from the sample's first token; ``keys`` (B, H', N, d) are those of the image tokens.
        text_scores: decoders: (B, R) float32, what ``Stage.rate_text`` returned at the entrance.
        frames: decoders: F, frames of equally many ``tokens`` each, for a stage that prunes ``videos_only``; else 1.
        columns: vision towers of decoders: columns of the grid of an image's N tokens, which come row by row.
        numbers: int64 0, 1, …, B · (P + N) or more of them, made once for all layers; see ``rows``.
    """

    tokens: Tensor
    inputs: Tensor
    num_protected: int
    has_cls: bool
    attention: tuple[Tensor, ...] | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    cls_attention: Tensor | None = None
    sizes: Tensor | None = None
    text_attention: Tensor | None = None
    text_mask: Tensor | None = None
    layer_scores: Tensor | None = None
    received_attention: Tensor | None = None
    tower_features: Tensor | None = None
    earlier_attention: Tensor | None = None
    text: Tensor | None = None
    text_keys: Tensor | None = None
    text_scores: Tensor | None = None
    frames: int = 1
    columns: int | None = None
    numbers: Tensor | None = None

    @property
    def num_prunable(self) -> int:
        """N."""
        return self.tokens.shape[1] - self.num_protected

    @property
    def rows(self) -> Tensor:
        """(B, P + N) int64: the numbers of all tokens as rows of ``tokens.flatten(0, 1)``; those of sample 0 are the
        positions 0, 1, …"""
        numbers = row_numbers(self.tokens) if self.numbers is None else self.numbers
        batch, length = self.tokens.shape[:2]
        return numbers[: batch * length].view(batch, length)

    def need(self, name: str) -> Tensor:
        """The tensor called ``name``; it is there if ``Stage.needs`` has it."""
        value: Tensor | None = getattr(self, name)
        assert value is not None, f"a stage that reads {name!r} must list it in `needs`"
        return value

    def map_attention(self, function: Callable[..., Tensor], *batched: Tensor) -> Tensor:
        """``function(attention, *batched)`` for the whole batch, worked out piece by piece and joined."""
        assert self.attention is not None, "a stage that reads 'attention' must list it in `needs`"
        if len(self.attention) == 1:
            return function(self.attention[0], *batched)
        sizes = [piece.shape[0] for piece in self.attention]
        rows = (tensor.split(sizes) for tensor in batched)
        return torch.cat([function(*piece) for piece in zip(self.attention, *rows, strict=True)])


@dataclass(frozen=True)
class Transition:
    """What the two halves of one decoder layer did to its tokens, residuals left out; (B, T, D) each.

    Attributes:
        attention_in, attention_out: what entered the attention (after the norm) and what it returned.
        mlp_in, mlp_out: the same of the MLP.
        valid: (B, T) bool, False for padding.
        image: (B, T) bool, True for prunable image tokens.
    """

    attention_in: Tensor
    attention_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    valid: Tensor
    image: Tensor


@dataclass(frozen=True)
class TextRows:
    """Which rows of text a stage in a decoder reads, and in whose attention.

    Attributes:
        rows: "last" token of the sample; all "text" behind its last image; of that the "question", which is what is no
            special token (where nothing is left, of all text); or "all" tokens that are of no image. Of a sample that
            ends with an image its last token is the "text" too, and there is no "question".
        layer: the attention of the stage's "own" layer, or of the "next" one (on what leaves this one).
    """

    rows: Literal["last", "text", "question", "all"]
    layer: Literal["own", "next"] = "own"


@dataclass(frozen=True)
class Stage:
    """One pruning point: a method with the parameters of one layer. Immutable, picklable, no tensors.

    Attributes:
        layer: 0-based index of the block that scores the tokens and that they leave in; -1 before the first block.
        where: "after_block", "mid_block" (between attention and MLP, so that the MLP already runs on fewer tokens),
            "queries" (before the queries, when keys and values of all tokens are known: these still serve the attention
            of the block, but queries, output projection and MLP are of those that stay),
            "entrance" (in front of a decoder's first layer), or "vision_tower" (of a decoder, at its output).
        positions: decoders: of the tokens behind: "contiguous" (renumbered) or "original".
        newlines: decoders: "prune" newline tokens like image tokens, or "protect" them.
        budget: decoders: whether ``num_kept`` and ``reduce`` see every "image" on its own, or all of a "sample".
    """

    layer: int
    where: str
    positions: str = field(default="contiguous", kw_only=True)
    newlines: str = field(default="prune", kw_only=True)
    budget: str = field(default="sample", kw_only=True)

    counts_from: ClassVar[Literal["entering", "original"]] = "entering"
    """What ``num_kept`` is given: the tokens that enter the stage, or those that entered the decoder's first layer."""
    merges: ClassVar[bool] = False
    """Whether tokens are merged, so that sizes are kept."""
    videos_only: ClassVar[bool] = False
    """Whether images, which are no videos, stay whole."""

    @property
    def proportional(self) -> bool:
        """Whether tokens draw attention in proportion to their sizes in later blocks (log size added to the logits)."""
        return self.merges

    @property
    def name(self) -> str:
        """What records call this stage: "3", "entrance", "vision_tower"."""
        return str(self.layer) if self.layer >= 0 else self.where

    @property
    def title(self) -> str:
        """What messages call its method: "FastV", of ``FastVStage``."""
        return type(self).__name__.removesuffix("Stage")

    @property
    def place(self) -> int:
        """The layer; ``VISION_TOWER`` or ``ENTRANCE`` for a place in front of a decoder's first one."""
        return VISION_TOWER if self.where == "vision_tower" else self.layer

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional ``Signals`` this stage reads; without "attention" the fused kernel stays."""
        return frozenset()

    @property
    def reads_tokens(self) -> bool:
        """Of a stage behind a block of a vision encoder: whether it reads ``Signals.tokens``. Where it does not, it
        decides before the MLP, and signals are not held while that runs."""
        return True

    @property
    def text_rows(self) -> TextRows | None:
        """Which text the signals about text are of, for a stage that needs one."""
        return None

    @property
    def reads_question(self) -> bool:
        """Whether what stays depends on the text of the prompt: then it stays for all later questions too."""
        return any("text" in name for name in self.needs)

    @property
    def earlier_block(self) -> int:
        """Of a stage that needs "earlier_attention", the block of the vision tower that it is of."""
        raise NotImplementedError

    @property
    def observes(self) -> tuple[int, ...]:
        """Decoder layers up to this one whose ``Transition`` the stage turns into a score."""
        return ()

    def observe(self, transition: Transition) -> Tensor:
        """(B, T) float32 scores of one observed layer; they come back as ``Signals.layer_scores``."""
        raise NotImplementedError

    def rate_text(self, images: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """(B, R) float32 scores of text, from what enters the decoder: they come back as ``Signals.text_scores``.

        Args:
            images: (B, N, D) embeddings of all image tokens of a sample.
            text: (B, R, D) embeddings of its text, as ``text_rows`` asks; ``text_mask`` (B, R): not filling.
        """
        raise NotImplementedError

    def num_kept(self, num_prunable: int) -> int:
        """How many of ``num_prunable`` tokens stay. A function of sizes only, so that shapes stay static."""
        raise NotImplementedError

    def num_kept_of(self, num_prunable: int, frames: int) -> int:
        """The same where the tokens are of so many frames."""
        return self.num_kept(num_prunable)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction | Merging:
        """Choose ``n_keep`` tokens for every sample on its own: samples of a batch do not influence each other."""
        raise NotImplementedError
