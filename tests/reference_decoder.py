"""What a pruned vision-language model has to compute, slowly: one prompt at a time, no padding, no cache, no hooks.

The stock layers of a dense model run one by one, on lists of tokens that get shorter. Which image tokens stay is given
(by ``record``); everything that follows from it is worked out here again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_tokenprune.recording import Record
from hf_tokenprune.signals import Stage

from .decoder_prompts import BY_TOKEN, in_one, of_images, of_videos, types_of
from .decoder_visuals import Inputs, encoded_images, encoded_videos, image_features, video_features


@dataclass(frozen=True)
class Leaving:
    """One pruning point of one prompt.

    Attributes:
        layer: the decoder layer after which tokens leave; -1: before the first.
        kept: which image tokens of the prompt are left behind it, by number; newlines that are protected too.
        renumber: whether positions of what is left close up.
    """

    layer: int
    kept: frozenset[int]
    renumber: bool


@dataclass
class Result:
    """Of a prompt of T tokens.

    Attributes:
        entering: how many tokens entered each layer.
        states: (T, D) the embeddings, what left each layer, and at last the norm: as stock models hand them out,
            without what DeepStack adds. Where a token has left, the state of the last one before it that stayed.
        logits: (T, V) of the last of these.
        survivors: tokens left at the end, by their place in the prompt.
    """

    entering: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    survivors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A dense model and one prompt of T tokens.

    Attributes:
        inputs: of the stock model, of which positions are made.
        embeds: (T, D) with the features of images and videos in them.
        added: (T, D) each, what the stock model adds to the states behind layers 0, 1, ... (DeepStack).
        positions: (A, T) for the rotary embedding, in a dense model; A axes.
        image: (T,) which tokens may leave.
        leaving: where they do.
    """

    dense: PreTrainedModel
    inputs: Inputs
    embeds: Tensor
    added: tuple[Tensor, ...]
    positions: Tensor
    image: Tensor
    leaving: tuple[Leaving, ...]

    @torch.no_grad()
    def forward(self) -> Result:
        decoder, embeds = self.dense.get_decoder(), self.embeds
        result = Result()
        places = list(range(len(embeds)))  # of the tokens that are left, in the prompt
        positions = self.positions  # of these
        states = output = embeds  # with and without what is added to them

        def leave_at(layer: int) -> None:
            nonlocal places, positions, states, output
            for point in self.leaving:
                if point.layer == layer:
                    gone = self.dropped(point)
                    stay = [i for i, place in enumerate(places) if place not in gone]
                    closed_up = torch.tensor(stay) - torch.arange(len(stay)) if point.renumber else 0
                    places, states, output = [places[i] for i in stay], states[stay], output[stay]
                    positions = positions[:, stay] - closed_up

        leave_at(-1)
        for index, layer in enumerate(decoder.layers):
            length = len(places)
            result.entering.append(length)
            result.states.append(self.filled(output, places))
            causal = torch.full((length, length), -torch.inf, dtype=embeds.dtype, device=embeds.device).triu(1)
            (output,) = layer(
                states[None],
                attention_mask=None if is_linear(decoder, index) else causal[None, None],
                position_ids=axes(positions),
                position_embeddings=decoder.rotary_emb(states[None], axes(positions)),
            )
            states = output + self.added[index][places] if index < len(self.added) else output
            leave_at(index)
        result.states.append(self.filled(decoder.norm(states), places))
        result.logits = self.dense.lm_head(result.states[-1])
        result.survivors = places
        return result

    def dropped(self, point: Leaving) -> set[int]:
        """The places of image tokens that do not stay behind a pruning point."""
        places = self.image.nonzero().flatten().tolist()
        return {place for number, place in enumerate(places) if number not in point.kept}

    def added_behind(self, layer: int) -> Tensor:
        return self.added[layer] if layer < len(self.added) else torch.zeros_like(self.embeds)

    def filled(self, states: Tensor, places: list[int]) -> Tensor:
        """(T, D): at each place of the prompt the state of the last token up to there that is left."""
        last_before = [max((i for i, p in enumerate(places) if p <= t), default=0) for t in range(len(self.embeds))]
        return states[last_before]

    def generate(self, count: int) -> tuple[list[int], Tensor]:
        """Greedy decoding: (tokens, logits (count, V) that each was chosen by). Each step computes everything anew."""
        told, tokens, logits = self, [], []
        for _ in range(count):
            logits.append(told.forward().logits[-1])
            allowed = logits[-1].clone()
            allowed[self.dense.generation_config.suppress_tokens] = -torch.inf
            tokens.append(int(allowed.argmax()))
            told = told.then(tokens[-1:])
        return tokens, torch.stack(logits)

    def then(self, ids: list[int]) -> Reference:
        """The prompt with more text behind it, of which nothing leaves."""
        new = torch.tensor([ids])
        text = {name: torch.full_like(new, name == "attention_mask") for name in BY_TOKEN if name in self.inputs}
        behind = self.positions.max() + 1 + torch.arange(len(ids))
        return replace(
            self,
            inputs=in_one(self.dense, [self.inputs, text | {"input_ids": new}]),
            embeds=torch.cat([self.embeds, self.dense.get_input_embeddings().weight[ids].detach()]),
            added=tuple(F.pad(rows, (0, 0, 0, len(ids))) for rows in self.added),
            positions=torch.cat([self.positions, behind.expand(len(self.positions), -1)], 1),
            image=F.pad(self.image, (0, len(ids))),
        )

    def then_prompt(self, other: Reference) -> Reference:
        """The prompt with another one behind it, with images of its own."""
        before, length = int(self.image.sum()), len(self.embeds)
        inputs = in_one(self.dense, [self.inputs, other.inputs])
        return replace(
            self,
            inputs=inputs,
            embeds=torch.cat([self.embeds, other.embeds]),
            added=tuple(
                torch.cat([self.added_behind(layer), other.added_behind(layer)])
                for layer in range(max(len(self.added), len(other.added)))
            ),
            positions=torch.cat([self.positions, positions_of(self.dense, inputs)[:, length:]], 1),
            image=torch.cat([self.image, other.image]),
            leaving=tuple(
                replace(mine, kept=mine.kept | {before + number for number in theirs.kept})
                for mine, theirs in zip(self.leaving, other.leaving, strict=True)
            ),
        )


class Masked(Reference):
    """Another way to the same: the stock decoder on the whole prompt, where no layer behind a pruning point may look at
    the tokens that left there. Positions stay what they are."""

    @torch.no_grad()
    def forward(self) -> Result:
        decoder, length = self.dense.get_decoder(), len(self.embeds)
        assert not any(point.renumber for point in self.leaving), "masked tokens keep their places"
        gone: set[int] = set()
        masks = []
        for index in range(-1, len(decoder.layers) - 1):
            for point in self.leaving:
                if point.layer == index:
                    gone |= self.dropped(point)
            assert not (gone and is_linear(decoder, index + 1)), "a recurrent layer has no keys to mask"
            mask = torch.full((length, length), -torch.inf, dtype=self.embeds.dtype, device=self.embeds.device).triu(1)
            mask[:, sorted(gone)] = -torch.inf
            masks.append(mask.fill_diagonal_(0)[None, None])  # a row of nothing but -inf would be NaN
        handles = [
            layer.register_forward_pre_hook(partial(masked, mask), with_kwargs=True)
            for index, (layer, mask) in enumerate(zip(decoder.layers, masks, strict=True))
            if not is_linear(decoder, index)
        ]
        more: dict[str, Any] = {"position_ids": axes(self.positions), "use_cache": False}
        if self.added:
            visual = [rows[self.image] for rows in self.added]
            more |= {"visual_pos_masks": self.image[None], "deepstack_visual_embeds": visual}
        try:
            embeds = self.embeds.nan_to_num(0)  # what a tower has dropped is NaN, which a mask does not hide
            (states,) = decoder(inputs_embeds=embeds[None], **more).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        survivors = [place for place in range(length) if place not in gone]
        return Result(logits=self.dense.lm_head(self.filled(states[survivors], survivors)), survivors=survivors)


def masked(mask: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: the layer with another mask."""
    return args, {**kwargs, "attention_mask": mask}


def is_linear(decoder: PreTrainedModel, layer: int) -> bool:
    """Whether a layer is recurrent: it has a state and no keys."""
    types = getattr(decoder.config, "layer_types", None)
    return types is not None and types[layer] == "linear_attention"


def axes(positions: Tensor) -> Tensor:
    """Positions (A, T) of one prompt as stock decoders take them: (1, T), or (A, 1, T) where there are several axes."""
    return positions if len(positions) == 1 else positions[:, None]


def positions_of(dense: PreTrainedModel, inputs: Inputs) -> Tensor:
    """(A, T) of one prompt, by the stock model's own code."""
    if not hasattr(dense.model, "get_rope_index"):
        return torch.arange(inputs["input_ids"].shape[1])[None]
    names = ("input_ids", *BY_TOKEN, "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions: Tensor = dense.model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]
    return positions[:, 0]


def reference(
    dense: PreTrainedModel,
    inputs: Inputs,
    stages: tuple[Stage, ...] = (),
    rec: Record | None = None,
    row: int = 0,
    pruned: PreTrainedModel | None = None,
) -> Reference:
    """The reference for one prompt, of which ``rec`` tells as ``row`` of its batch what was kept.

    Args:
        pruned: whose image features to use where a stage works in the vision tower; a method may merge there.
    """
    embeds = dense.get_input_embeddings()(inputs["input_ids"][0]).detach().clone()
    (types,) = types_of(inputs)
    in_tower = any(stage.where == "vision_tower" for stage in stages)
    maker = pruned if in_tower and pruned is not None else dense
    added: dict[int, Tensor] = {}
    if "pixel_values" in inputs:
        embeds[types == 1] = image_features(maker, **of_images(inputs))
        for layer, rows in enumerate(deepstack(encoded_images(maker, **of_images(inputs)))):
            added.setdefault(layer, torch.zeros_like(embeds))[types == 1] = rows
    if "pixel_values_videos" in inputs:
        embeds[types == 2] = video_features(maker, **of_videos(inputs))
        for layer, rows in enumerate(deepstack(encoded_videos(maker, **of_videos(inputs)))):
            added.setdefault(layer, torch.zeros_like(embeds))[types == 2] = rows
    image = types > 0
    of_video = (types[image] == 2) & any(stage.videos_only for stage in stages)  # then its newlines stay everywhere
    leaving = []
    for stage in stages:
        assert rec is not None
        always = newlines(dense, embeds[image])
        if stage.newlines != "protect":
            always = frozenset(number for number in always if of_video[number])
        kept = frozenset(number for number in rec.kept[stage.name][row].tolist() if number >= 0)
        leaving.append(Leaving(stage.layer, kept | always, stage.positions == "contiguous"))
    return Reference(dense, inputs, embeds, tuple(added.values()), positions_of(dense, inputs), image, tuple(leaving))


def deepstack(encoded: Any) -> list[Tensor]:
    """(N, D) each, of images one behind the other: features of blocks inside the tower, where a family has them."""
    levels = getattr(encoded, "deepstack_features", None) or ()
    return [level if isinstance(level, Tensor) else torch.cat(level) for level in levels]  # old versions: in one piece


def newlines(dense: PreTrainedModel, features: Tensor) -> frozenset[int]:
    """Which image tokens are newline tokens, by number; none where a family has none."""
    newline = getattr(dense.model, "image_newline", None)
    if newline is None:
        return frozenset()
    return frozenset((features == newline).all(-1).nonzero().flatten().tolist())


def cross_entropy(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Of each token that ``labels`` (T,) name, by the logits (T, V) of the place before it."""
    return [F.cross_entropy(logits[t], labels[t + 1]) for t in range(len(labels) - 1) if labels[t + 1] != -100]
