"""Whose the placeholders of a batch are. A family tells how many tokens each image has and which of them are newlines.

Placeholders stand for images one behind the other, so these numbers are all there is to know: images may touch, and
other tokens may cut one into rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...signals import Stage
from ._cache import PrunedDynamicCache, check_cache, given_cache
from ._packed import Packed
from ._side_inputs import SideInputs

ARGUMENT = "token_prune"
"""Keyword argument in which the forward travels from hook to layers to hook; so no state is on the module."""
PROPOSED = "token_prune_proposed"
"""Keyword argument from hook to hook: tokens at the end that are candidates."""

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Arguments with what is yet to be encoded, by kind of visual input."""

FEATURES = "image_hidden_states"
"""Argument with features of images alone, in families and versions that have it."""


@dataclass(frozen=True)
class ImageTokens:
    """What stands in the prompt for one image, or for one video.

    Attributes:
        length: its tokens, newlines among them.
        newlines: which of these are newlines, counted from 0, ascending.
        parts: in how many parts of equal length the tower encodes it, where its length does not say: frames.
        frames: of a video, in which all but its newlines are equally many tokens each; 0: an image, or nobody asks.
    """

    length: int
    newlines: tuple[int, ...] = ()
    parts: int = 1
    frames: int = 0


@dataclass(frozen=True)
class GivenImages:
    """What a forward is given of one kind of visual input: all that a family tells its images from.

    Attributes:
        kind: "image" or "video"; a key of the family's ``placeholders``.
        runs: how many placeholders stand together, one run after the other, sample by sample.
        call: keyword arguments of the forward: pixel_values, image_sizes, ...
        with_newlines: False: nobody asks which tokens are newlines.
        with_frames: False: nobody asks of how many frames a video is.
        as_one: the features may be those of several whole images, put together by ``generate``.
    """

    kind: str
    runs: tuple[int, ...]
    call: Mapping[str, Any]
    with_newlines: bool
    with_frames: bool = False
    as_one: bool = False

    @property
    def total(self) -> int:
        """Placeholders in the whole batch."""
        return sum(self.runs)

    @property
    def features(self) -> Sequence[Tensor] | None:
        """(..., D) of each image, where they were encoded before the forward."""
        output = encoded(self.call).get(self.kind)
        return None if output is None else output.pooler_output

    @property
    def image_sizes(self) -> list[list[int]] | None:
        """(height, width) in pixels of each image, where the forward is told."""
        sizes = self.call.get("image_sizes")
        if sizes is None or isinstance(sizes, Tensor):
            return None if sizes is None else sizes.tolist()
        return [torch.as_tensor(size).tolist() for size in sizes]

    def as_encoded(self, is_one: bool = False) -> list[ImageTokens]:
        """Images as long as their features; of one length where pixels of one size are yet to be encoded.

        Args:
            is_one: what the family knows of features that came ``as_one``: that they are of one image.

        Raises:
            UnsupportedModelError: there are neither, or placeholders that are no multiple of the images; or features
                that may be of several images.
        """
        if self.as_one and not is_one:
            raise UnsupportedModelError(PIECES)
        features = self.features
        if features is not None:
            lengths = [feature.shape[:-1].numel() for feature in features]
            if sum(lengths) == self.total:
                return [ImageTokens(length) for length in lengths]
        pixels = self.call.get(PIXELS[self.kind]) if features is None else features
        if pixels is None:
            raise UnsupportedModelError(without_pixels(self.kind))
        if not len(pixels) or self.total % len(pixels):
            raise UnsupportedModelError(
                f"{self.total} {self.kind} placeholders for {len(pixels)} {self.kind}s: they cannot have equally many. "
                "Use the processor of this model, or unprune(model)"
            )
        return [ImageTokens(self.total // len(pixels))] * len(pixels)


class Family(Protocol):
    """The part of an adapter that a forward asks."""

    placeholders: ClassVar[dict[str, str]]

    def take_side_inputs(self, inner: Any, call: dict[str, Any]) -> SideInputs | None: ...

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]: ...

    def states(self, model: Any) -> Sequence[Any]: ...


@dataclass
class Images:
    """The placeholders of one forward.

    Attributes:
        kinds: (B, T) uint8: 0 no placeholder, n one of the nth kind of the family.
        family, inner, call: whose images they are, and what the model around the language model was called with.
        proposed: how many tokens at the end are candidates of assisted decoding.
    """

    kinds: Tensor
    family: Family
    inner: Any
    call: Mapping[str, Any]
    proposed: int = 0

    @property
    def mask(self) -> Tensor:
        """(B, T) bool: placeholders."""
        return self.kinds > 0

    @property
    def special(self) -> Tensor | None:
        """(B, T) bool: tokens that the model's config gives a meaning of their own, such as those that end a turn.

        None: the model was called with embeddings.
        """
        ids: Tensor | None = self.call["input_ids"]
        return None if ids is None else torch.isin(ids, torch.tensor(special_ids(self.inner.config), device=ids.device))

    def unpacked(self, packed: Packed) -> Images:
        """The same for samples that have a row each."""
        ids = self.call["input_ids"]
        ids = None if ids is None else packed.unpack(ids)
        call = {**self.call, "input_ids": ids, "position_ids": None}  # these are of the rows that came in
        return replace(self, kinds=packed.unpack(self.kinds) * packed.valid, call=call)

    def tell(self, number: int, runs: tuple[int, ...], with_newlines: bool, with_frames: bool) -> list[ImageTokens]:
        """The images of the ``number``-th kind, whose placeholders stand in ``runs``.

        Raises:
            UnsupportedModelError: they need more or fewer placeholders.
        """
        kind = list(self.family.placeholders)[number - 1]
        given = GivenImages(kind, runs, self.call, with_newlines, with_frames, may_be_a_piece(self.call, kind))
        images = self.family.images(self.inner, given)
        lengths = [image.length for image in images]
        if sum(lengths) != given.total:
            raise UnsupportedModelError(
                f"{given.total} {kind} placeholders for {kind}s of {lengths} tokens: a pruned model cannot tell whose "
                "they are. Use the processor of this model, or unprune(model)"
            )
        return images


@dataclass
class FindImages:
    """Forward pre-hook of the model around the language model: sends ``Images`` along, if there are any."""

    family: Family

    @torch.compiler.disable  # see EnterDecoder
    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        proposed = kwargs.pop(PROPOSED, 0)
        input_ids = args[0] if args else kwargs.get("input_ids")
        kinds = self.placeholders(module, input_ids, kwargs)
        if not proposed:
            self.warn_of_turn(module, input_ids, kwargs)
        if kinds is None:
            return args, {**kwargs, ARGUMENT: None}
        check_inputs(kwargs)  # before stock code reads positions from the mask
        if not given_kinds(kwargs):
            raise UnsupportedModelError(without_pixels("image"))
        if any(may_be_a_piece(kwargs, kind) for kind in PIXELS) and not self.fits_pieces(module, kinds):
            raise UnsupportedModelError(PIECES)
        call = {**kwargs, "input_ids": input_ids}
        return args, {**kwargs, ARGUMENT: Images(kinds, self.family, module, call, proposed)}

    def fits_pieces(self, module: Any, kinds: Tensor) -> bool:
        """Whether a piece of a prompt with these placeholders (B, T) may be pruned before the others are there.

        Its images must be whole: where one is cut, a placeholder is the last token. And what stays of an image must not
        depend on what stands around it.
        """
        alone = all(stage.budget == "image" and not stage.reads_question for stage in self.stages(module))
        return alone and not bool((kinds[:, -1] > 0).any())

    def stages(self, module: Any) -> list[Stage]:
        """Those of the language model of ``module``, in order."""
        return [stage for state in self.family.states(module) for stage in state.stages]

    def warn_of_turn(self, module: Any, input_ids: Tensor | None, kwargs: dict[str, Any]) -> None:
        """Say where a turn comes behind image tokens that were chosen for the question of a former one."""
        tokens = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        cache = given_cache(kwargs)
        if tokens is None or not isinstance(cache, PrunedDynamicCache) or is_decode_step(tokens, cache):
            return
        if readers := [stage.title for stage in self.stages(module) if stage.reads_question]:
            warnings.warn(
                f"{', '.join(dict.fromkeys(readers))} chose image tokens by the question of the first turn, and the "
                "cache holds only those: later questions may need others. Start each question with a new cache, or use "
                "a method that does not read it, such as divprune",
                stacklevel=2,
            )

    def placeholders(self, module: Any, input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """(B, T) uint8 as in ``Images``; None: no image in this input."""
        cache = given_cache(kwargs)
        embeds = kwargs.get("inputs_embeds")
        given = input_ids if input_ids is not None else embeds
        if given is None or is_decode_step(given, cache):
            if any(output is not None for output in encoded(kwargs).values()):
                raise UnsupportedModelError(PIECES)
            return None  # asking the device would stall it
        kinds = torch.zeros(given.shape[:2], dtype=torch.uint8, device=given.device)
        # Asked of the config each time, as the dense model does: a tokenizer may get its image token late.
        ids = {name: getattr(module.config, name) for name in self.family.placeholders.values()}
        for number, token in enumerate(ids.values(), start=1):
            kinds.masked_fill_(is_token(module, given, token), number)
        if bool(kinds.any()):
            return kinds
        if input_ids is None:
            raise UnsupportedModelError(
                "inputs_embeds without image placeholders: a pruned model cannot tell which embeddings are of an "
                "image. Pass input_ids and pixel_values, or unprune(model)"
            )
        if came := given_kinds(kwargs):
            raise UnsupportedModelError(
                f"{' and '.join(came)} features or pixels, but input_ids has none of the placeholders "
                f"{', '.join(f'{name}={token}' for name, token in ids.items())} of model.config: set the id that the "
                "tokenizer uses; with a kept cache pass only images that are new"
            )
        return None


def special_ids(config: Any) -> list[int]:
    """Ids that fields of a model's config are called after: ``eos_token_id``, ``image_token_id``, ..."""
    found: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if name.endswith("_token_id"):
                found.update(ids for ids in (value if isinstance(value, (list, tuple)) else [value]) if ids is not None)
    return sorted(found)


def check_inputs(call: dict[str, Any]) -> None:
    """Raise UnsupportedModelError where the cache cannot hold layers of different tokens, or the mask not tell them."""
    check_cache(given_cache(call))
    attention_mask = call.get("attention_mask")
    if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
        raise UnsupportedModelError(
            "a pruned model takes a (batch, length) attention_mask with an image, not one for every query: it has to "
            "make masks of several lengths. Pass that of the processor, or unprune(model)"
        )


def is_token(module: Any, tokens: Tensor, token: int) -> Tensor:
    """(B, T) bool: which of ``tokens``, ids (B, T) or embeddings (B, T, D), are the one with this id."""
    if tokens.dim() == 2:
        return tokens == token
    found: Tensor = (tokens == module.get_input_embeddings()(torch.tensor(token, device=tokens.device))).all(-1)
    return found


def is_decode_step(tokens: Tensor, cache: Any) -> bool:
    """Whether (B, T, ...) ``tokens`` are one a sample, behind others: then there is no image among them."""
    return tokens.shape[1] == 1 and cache is not None and bool(cache.get_seq_length())


def encoded(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Outputs of the vision tower by kind, where ``generate`` or the caller encoded before the forward."""
    return call.get("mm_encoder_outputs") or {}


def given_kinds(call: Mapping[str, Any]) -> list[str]:
    """Kinds of visual input that a forward is given something of."""
    kinds = [
        kind
        for kind, name in PIXELS.items()
        if encoded(call).get(kind) is not None or (call.get(name) is not None and len(call[name]))
    ]
    return ["image"] if not kinds and call.get(FEATURES) is not None else kinds


def may_be_a_piece(call: Mapping[str, Any], kind: str) -> bool:
    """Whether features may be those of a piece of a prompt, which ``generate`` makes of it with prefill_chunk_size.

    Then there is a cache, and of the features only ``pooler_output``: a list, or a batch, of one, which holds those of
    all placeholders in the piece. A caller's own features of one image look the same.
    """
    output = encoded(call).get(kind)
    if output is None or given_cache(dict(call)) is None or by_tower(output):
        return False
    return is_alone(output.pooler_output)


def is_alone(features: Sequence[Tensor]) -> bool:
    """Whether these are a list, or a batch, of one: not the tuple of a tower that told its images apart."""
    return not isinstance(features, tuple) and len(features) == 1


def by_tower(output: Any) -> bool:
    """Whether this is all that a vision tower returned, and not features alone."""
    return any(getattr(output, name, None) is not None for name in ("last_hidden_state", "hidden_states"))


def without_pixels(kind: str) -> str:
    return (
        f"the input has {kind} placeholders but no {PIXELS[kind]}: a pruned model cannot tell their features. Pass "
        "them. Prefill in chunks is not supported: leave prefill_chunk_size out, or unprune(model). generate gives an "
        "assistant_model no images: unprune(assistant_model)"
    )


PIECES = (
    "features with pooler_output alone, as a list or batch of one, and a cache: so come the pieces of a prompt that "
    "generate cuts with prefill_chunk_size. They may be of a part of an image, of several images, or lie in front of "
    "text that the method reads: leave prefill_chunk_size out, or unprune(model). If the features are your own and of "
    "one whole image, pass pooler_output as a tuple, or all that get_image_features returned"
)
