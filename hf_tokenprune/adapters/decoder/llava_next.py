"""LLaVA-NeXT (1.6): an image is a whole and crops of it, unpadded, with a newline token behind every row of patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ...errors import UnsupportedModelError
from ...registry import register_adapter
from .._views import ImageView, raster
from ._adapter import DecoderAdapter
from ._images import GivenImages, ImageTokens


@register_adapter("llava_next")
class LlavaNextAdapter(DecoderAdapter):
    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        sizes, features = given.image_sizes, given.features
        if given.kind != "image" or (sizes is None and not given.with_newlines and not given.as_one):
            return given.as_encoded()
        if sizes is None:  # encoded before the forward, to which generate then gives no sizes
            assert features is not None
            encoded = given.as_encoded(is_one=given.as_one and self.is_one(inner, features[0]))
            return with_newlines(features) if given.with_newlines else encoded
        crops = self.num_crops(inner, sizes, given)
        return [self.packed(inner, *image) for image in zip(sizes, crops, strict=True)]

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        """The whole, and its crops as one: both are of the whole image, without filling."""
        inner, sizes = self.inner(model), inputs["image_sizes"].tolist()
        (crops,) = self.num_crops(inner, sizes, GivenImages("image", (), inputs, with_newlines=True))
        image, grid = self.packed(inner, sizes[0], crops), self.token_grid(model)
        first = grid[0] * grid[1]
        columns, rows = image.newlines[0] - first, len(image.newlines)
        whole, details = ImageView(raster(grid)), raster((rows, columns + 1), first)[:, :-1]  # a newline ends each row
        return [whole, ImageView(details)] if columns else [whole]

    def num_crops(self, inner: Any, sizes: list[list[int]], given: GivenImages) -> list[int]:
        """Of each image of ``sizes`` (height, width) pixels, what the tower encodes: the whole, and crops."""
        config = inner.config
        pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
        return [image_size_to_num_patches(size, pinpoints, side) for size in sizes]

    def is_one(self, inner: Any, features: Tensor) -> bool:
        """Whether ``features`` (N, D) are of one image: the whole, and rows of one length with a newline each."""
        config = inner.config.vision_config
        of_whole, length = (config.image_size // config.patch_size) ** 2, len(features)
        newlines: list[int] = like_the_last(features).nonzero().flatten().tolist()
        step = newlines[1] - newlines[0] if len(newlines) > 1 else length - of_whole
        return length > of_whole and newlines == list(range(of_whole + step - 1, length, step))

    def packed(self, inner: Any, size: list[int], num_crops: int) -> ImageTokens:
        """One image of ``size`` (height, width) pixels as the stock model packs it: 0 for a patch, 1 for a newline."""
        config = inner.config.vision_config
        patches = torch.zeros(num_crops, (config.image_size // config.patch_size) ** 2, 1, device="cpu")
        (marks,), _ = self.pack(inner, [patches], [size], torch.ones(1, device="cpu"))
        return ImageTokens(len(marks), tuple(marks.flatten().nonzero().flatten().tolist()))

    def pack(self, inner: Any, features: list[Tensor], sizes: list[list[int]], newline: Tensor) -> tuple[Any, Any]:
        """What the stock model does with features (crops, patches, D) of each image."""
        made: tuple[Any, Any] = inner.pack_image_features(features, sizes, "full", image_newline=newline)
        return made

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        size = list(image_size or usual_size(model))
        side = model.config.vision_config.image_size
        crops = image_size_to_num_patches(size, model.config.image_grid_pinpoints, side)
        image = self.packed(self.inner(model), size, crops)
        return crops, image.length, len(image.newlines)

    def image_inputs(
        self, model: PreTrainedModel, image_size: tuple[int, int] | None, placeholders: Tensor, generator: Generator
    ) -> dict[str, Tensor]:
        inputs = super().image_inputs(model, image_size, placeholders, generator)
        return {
            "pixel_values": inputs["pixel_values"].unflatten(0, (len(placeholders), -1)),
            "image_sizes": torch.tensor([image_size or usual_size(model)] * len(placeholders)),
        }


def usual_size(model: PreTrainedModel) -> tuple[int, int]:
    """(height, width) in pixels of an image of two rows and columns of crops, the commonest grid."""
    side = model.config.vision_config.image_size
    return 2 * side, 2 * side


def like_the_last(features: Tensor) -> Tensor:
    """(N,) bool: which of ``features`` (N, D) are the last one's equals, bit for bit."""
    return (features == features[-1]).all(-1)


def with_newlines(features: Sequence[Tensor]) -> list[ImageTokens]:
    """The images whose packed features (N, D) these are.

    The last token of an image is a newline, wherever the features came from and whatever their dtype; the others repeat
    it bit for bit, at equal distances.

    Raises:
        UnsupportedModelError: the distances differ.
    """
    repeated = torch.cat([like_the_last(packed) for packed in features]).cpu()
    images = []
    for found in repeated.split([len(packed) for packed in features]):
        newlines: list[int] = found.nonzero().flatten().tolist()
        if len({behind - before for before, behind in pairwise(newlines)}) > 1:
            raise UnsupportedModelError(
                f"image features with what may be newlines at {newlines}: expected one behind every row of patches. "
                "Pass image_sizes with the features, or let this model encode the images"
            )
        images.append(ImageTokens(len(found), tuple(newlines)))
    return images
