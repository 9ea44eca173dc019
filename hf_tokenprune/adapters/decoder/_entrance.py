"""The hooks in front of a pruned language model: what leaves at the entrance leaves, and layers are told of the rest.

All are instances of importable classes without state of their own, so that a pruned model can be copied and pickled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from ...errors import PruneStateError, UnsupportedModelError
from ...signals import Stage
from ._cache import (
    Segment,
    extended,
    given_cache,
    state_of,
)
from ._forward import Forward
from ._images import ARGUMENT, PROPOSED, Images, ImageTokens, check_inputs, is_decode_step
from ._layout import DROPPED, GONE, IMAGE, NEWLINE, PAD, PADDING, Layout, read_layout
from ._packed import read_packed, unpacked_arguments
from ._view import View, moved


class CountProposals:
    """Forward pre-hook of the model with the head: assisted decoding lets it check candidates behind the prompt.

    It asks for the logits of one token more than there are candidates, and always gives a cache, from which it takes
    the rejected ones again. They are not part of the prompt, so they must not choose image tokens. Where so many tokens
    cannot be candidates, ``let_leave`` takes them for text of the prompt.
    """

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        logits = kwargs.get("logits_to_keep")
        if given_cache(kwargs) is None or not isinstance(logits, int) or logits <= 1:
            return args, kwargs
        return args, {**kwargs, PROPOSED: logits - 1}


class EnterDecoder:
    """Forward pre-hook of the language model: what leaves at the entrance leaves, and layers are told of the rest.

    A compiler leaves it out as a whole: it reads where the image tokens are, which would break its graph many times.
    """

    @torch.compiler.disable
    def __call__(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cache = given_cache(kwargs)
        embeds: Tensor | None = kwargs.get("inputs_embeds")
        if ARGUMENT not in kwargs and embeds is not None and not is_decode_step(embeds, cache):
            raise UnsupportedModelError(
                "inputs_embeds were given to the language model itself: a pruned model cannot tell which embeddings "
                "are of an image. Call the whole model with input_ids and pixel_values, or unprune(model)"
            )
        images: Images | None = kwargs.pop(ARGUMENT, None)
        state = decoder.token_prune
        starts = [0, *(stage.layer + 1 for stage in state.stages if stage.layer >= 0)]
        past = state_of(cache, starts)
        if images is None and past is None:
            return args, kwargs
        check_inputs(kwargs)
        check_attention(decoder)
        if past is not None:
            cache.open = True
        if images is None:
            tokens = embeds if embeds is not None else args[0] if args else kwargs["input_ids"]
            forward = begin(decoder, starts, tokens, kwargs, past)
            forward.views += later_views(forward, forward.views[0])
        else:
            assert embeds is not None
            forward, tokens, kwargs = with_images(decoder, starts, embeds, kwargs, past, images)
        view = forward.views[0]
        mask = view.key_valid
        if mask is None and cache is None:  # then Transformers takes gaps in positions for packed samples
            mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        kwargs |= {"attention_mask": mask, "position_ids": view.positions, ARGUMENT: forward}
        return args, kwargs


def check_attention(decoder: Any) -> None:
    """Raise UnsupportedModelError where its kernel does not let layers see different tokens."""
    attention = decoder.config._attn_implementation
    if str(attention).startswith("paged"):
        raise UnsupportedModelError(
            f"attention {attention!r} (continuous batching) cannot hold layers of different lengths"
        )
    if (
        is_flash_attention_requested(requested_attention_implementation=attention)
        and decoder.layers[0].reads_positions
        and any(stage.positions == "original" for stage in decoder.token_prune.stages)
    ):
        raise UnsupportedModelError(
            f"attention of {decoder.config.model_type!r} reads positions, and {attention!r} takes those with gaps for "
            'packed samples: set positions="contiguous" in the config, or model.set_attn_implementation("sdpa")'
        )


def check_recurrent(decoder: Any, forward: Forward) -> None:
    """Raise UnsupportedModelError where padding would come between tokens of a sample in a recurrent layer."""
    recurrent = "linear_attention" in (getattr(decoder.config, "layer_types", None) or ())
    if recurrent and forward.seen and forward.views[0].valid is not None:
        raise UnsupportedModelError(
            "samples of different lengths behind a cache that holds tokens already: padding between would change the "
            "states of this model's recurrent layers. Continue each sample alone, or all with as many tokens"
        )


def begin(decoder: Any, starts: list[int], tokens: Tensor, kwargs: dict[str, Any], past: Any) -> Forward:
    """The forward with the first segment's view of all its ``tokens``: ids (B, T) or embeddings (B, T, D)."""
    cache: Any = given_cache(kwargs)
    mask: Tensor | None = kwargs.get("attention_mask")
    (batch, length), device = tokens.shape[:2], tokens.device
    seen = 0 if cache is None else cache.get_seq_length()
    mask = None if mask is None else mask.to(device, torch.bool)
    is_padded = past is not None and any(segment.valid is not None for segment in past.segments)
    if mask is not None and length == 1 and not is_padded and bool(mask.all()):  # asked by a dense model too
        mask = None
    held, segments = [], []
    for i, first in enumerate(starts):
        former = Segment(first, None, None) if past is None else past.segments[i].on(device)
        known = 0 if past is None else past.lengths[i]
        held.append(seen if past is None else cache.get_seq_length(first))
        known_seen = 0 if past is None else past.seen
        text = None if mask is None or seen == known_seen else mask[:, known_seen:seen]
        segments.append(Segment(first, extended(former.valid, known, text, held[i] - known, tokens), former.shift))
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(seen, seen + length, device=device).unsqueeze(0)
    elif positions.shape[-1] != length:
        raise UnsupportedModelError(
            f"position_ids of {positions.shape[-1]} tokens for {length} that came in: a pruned model cannot tell whose "
            "they are. Pass those of the new tokens, as generate does"
        )
    positions = positions.to(device).expand(*positions.shape[:-2], batch, -1)
    valid = None if mask is None else mask[:, -length:]
    slots = torch.arange(length, device=device).expand(batch, -1)
    shift = segments[0].shift
    view = View(
        slots=slots,
        take=slots,
        columns=None,
        valid=valid,
        positions=positions if shift is None else positions - shift,
        renumbered=False,
        shift=shift,
        key_valid=extended(segments[0].valid, held[0], valid, length, tokens),
    )
    return Forward(decoder, starts, view, held, segments, seen, cache)


def with_images(
    decoder: Any, starts: list[int], embeds: Tensor, kwargs: dict[str, Any], past: Any, images: Images
) -> tuple[Forward, Tensor, dict[str, Any]]:
    """(the forward, the tokens (B, L, D) that enter the first layer, other arguments): what leaves has left."""
    state = decoder.token_prune
    side_inputs = images.family.take_side_inputs(images.inner, kwargs)
    use_cache = decoder.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
    packed = read_packed(kwargs, given_cache(kwargs), use_cache, embeds)
    kwargs = unpacked_arguments(packed, kwargs)
    if packed is not None:
        embeds, images = packed.unpack(embeds), images.unpacked(packed)
        side_inputs = None if side_inputs is None else side_inputs.unpacked(packed)
    forward = begin(decoder, starts, embeds, kwargs, past)
    forward.stages = {stage.layer: stage for stage in state.stages if stage.layer >= 0}
    forward.recorders, forward.packed, forward.proposed = tuple(state.recorders), packed, images.proposed
    forward.placeholders = images.mask.to(embeds.device)
    tokens = let_leave(forward, embeds, images, state)
    check_recurrent(decoder, forward)
    forward.side_inputs = None if side_inputs is None else side_inputs.of(forward.views[0].slots)
    return forward, tokens, {**kwargs, "inputs_embeds": tokens}


def later_views(forward: Forward, view: View) -> list[View]:
    """Views of the other segments when nothing leaves: the same tokens, with other keys before them."""
    base = 0 if view.shift is None else view.shift
    views = []
    for segment, held in zip(forward.past[1:], forward.held[1:], strict=True):
        moved = segment.shift is not None or view.shift is not None
        positions = view.positions + base - (0 if segment.shift is None else segment.shift)
        key_valid = extended(segment.valid, held, view.valid, view.slots.shape[1], view.slots)
        views.append(replace(view, positions=positions, renumbered=moved, shift=segment.shift, key_valid=key_valid))
    return views


def let_leave(forward: Forward, embeds: Tensor, images: Images, state: Any) -> Tensor:
    """Take out what leaves before the first layer: (B, T, D) -> (B, L, D)."""
    stages = {stage.where: stage for stage in state.stages if stage.layer < 0}
    tower: Stage | None = stages.get("vision_tower")
    everything = forward.views[0]
    marks = read_marks(everything.valid, embeds, images, tower is not None)
    newline = NEWLINE if state.stages[0].newlines == "protect" else IMAGE if tower is None else DROPPED
    with_frames = any(stage.videos_only for stage in state.stages)
    told: list[ImageTokens] = []

    def tell(number: int, runs: tuple[int, ...]) -> list[ImageTokens]:
        found = images.tell(number, runs, with_newlines=newline != IMAGE, with_frames=with_frames)
        told.extend(found)
        return found

    kinds, forward.layout = read_layout(marks, tell, newline)
    if tower is not None:
        check_marks(tower, told, forward.layout)
    if len(forward.layout.tail) > 1 or forward.proposed > forward.layout.tail[0]:
        forward.proposed = 0  # candidates are text behind the last image of the one prompt there is
    if forward.recorders:
        forward.image_rank = images.mask.long().cumsum(1) - 1
    for recorder in forward.recorders:
        recorder.on_start()
    if min(forward.layout.lengths) == kinds.shape[1]:
        everything.valid = None
        everything.key_valid = extended(forward.past[0].valid, forward.held[0], None, kinds.shape[1], kinds)
    if tower is not None or not forward.layout.aligned:
        forward.views = [forward.leave((kinds != PADDING) & (kinds != DROPPED), tower)]
    tokens = embeds if forward.views[0] is everything else forward.views[0].taken(embeds)
    if (stage := stages.get("entrance")) is not None:
        if stage.text_rows is not None:
            special = moved(images.special, tokens.device) if stage.text_rows.rows == "question" else None
            forward.text = forward.find_text(stage, special)
        forward.views = [forward.select(stage, tokens.detach())]
        tokens = forward.views[0].taken(tokens)
    forward.originals = forward.layout.images
    for stage in forward.stages.values():
        if "text_scores" in stage.needs and forward.text_scores is None:
            forward.rate_text(stage, tokens.detach())
    return tokens


def read_marks(valid: Tensor | None, embeds: Tensor, images: Images, in_tower: bool) -> Tensor:
    """(B, T) uint8 as ``read_layout`` takes them; ``in_tower``: tokens may have left there."""
    marks = images.kinds.to(embeds.device)
    if in_tower:
        marks = marks + GONE * (images.mask & embeds[..., 0].isnan())
    return marks if valid is None else marks + PAD * ~valid


def check_marks(tower: Stage, told: list[ImageTokens], layout: Layout) -> None:
    """Raise PruneStateError where no image has lost anything in the tower although one is long enough to, or an image
    has lost all."""
    if any(0 in images for images in layout.images):
        raise PruneStateError(
            "an image has no token left behind the vision tower: its features are NaN, as where half precision "
            "overflows or pixel_values are not finite. Load the model in bfloat16 or float32, or check the pixels"
        )
    whole = sum(image.length - len(image.newlines) for image in told)
    parts = {image.length // image.parts for image in told}
    if sum(map(sum, layout.images)) == whole and any(tower.num_kept(length) < length for length in parts):
        raise PruneStateError(
            f"the vision tower dropped nothing, so {tower.title} had no effect: were the image features "
            "made by another model, or with another vision_feature_layer than the model's config names?"
        )
