"""One forward of a decoder whose image tokens leave on the way: who is still there, and what each layer must be given.

Layers between two pruning stages form a segment: they see the same tokens, so they share positions and mask. Tokens
that a stage drops leave their sample where the layer behind it begins; samples are then aligned at the end again, with
padding in front. Inside a layer's forward its weights are there and its states are on its device, which neither is
sure outside (offloading, sharding, models over several devices).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ...signals import Signals, Stage, Transition
from ...tokens import gather_tokens
from ._cache import Segment, extended
from ._layout import Layout
from ._packed import Packed
from ._side_inputs import SideInputs
from ._text import Text, text_rows
from ._text_rows import all_keys, text_attention
from ._told import tell_importance, tell_kept
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
        text: what the next stage reads of the text.
        text_scores: (B, R) float32, how the stage that wants it rated the text at the entrance; None: no stage does.
        placeholders: (B, T) bool, tokens of images.
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
        self.recorders: tuple[Any, ...] = ()
        self.proposed = 0
        self.packed: Packed | None = None
        self.side_inputs: SideInputs | None = None
        self.observed: dict[int, Tensor] = {}
        self.text: Text | None = None
        self.text_scores: Tensor | None = None
        self.placeholders: Tensor | None = None

    def segment(self, layer: int) -> int:
        """Index of the segment that a layer belongs to."""
        return sum(start <= layer for start in self.starts) - 1

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
                    self.text = self.read_text(stage, block, layer, states, rotary)
                self.views.append(self.select(stage, states.detach()))
        return self.view(index, states.device).taken(states)

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
            self.text = self.read_text(stage, block, layer, states, given["position_embeddings"])

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
        self.text = None if self.text is None else self.text.on(device)
        self.text_scores = moved(self.text_scores, device)
        self.past = [past.on(device) for past in self.past]
        self.views[-1] = self.views[-1].on(device)

    def read_text(self, stage: Stage, block: Any, layer: int, states: Tensor, rotary: tuple[Tensor, Tensor]) -> Text:
        """What ``stage`` reads of the text, and of its attention in a layer.

        Args:
            block: the decoder layer whose attention is read, the one called ``layer``.
            states: (B, L, D) what enters it.
            rotary: cos and sin, (B or 1, L, d), of these tokens.
        """
        text = self.find_text(stage)
        normed = block.input_layernorm(states)
        if "text_attention" in stage.needs:
            text = replace(text, attention=self.text_attention(text, block, layer, normed, rotary))
        if "keys" in stage.needs:
            if not self.seen:  # else counting goes on from what came before
                rotary = self.view(len(self.views) - 1, normed.device).rotary_from_start(self.decoder, normed, rotary)
            text = replace(text, keys=all_keys(block.self_attn, normed, rotary))
        return text

    def find_text(self, stage: Stage, special: Tensor | None = None) -> Text:
        """Where the text stands that ``stage`` reads, in the newest view; ``special`` (B, T) bool: what is no word."""
        assert stage.text_rows is not None and self.layout is not None and self.placeholders is not None
        view = self.views[-1]
        placeholders = self.placeholders.to(view.slots.device).gather(1, view.slots)
        special = None if special is None else special.gather(1, view.slots)
        return text_rows(stage.text_rows.rows, self.layout, view.valid, placeholders, special, self.proposed)

    def text_attention(
        self, text: Text, block: Any, layer: int, normed: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attention (B, H, R, L) float32 of rows of ``text``, which are the last ones, in the layer called ``layer``,
        whose normed input is ``normed`` (B, L, D)."""
        segment, num_rows = self.segment(layer), text.index.shape[1]
        held, cached = self.held[segment], None
        if self.cache is not None and held:
            keys: Any = self.cache.layers[layer].keys
            cached = keys[:, :, :held]
        length = normed.shape[1] - self.proposed  # no row of text sees what stands behind it
        key_valid = extended(self.past[segment].valid, held, self.views[-1].valid, normed.shape[1], normed)
        key_valid = None if key_valid is None else key_valid[:, : held + length]
        cos, sin = (part[:, :length] for part in rotary)
        scale = block.query_scale(self.views[-1].positions[..., length - num_rows : length])
        return text_attention(block.self_attn, normed[:, :length], num_rows, (cos, sin), cached, key_valid, scale)

    def select(self, stage: Stage, states: Tensor) -> View:
        """Decide who stays of the tokens of the newest view, whose ``states`` are (B, L, D)."""
        assert self.layout is not None
        layout, text, count = self.layout, self.text, self.counter(stage, self.layout)
        keep, self.text = ~layout.is_image, None
        merged: list[tuple[Tensor, Tensor, Tensor]] = []
        ranked: list[tuple[Tensor, Tensor, Tensor]] = []
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
                    layer_scores=torch.stack([score[rows, index] for score in scores], 1) if scores else None,
                    frames=max(group.frames, 1),
                    text_scores=None if self.text_scores is None else self.text_scores[rows[:, 0]],
                    **({} if text is None else text.signals(stage, states, rows[:, 0], index)),
                )
                with torch.autocast(tokens.device.type, enabled=False):
                    reduction = stage.reduce(signals, group.n_keep)
                chosen = index.gather(1, reduction.keep)
                if reduction.tokens is not None:
                    merged.append((rows, chosen, reduction.tokens))
                if reduction.importance is not None:
                    ranked.append((rows, index, reduction.importance))
            keep[rows, chosen] = True
        if self.recorders and ranked:
            tell_importance(self.recorders, stage.name, self.rank(self.views[-1]), ranked)
        self.layout = layout.after(count, stage.budget)
        view = self.leave(keep, stage)
        for recorder in self.recorders if merged else ():
            recorder.on_average(stage.name)
        return view.with_states(states, merged) if merged else view

    def rate_text(self, stage: Stage, tokens: Tensor) -> None:
        """Let ``stage`` rate the text by the ``tokens`` (B, L, D) that enter the first layer."""
        assert self.layout is not None
        text = self.find_text(stage)
        self.text_scores = tokens.new_zeros(text.index.shape, dtype=torch.float32)
        for group in self.layout.groups(lambda row, image, entering: entering, "sample"):
            rows = group.rows[:, 0]
            images, words = (gather_tokens(tokens[rows], index) for index in (group.index, text.index[rows]))
            with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
                self.text_scores[rows] = stage.rate_text(images, words, text.mask[rows])

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
        if stage is not None and self.recorders:
            most = max(sum(images) for images in self.layout.images)
            tell_kept(self.recorders, stage.name, self.rank(view), self.layout.is_image, most)
        return view

    def rank(self, view: View) -> Tensor:
        """(B, L) int64: of each image token in a view its number in the sample, where that is recorded."""
        assert self.image_rank is not None
        return self.image_rank.gather(1, view.slots)


def reads_text(stage: Stage, layer: str) -> bool:
    """Whether a stage reads text, and of its attention that of its "own" layer, or of the "next" one."""
    return stage.text_rows is not None and stage.text_rows.layer == layer
