"""One forward of a decoder whose image tokens leave on the way: who is still there, and what each layer must be given.

Layers between two pruning stages form a segment: they see the same tokens, so they share positions and mask. Tokens
that a stage drops leave their sample where the layer behind it begins; samples are then aligned at the end again, with
padding in front. Inside a layer's forward its weights are there and its states are on its device, which neither is
sure outside (offloading, sharding, models over several devices).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ...signals import Signals, Stage, Transition
from ...tokens import gather_tokens
from ._cache import CacheState, Segment, extended
from ._layout import Layout
from ._packed import Packed
from ._side_inputs import SideInputs
from ._text_rows import text_attention
from ._view import View, moved


class Forward:
    """What was found out at the entrance, and what the stages decide on the way. Lives as long as one forward.

    No dataclass: FSDP with mixed precision gives every layer a copy of those among its arguments.

    Attributes:
        decoder: the language model.
        stages: in-decoder stages by layer; empty where no image is in the input.
        starts: first layer of each segment.
        views: by segment, as far as the forward has come.
        held: keys in the cache before this forward, by segment.
        past: by segment, what the cache knew before this forward.
        seen: tokens that the caller had fed before this forward.
        cache: None where the caller uses none.
        layout: of the newest view; None where no image is in the input.
        length: T, the tokens that came in.
        image_rank: (B, T) int64, of each image token its number in the sample; None where nobody records it.
        originals: for each sample, image tokens of each image that entered the first layer.
        proposed: how many of the last tokens only stand there to be checked (assisted decoding); they stay, and have no
            say in what else does.
        packed: how several samples stood in one row; None: they did not.
        side_inputs: what is added to the tokens of the first segment, and to those of them that are left later.
        observed: (B, L) float32 scores of the layers observed so far, of the tokens of the newest view.
        text: what the next stage reads of the text's attention, see :meth:`text_attention`.
    """

    def __init__(
        self,
        decoder: nn.Module,
        starts: list[int],
        view: View,
        held: list[int],
        past: list[Segment],
        seen: int,
        cache: Cache | None,
    ) -> None:
        self.decoder = decoder
        self.stages: dict[int, Stage] = {}
        self.starts = starts
        self.views = [view]
        self.held = held
        self.past = past
        self.seen = seen
        self.cache = cache
        self.layout: Layout | None = None
        self.length = view.slots.shape[1]
        self.image_rank: Tensor | None = None
        self.originals: tuple[tuple[int, ...], ...] = ()
        self.recorder: Any = None
        self.proposed = 0
        self.packed: Packed | None = None
        self.side_inputs: SideInputs | None = None
        self.observed: dict[int, Tensor] = {}
        self.text: tuple[Tensor, Tensor] | None = None

    def segment(self, layer: int) -> int:
        """Index of the segment that a layer belongs to."""
        return bisect_right(self.starts, layer) - 1

    def view(self, index: int, device: torch.device) -> View:
        """What a segment sees, on the device of one of its layers."""
        view = self.views[index] = self.views[index].on(device)
        return view

    def layer_inputs(self, layer: int, states: Tensor, stock: dict[str, Any]) -> dict[str, Any]:
        """Mask and rotary embedding for a layer, where its ``states`` are: ``stock`` ones in the first segment.

        No ``position_ids``: FlashAttention would take their gaps for packed samples.
        """
        index = self.segment(layer)
        if index == 0:
            return {**stock, "position_ids": None}
        view = self.view(index, states.device)
        if view.rotary is None:
            view.rotary = view.make_rotary(self.decoder, states, stock["position_embeddings"])
            view.mask = view.make_mask(self.decoder, layer, states, self.cache)
        return {**stock, "attention_mask": view.mask, "position_ids": None, "position_embeddings": view.rotary}

    # -- pruning -----------------------------------------------------------------------------------------------------

    def arrive(self, block: Any, layer: int, states: Tensor, stock: dict[str, Any]) -> Tensor:
        """The ``states`` (B, L, D) that the layer before gave, without the tokens that the stage behind that one drops.

        Args:
            block: the decoder layer that is about to run, the one called ``layer``.
            stock: the arguments it was given.
        """
        index = self.segment(layer)
        if self.layout is None or index == 0 or layer != self.starts[index]:
            return states
        if len(self.views) == index:  # else: recomputed for a backward, and decided already
            stage = self.stages[layer - 1]
            with torch.no_grad():
                self.follow(states.device)
                if reads_text(stage, "next"):
                    rotary = self.layer_inputs(layer - 1, states, stock)["position_embeddings"]
                    self.text = self.text_attention(stage, block, layer, states, rotary)
                self.views.append(self.select(stage, states.detach()))
                self.text = None
        return gather_tokens(states, self.view(index, states.device).take)

    def with_side_inputs(self, layer: int, states: Tensor) -> Tensor:
        """What a decoder layer gave, (B, L, D), with what the family adds behind it."""
        if self.side_inputs is None or layer not in self.side_inputs.features:
            return states
        columns = self.view(self.segment(layer), states.device).columns
        return (self.side_inputs if columns is None else self.side_inputs.of(columns)).added(layer, states)

    def look(self, block: Any, layer: int, states: Tensor, given: dict[str, Any]) -> None:
        """Before a layer runs: read of its attention what the stage behind it wants to see of it.

        Args:
            block: the decoder layer that is about to run, the one called ``layer``.
            states: (B, L, D) what enters it.
            given: the other arguments it gets.
        """
        stage = self.stages.get(layer)
        if stage is None or not reads_text(stage, "own") or len(self.views) > self.segment(layer) + 1:
            return
        with torch.no_grad():
            self.follow(states.device)
            self.text = self.text_attention(stage, block, layer, states, given["position_embeddings"])

    def observers(self, layer: int) -> Stage | None:
        """The stage that wants a score of this layer's transition, if one does."""
        return next((stage for stage in self.stages.values() if layer in stage.observes), None)

    def observe(self, stage: Stage, layer: int, parts: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        """Let ``stage`` score what a layer did: ``parts`` are input and output of attention and MLP, (B, L, D) each."""
        if layer in self.observed:  # recomputed for a backward
            return
        self.follow(parts[0].device)
        assert self.layout is not None
        valid = self.views[-1].valid
        valid = parts[0].new_ones(parts[0].shape[:2], dtype=torch.bool) if valid is None else valid
        if self.proposed:
            valid = valid.clone()
            valid[:, -self.proposed :] = False
        with torch.no_grad(), torch.autocast(parts[0].device.type, enabled=False):
            self.observed[layer] = stage.observe(Transition(*parts, valid=valid, image=self.layout.is_image))

    def follow(self, device: torch.device) -> None:
        """Bring what decisions are made from to the device that the states have come to."""
        assert self.layout is not None
        if self.layout.is_image.device == device:
            return
        self.layout = replace(self.layout, is_image=self.layout.is_image.to(device))
        self.image_rank = moved(self.image_rank, device)
        self.observed = {layer: score.to(device) for layer, score in self.observed.items()}
        self.text = moved(self.text, device)
        self.past = [past.on(device) for past in self.past]
        self.views[-1] = self.views[-1].on(device)

    def text_attention(
        self, stage: Stage, block: Any, layer: int, states: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Attention (B, H, R, L) float32 of the rows that ``stage.text_rows`` names, and which are text, (B, R) bool.

        Args:
            block: the decoder layer whose attention is read, the one called ``layer``.
            states: (B, L, D) what enters it.
            rotary: cos and sin, (B or 1, L, d), of these tokens.
        """
        assert stage.text_rows is not None and self.layout is not None
        behind = [max(tail - self.proposed, 1) for tail in self.layout.tail]
        num_rows = 1 if stage.text_rows.rows == "last" else max(behind)
        tails = torch.tensor(behind, device=states.device)
        is_text = torch.arange(num_rows, 0, -1, device=states.device) <= tails[:, None]

        segment = self.segment(layer)
        held, cached = self.held[segment], None
        if self.cache is not None and held:
            keys: Any = self.cache.layers[layer].keys
            cached = keys[:, :, :held]
        length = states.shape[1] - self.proposed  # no row of text sees what stands behind it
        key_valid = extended(self.past[segment].valid, held, self.views[-1].valid, states.shape[1], states)
        key_valid = None if key_valid is None else key_valid[:, : held + length]
        cos, sin = (part[:, :length] for part in rotary)
        normed = block.input_layernorm(states[:, :length])
        scale = block.query_scale(self.views[-1].positions[..., length - num_rows : length])
        return text_attention(block.self_attn, normed, num_rows, (cos, sin), cached, key_valid, scale), is_text

    def select(self, stage: Stage, states: Tensor) -> View:
        """Decide who stays of the tokens of the newest view, whose ``states`` are (B, L, D)."""
        assert self.layout is not None
        layout, text, count = self.layout, self.text, self.counter(stage, self.layout)
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
                    frames=max(group.frames, 1),
                )
                with torch.autocast(tokens.device.type, enabled=False):
                    chosen = index.gather(1, stage.reduce(signals, group.n_keep).keep)
            keep[rows, chosen] = True
        self.layout = layout.after(count, stage.budget)
        return self.leave(keep, stage)

    def counter(self, stage: Stage, layout: Layout) -> Callable[[int, int, int], int]:
        """The function (sample, image or -1 for all, tokens) -> tokens that stay."""

        def num_kept(row: int, image: int, entering: int) -> int:
            if stage.videos_only:
                frames = layout.frames[row][image]
                return min(entering, stage.num_kept_of(entering, frames)) if frames else entering
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
        positions, shift, renumbered = before.positions, before.shift, before.renumbered
        former = self.past[segment].shift
        if segment and former is not None:  # in former turns more has left before this segment than before the last one
            last = self.past[segment - 1].shift
            more = former if last is None else former - last
            positions, renumbered = positions - more, True
            shift = more if shift is None else shift + more
        if stage is not None and stage.positions == "contiguous":
            dropped = ~keep if before.valid is None else ~keep & before.valid
            total = dropped.long().cumsum(1)
            positions, renumbered = positions - total, True
            shift = total[:, -1:] + (0 if shift is None else shift)
        is_image = self.layout.is_image.gather(1, take)
        self.layout = replace(self.layout, is_image=is_image if valid is None else is_image & valid)
        self.observed = {layer: score.gather(1, take) for layer, score in self.observed.items()}
        view = View(
            slots=before.slots.gather(1, take),
            take=take,
            columns=None if segment == 0 else take if before.columns is None else before.columns.gather(1, take),
            valid=valid,
            positions=positions.gather(-1, take.expand(positions.shape[:-1] + take.shape[-1:])),
            renumbered=renumbered and segment > 0,
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
        view = view.on(states.device)
        batch, length = view.slots.shape
        present = torch.zeros(batch, self.length, dtype=torch.long, device=states.device)
        ones = torch.ones_like(view.slots) if view.valid is None else view.valid.long()
        number = present.scatter_add_(1, view.slots, ones).cumsum(1)
        first = length - number[:, -1:]
        full = gather_tokens(states, first + (number - 1).clamp(min=0))
        return full if self.packed is None else self.packed.pack(full)

    def restored_input(self, states: Tensor, layer: int) -> Tensor:
        """:meth:`restored` for what the layer before ``layer`` gave: without the tokens that leave in this one."""
        index = self.segment(layer)
        view = self.views[index].on(states.device)
        arriving = layer > 0 and layer == self.starts[index]
        return self.restored(gather_tokens(states, view.take) if arriving else states, view)

    def cache_state(self) -> CacheState:
        """What the next forward with this cache must know."""
        lengths = [held + view.slots.shape[1] for held, view in zip(self.held, self.views, strict=True)]
        segments = [Segment(first, v.key_valid, v.shift) for first, v in zip(self.starts, self.views, strict=True)]
        assert self.layout is not None
        layout = self.layout
        tail = min(
            tail if any(images) else length
            for tail, images, length in zip(layout.tail, layout.images, layout.lengths, strict=True)
        )
        return CacheState(self.seen + self.length, segments, lengths, tail)


def _columns(attention: Tensor, index: Tensor) -> Tensor:
    """(g, H, R, L) at the columns ``index`` (g, N): (g, H, R, N)."""
    return attention.gather(3, index[:, None, None].expand(-1, attention.shape[1], attention.shape[2], -1))


def reads_text(stage: Stage, layer: str) -> bool:
    """Whether a stage reads the text's attention of its "own" layer, or of the "next" one."""
    return "text_attention" in stage.needs and stage.text_rows is not None and stage.text_rows.layer == layer
