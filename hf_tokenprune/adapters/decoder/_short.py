"""Short prompts: an image has as many placeholders as tokens of it stay, and its features are those that were chosen.

All behind ``get_image_features`` is then the stock model: no hook, no gap in positions, one length in all layers.

Axes: I images, N tokens of an image, n kept, D width.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...signals import DecoderShape, Signals, Stage
from ...tokens import gather_tokens

OTHERWISE = "Use prune(model, config), which needs no other prompts"
BREAKS = "text stands between the rows of an image, and how many tokens stay in front of it depends on the image"


@dataclass(frozen=True)
class ShortLength:
    """How many tokens of an image stay, by how many there are: what a model and its processor have to agree on.

    Attributes:
        stages: in the order tokens pass them.
        protected: tokens of an image that a stage in the vision tower keeps beside those it counts.
        tile: the only number of tokens that an image may have; None: any.
        tile_option: what to tell the processor to have no other.
    """

    stages: tuple[Stage, ...]
    protected: int
    tile: int | None
    tile_option: str

    def __call__(self, length: int) -> int:
        """What stays of ``length`` tokens.

        Raises:
            UnsupportedModelError: the image is cut into tiles.
        """
        if self.tile is not None and length != self.tile:
            raise UnsupportedModelError(
                f"an image of {length} tokens, {self.tile} a tile: get_image_features is not told which tiles are of "
                f"one image. Call the processor with {self.tile_option}. {OTHERWISE}"
            )
        for stage in self.stages:
            length = self.behind(stage, length)
        return length

    def behind(self, stage: Stage, length: int) -> int:
        """What one stage leaves of the ``length`` tokens that enter it."""
        safe = self.protected if stage.where == "vision_tower" else 0
        return min(length, safe + stage.num_kept(length - safe))


@dataclass(eq=False)
class ShortFeatures:
    """Stands before ``get_image_features`` of the model around the language model: returns what stays of each image.

    An instance of an importable class that knows its model: it can be copied and pickled with it.
    """

    inner: Any
    length: ShortLength

    @property
    def stock(self) -> Any:
        return MethodType(type(self.inner).get_image_features, self.inner)

    @property
    def __signature__(self) -> inspect.Signature:  # by which generate knows what to encode images with
        return inspect.signature(self.stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.stock(*args, **{**kwargs, "return_dict": True})
        output.pooler_output = self.shortened(output.pooler_output)
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    def shortened(self, features: Tensor | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
        """Features (I, N, D), or (N, D) of each image or of all tiles of a sample, without the tokens that leave."""
        tile, of_length = self.length.tile, defaultdict(list)
        if tile and not isinstance(features, Tensor):
            tiles = [len(entry) // tile for entry in features]
            kept = self.chosen(torch.cat(tuple(features)).unflatten(0, (sum(tiles), tile)))
            return type(features)(piece.flatten(0, 1) for piece in kept.split(tiles))  # type: ignore[call-arg]
        images = list(features)
        for i, image in enumerate(images):
            of_length[len(image)].append(i)
        for members in of_length.values():
            kept = self.chosen(torch.stack([images[i] for i in members]))
            for i, states in zip(members, kept, strict=True):
                images[i] = states
        return torch.stack(images) if isinstance(features, Tensor) else type(features)(images)  # type: ignore[call-arg]

    def chosen(self, tokens: Tensor) -> Tensor:
        """(I, N, D) -> (I, n, D), in their order."""
        for stage in self.length.stages:
            n_keep = self.length.behind(stage, tokens.shape[1])
            if stage.where == "vision_tower":  # which has chosen: NaN is what leaves
                gone = tokens[..., 0].isnan().byte()
                tokens = gather_tokens(tokens, gone.argsort(dim=1, stable=True)[:, :n_keep])
            elif n_keep < tokens.shape[1]:
                seen = tokens.detach()
                with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
                    reduction = stage.reduce(Signals(seen, seen, num_protected=0, has_cls=False), n_keep)
                keep, order = reduction.keep.sort(dim=1)
                tokens = gather_tokens(*((tokens, keep) if reduction.tokens is None else (reduction.tokens, order)))
        return tokens


def check_short(model: PreTrainedModel, shape: DecoderShape, stages: tuple[Stage, ...]) -> None:
    """Raise UnsupportedModelError where what ``stages`` keep of an image does not follow from its size alone."""
    for stage in stages:
        reason = ""
        if stage.layer >= 0:
            reason = (
                f"{stage.title} makes tokens leave behind decoder layer {stage.layer}, up to where each needs a "
                "placeholder. Use a method that works in front of the decoder, such as divprune"
            )
        elif stage.reads_question:
            reason = (
                f"{stage.title} reads the question, which get_image_features is not given. Use a method that does not, "
                "such as divprune"
            )
        elif stage.videos_only:
            reason = f"they are of images, and {stage.title} prunes videos"
        elif stage.where == "entrance" and stage.budget == "sample":
            reason = (
                f"{stage.title} chooses among all images of a prompt, and get_image_features is not told whose they "
                "are. Set budget='image'"
            )
        elif stage.positions == "original":
            reason = "they have positions without gaps. Set positions='contiguous'"
        elif stage.newlines == "protect":
            reason = "a processor does not tell which tokens are newlines. Set newlines='prune'"
        elif stage.where == "vision_tower" and shape.newline_tokens:
            reason = (
                f"{stage.title} chooses in the vision tower, and {model.config.model_type!r} cuts padding off behind "
                "it, so how many stay depends on the image. Use a method that works at the entrance, such as divprune"
            )
        if reason:
            raise UnsupportedModelError(f"no short prompts: {reason}. {OTHERWISE}")
