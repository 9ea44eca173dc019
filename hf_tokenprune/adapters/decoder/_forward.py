"""One forward of a decoder whose image tokens leave on the way: who is still there, and what each layer must be given.

Layers between two pruning stages form a segment: they see the same tokens, so they share positions and mask. Tokens
that a stage drops leave their sample; samples are then aligned at the end again, with padding in front.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from ...signals import Signals, Stage, Transition
from ...tokens import gather_tokens
from ._cache import CACHE_NAME, CacheState, Segment, extended
from ._layout import Layout
from ._text_rows import text_attention


@dataclass
class View:
    """The tokens of this forward that one segment sees: L of the T that came in.

    Attributes:
        slots: (B, L) int64, where they stood among the T.
        take: (B, L) int64, where they stood in the view before.
        valid: (B, L) bool, False for padding; None: no padding.
        positions: (B, L) int64 for the rotary embedding.
        shift: (B, 1) int64, how far positions behind them move down; None: not at all.
        key_valid: (B, K + L) bool, ``valid`` with that of the K keys in the cache before it; None: no padding.
        rotary, mask: what the layers of the segment are given; made when the first of them asks.
    """

    slots: Tensor
    take: Tensor
    valid: Tensor | None
    positions: Tensor
    shift: Tensor | None
    key_valid: Tensor | None
    rotary: tuple[Tensor, Tensor] | None = None
    mask: Any = None


@dataclass
class Forward:
    """What :func:`enter` found out, and what the stages decide on the way. Lives as long as one forward.

    Attributes:
        decoder: the language model.
        stages: in-decoder stages by layer; empty where no image is in the input.
        starts: first layer of each segment.
        views: by segment, as far as the forward has come.
        held: keys in the cache before this forward, by segment.
        past: the state of the cache before this forward.
        cache: None where the caller uses none.
        layout: of the newest view; None where no image is in the input.
        image_rank: (B, T) int64, of each image token its number in the sample; -1 for others.
        originals: for each sample, image tokens of each image that entered the first layer.
    """

    decoder: nn.Module
    stages: dict[int, Stage]
    starts: list[int]
    views: list[View]
    held: list[int]
    past: list[Segment]
    seen: int
    cache: Cache | None
    layout: Layout | None = None
    image_rank: Tensor | None = None
    originals: tuple[tuple[int, ...], ...] = ()
    recorder: Any = None
    observed: dict[int, Tensor] = field(default_factory=dict)

    def segment(self, layer: int) -> int:
        """Index of the segment that a layer belongs to."""
        return bisect_right(self.starts, layer) - 1

    def layer_inputs(self, layer: int, states: Tensor, stock: dict[str, Any]) -> dict[str, Any]:
        """Mask, positions and rotary embedding for a layer: ``stock`` ones in the first segment."""
        index = self.segment(layer)
        view = self.views[index]
        if view.rotary is None:
            if index == 0:
                view.rotary, view.mask = stock["position_embeddings"], stock["attention_mask"]
            else:
                rotary: Any = self.decoder.rotary_emb
                view.rotary, view.mask = rotary(states, view.positions), self._mask(view, layer, states)
        return {
            **stock,
            "attention_mask": view.mask,
            "position_ids": view.positions,
            "position_embeddings": view.rotary,
        }

    def _mask(self, view: View, layer: int, states: Tensor) -> Any:
        if view.key_valid is None and states.shape[1] == 1:
            return None
        # Without position_ids: original positions have gaps, which Transformers would take for packed sequences.
        return create_causal_mask(
            config=self.decoder.config,
            inputs_embeds=states,
            attention_mask=view.key_valid,
            position_ids=None,
            layer_idx=layer,
            **{CACHE_NAME: self.cache},
        )

    # -- pruning -----------------------------------------------------------------------------------------------------

    def observers(self, layer: int) -> Stage | None:
        """The stage that wants a score of this layer's transition, if one does."""
        return next((stage for stage in self.stages.values() if layer in stage.observes), None)

    def observe(self, stage: Stage, layer: int, parts: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Let ``stage`` score what a layer did: ``parts`` are input and output of attention and MLP, (B, L, D) each."""
        if layer in self.observed:  # recomputed for a backward
            return
        assert self.layout is not None
        valid = self.views[-1].valid
        valid = torch.ones(parts[0].shape[:2], dtype=torch.bool, device=parts[0].device) if valid is None else valid
        with torch.no_grad(), torch.autocast(parts[0].device.type, enabled=False):
            self.observed[layer] = stage.observe(Transition(*parts, valid=valid, image=self.layout.is_image))

    def prune(self, stage: Stage, block: nn.Module, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Take the tokens that ``stage`` drops after ``block`` out of its ``outputs`` (B, L, D)."""
        index = self.segment(stage.layer)
        if len(self.views) == index + 1:  # else: recomputed for a backward, and decided already
            with torch.no_grad(), torch.autocast(outputs.device.type, enabled=False):
                text = None
                if "text_attention" in stage.needs:
                    text = self.text_attention(stage, block, inputs, outputs)
                self.views.append(self.select(stage, outputs.detach(), text))
        return gather_tokens(outputs, self.views[index + 1].take)

    def text_attention(self, stage: Stage, block: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Attention (B, H, R, L) float32 of the rows that ``stage.text_rows`` names, and which are text, (B, R) bool.

        Args:
            block: the decoder layer that the stage comes after.
            inputs, outputs: (B, L, D) states that entered and left it.
        """
        assert stage.text_rows is not None and self.layout is not None
        view = self.views[-1]
        own = stage.text_rows.layer == "own"
        layer: Any = block if own else self.decoder.layers[stage.layer + 1]  # type: ignore[index]
        normed = layer.input_layernorm(inputs if own else outputs)
        tails = torch.tensor([max(tail, 1) for tail in self.layout.tail], device=normed.device)
        num_rows = 1 if stage.text_rows.rows == "last" else max(max(self.layout.tail), 1)
        is_text = torch.arange(num_rows, 0, -1, device=normed.device) <= tails[:, None]

        index: int = layer.self_attn.layer_idx
        segment = self.segment(index)
        held, cached = self.held[segment], None
        if self.cache is not None and held:
            keys: Any = self.cache.layers[index].keys
            cached = keys[:, :, :held]
        key_valid = view.key_valid
        if not own:
            key_valid = extended(self.past[segment].valid, held, view.valid, normed.shape[1], normed)
        assert view.rotary is not None
        return text_attention(layer.self_attn, normed, num_rows, view.rotary, cached, key_valid), is_text

    def select(self, stage: Stage, states: Tensor, text: tuple[Tensor, Tensor] | None = None) -> View:
        """Decide who stays of the tokens of the newest view, whose ``states`` are (B, L, D)."""
        assert self.layout is not None
        layout, count = self.layout, self.counter(stage)
        keep = ~layout.is_image
        scores = [self.observed[layer] for layer in stage.observes] if "layer_scores" in stage.needs else []
        for group in layout.groups(count, stage.budget):
            rows, index = group.rows, group.index
            chosen = index
            if group.n_keep < index.shape[1]:
                tokens = gather_tokens(states[rows[:, 0]], index)
                signals = Signals(
                    tokens,
                    tokens,
                    num_protected=0,
                    has_cls=False,
                    text_attention=None if text is None else _columns(text[0][rows[:, 0]], index),
                    text_mask=None if text is None else text[1][rows[:, 0]],
                    layer_scores=torch.stack([score[rows, index] for score in scores], 1) if scores else None,
                )
                chosen = index.gather(1, stage.reduce(signals, group.n_keep).keep)
            keep[rows, chosen] = True
        self.layout = layout.after(count, stage.budget)
        return self.leave(keep, stage)

    def counter(self, stage: Stage) -> Callable[[int, int, int], int]:
        """The function (sample, image or -1 for all, tokens) -> tokens that stay."""

        def num_kept(row: int, image: int, entering: int) -> int:
            if stage.counts_from == "entering":
                return min(entering, stage.num_kept(entering))
            original = sum(self.originals[row]) if image < 0 else self.originals[row][image]
            return min(entering, stage.num_kept(original))

        return num_kept

    def leave(self, keep: Tensor, stage: Stage | None) -> View:
        """The view with only the tokens at ``keep`` (B, L) bool; ``layout`` knows their numbers already.

        ``stage`` says what becomes of positions and is what records call this; None: only padding leaves.
        """
        assert self.layout is not None
        before = self.views[-1]
        lengths = self.layout.lengths
        longest = max(lengths)
        if before.valid is not None:
            keep = keep & before.valid
        order = torch.where(keep, torch.arange(keep.shape[1], device=keep.device), -1).sort(dim=1).values[:, -longest:]
        valid = None if min(lengths) == longest else order >= 0
        take = torch.where(order >= 0, order, order[:, -1:])  # padding: any token that stays; others may be NaN
        segment = self.segment(stage.layer) + 1 if stage is not None and stage.layer >= 0 else 0
        positions, shift = before.positions, before.shift
        former = self.past[segment].shift
        if segment and former is not None:  # in former turns more has left before this segment than before the last one
            last = self.past[segment - 1].shift
            more = former if last is None else former - last
            positions = positions - more
            shift = more if shift is None else shift + more
        if stage is not None and stage.positions == "contiguous":
            dropped = ~keep if before.valid is None else ~keep & before.valid
            total = dropped.long().cumsum(1)
            positions = positions - total
            shift = total[:, -1:] + (0 if shift is None else shift)
        self.layout = _moved(self.layout, take, valid)
        self.observed = {layer: score.gather(1, take) for layer, score in self.observed.items()}
        view = View(
            slots=before.slots.gather(1, take),
            take=take,
            valid=valid,
            positions=positions.gather(1, take),
            shift=shift,
            key_valid=extended(self.past[segment].valid, self.held[segment], valid, longest, take),
        )
        if stage is not None and self.recorder is not None:
            self.record(stage.name, view)
        return view

    def record(self, name: str, view: View) -> None:
        """Tell the recorder which image tokens are left: (B, n), ascending, -1 behind the last one of a sample."""
        assert self.layout is not None and self.image_rank is not None
        most = max(sum(images) for images in self.layout.images)
        rank = self.image_rank.gather(1, view.slots)
        rank = torch.where(self.layout.is_image, rank, rank.new_tensor(torch.iinfo(rank.dtype).max))
        kept = rank.sort(dim=1).values[:, :most]
        self.recorder.on_kept(name, torch.where(kept == torch.iinfo(kept.dtype).max, -1, kept))

    # -- the end -----------------------------------------------------------------------------------------------------

    def restored(self, states: Tensor, view: View) -> Tensor:
        """(B, L, D) as (B, T, D): where a token left, the state of the last one before it that stayed.

        So logits, labels and losses keep their places.
        """
        batch, length = view.slots.shape
        assert self.image_rank is not None
        present = torch.zeros(batch, self.image_rank.shape[1], dtype=torch.long, device=states.device)
        ones = torch.ones_like(view.slots) if view.valid is None else view.valid.long()
        number = present.scatter_add_(1, view.slots.to(states.device), ones.to(states.device)).cumsum(1)
        first = length - number[:, -1:]
        return gather_tokens(states, first + (number - 1).clamp(min=0))

    def cache_state(self) -> CacheState:
        """What the next forward with this cache must know."""
        lengths = [held + view.slots.shape[1] for held, view in zip(self.held, self.views, strict=True)]
        segments = [Segment(first, v.key_valid, v.shift) for first, v in zip(self.starts, self.views, strict=True)]
        assert self.image_rank is not None and self.layout is not None
        layout = self.layout
        tail = min(
            tail if any(images) else length
            for tail, images, length in zip(layout.tail, layout.images, layout.lengths, strict=True)
        )
        return CacheState(self.seen + self.image_rank.shape[1], segments, lengths, tail)


def _columns(attention: Tensor, index: Tensor) -> Tensor:
    """(g, H, R, L) at the columns ``index`` (g, N): (g, H, R, N)."""
    return attention.gather(3, index[:, None, None].expand(-1, attention.shape[1], attention.shape[2], -1))


def _moved(layout: Layout, take: Tensor, valid: Tensor | None) -> Layout:
    is_image = layout.is_image.gather(1, take)
    return replace(layout, is_image=is_image if valid is None else is_image & valid)
