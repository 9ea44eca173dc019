"""What a pruned vision-language model has to compute, slowly: one prompt at a time, no padding, no cache, no hooks.

The stock layers of a dense model run one by one, on lists of tokens that get shorter. Which image tokens stay is given
(by ``record``); everything that follows from it is worked out here again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_tokenprune.recording import Record
from hf_tokenprune.signals import Stage

from .decoder_families import IMAGE, VIDEO, Inputs, image_features, is_image, video_features


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
        states: (T, D) what each layer was given, then what left the last norm; where a token has left, the state of
            the last one before it that stayed.
        logits: (T, V) of the last of these.
        survivors: tokens left at the end, by their place in the prompt.
    """

    entering: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    survivors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Reference:
    """A dense model and one prompt: ``embeds`` (T, D), ``image`` (T,) which of these may leave, and where they do."""

    dense: PreTrainedModel
    embeds: Tensor
    image: Tensor
    leaving: tuple[Leaving, ...]

    @torch.no_grad()
    def forward(self) -> Result:
        decoder, embeds = self.dense.model.language_model, self.embeds
        number = {place: i for i, place in enumerate(self.image.nonzero().flatten().tolist())}
        result = Result()
        places = list(range(len(embeds)))  # of the tokens that are left, in the prompt
        positions = list(places)  # of these, for the rotary embedding
        states = embeds

        def leave_at(layer: int) -> None:
            nonlocal places, positions, states
            for point in self.leaving:
                if point.layer == layer:
                    stay, moved = [], []
                    for i, place in enumerate(places):
                        if place not in number or number[place] in point.kept:
                            stay.append(i)
                            moved.append(positions[i] - (i + 1 - len(stay) if point.renumber else 0))
                    places, positions, states = [places[i] for i in stay], moved, states[stay]

        def filled() -> Tensor:
            last_before = [max((i for i, p in enumerate(places) if p <= t), default=0) for t in range(len(embeds))]
            return states[last_before]

        leave_at(-1)
        for index, layer in enumerate(decoder.layers):
            length = len(places)
            result.entering.append(length)
            result.states.append(filled())
            mask = torch.full((length, length), -torch.inf, dtype=embeds.dtype, device=embeds.device).triu(1)
            position_ids = torch.tensor([positions], device=embeds.device)
            (states,) = layer(
                states[None],
                attention_mask=mask[None, None],
                position_ids=position_ids,
                position_embeddings=decoder.rotary_emb(states[None], position_ids),
            )
            leave_at(index)
        states = decoder.norm(states)
        result.states.append(filled())
        result.logits = self.dense.lm_head(result.states[-1])
        result.survivors = places
        return result

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
        embeds = torch.cat([self.embeds, self.dense.get_input_embeddings().weight[ids].detach()])
        return replace(self, embeds=embeds, image=F.pad(self.image, (0, len(ids))))

    def then_prompt(self, other: Reference) -> Reference:
        """The prompt with another one behind it, with images of its own."""
        before = int(self.image.sum())
        leaving = tuple(
            replace(mine, kept=mine.kept | {before + number for number in theirs.kept})
            for mine, theirs in zip(self.leaving, other.leaving, strict=True)
        )
        return Reference(
            self.dense, torch.cat([self.embeds, other.embeds]), torch.cat([self.image, other.image]), leaving
        )


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
    (ids,) = inputs["input_ids"]
    image = is_image(inputs)[0]
    embeds = dense.get_input_embeddings()(ids).detach().clone()
    if "pixel_values" in inputs:
        in_tower = any(stage.where == "vision_tower" for stage in stages)
        maker = pruned if in_tower and pruned is not None else dense
        embeds[ids == IMAGE] = image_features(maker, inputs["pixel_values"], inputs.get("image_sizes"))
    if "pixel_values_videos" in inputs:
        embeds[ids == VIDEO] = video_features(dense, inputs["pixel_values_videos"])
    leaving = []
    for stage in stages:
        assert rec is not None
        always = newlines(dense, embeds[image]) if stage.newlines == "protect" else frozenset()
        kept = frozenset(number for number in rec.kept[stage.name][row].tolist() if number >= 0)
        leaving.append(Leaving(stage.layer, kept | always, stage.positions == "contiguous"))
    return Reference(dense, embeds, image, tuple(leaving))


def newlines(dense: PreTrainedModel, features: Tensor) -> frozenset[int]:
    """Which image tokens are newline tokens, by number; none where a family has none."""
    newline = getattr(dense.model, "image_newline", None)
    if newline is None:
        return frozenset()
    return frozenset((features == newline).all(-1).nonzero().flatten().tolist())


def cross_entropy(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Of each token that ``labels`` (T,) name, by the logits (T, V) of the place before it."""
    return [F.cross_entropy(logits[t], labels[t + 1]) for t in range(len(labels) - 1) if labels[t + 1] != -100]
