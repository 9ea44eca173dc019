"""LLaVA 1.5 and its kind: an image has as many tokens as its vision tower has patches."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...registry import register_adapter
from ...signals import ModelShape
from .._sizes import in_rows
from .._views import ImageView, raster
from ._adapter import DecoderAdapter
from ._images import GivenImages, ImageTokens, by_tower, encoded, is_alone
from ._short import BREAKS


@register_adapter("llava")
class LlavaAdapter(DecoderAdapter):
    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        tower = self.tower_shape(model, image_size)
        first = model.config.vision_feature_select_strategy == "default"  # drops the first, CLS token or not
        return 1, tower.num_patches + tower.has_cls - first, 0

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        if not takes_any_size(inner.vision_tower):
            return given.as_encoded(is_one=given.as_one and given.total == self.image_tokens(inner, None)[1])
        sizes, side = given.image_sizes, inner.vision_tower.patch_size
        if sizes is None:
            output = encoded(given.call).get(given.kind)
            if output is not None and by_tower(output) and is_alone(output.pooler_output):
                raise UnsupportedModelError(UNSIZED)
            return given.as_encoded()
        return [ImageTokens((height // side) * (width // side)) for height, width in sizes]

    def no_short_prompts(self, model: PreTrainedModel) -> str:
        return BREAKS if takes_any_size(self.tower(self.inner(model))) else ""

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        tower = self.tower(self.inner(model))
        if not takes_any_size(tower):
            return super().views(model, inputs, size)
        height, width = inputs["image_sizes"][0].tolist()
        return [ImageView(raster((height // tower.patch_size, width // tower.patch_size)))]

    def tower_shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        tower = super().tower_shape(model, image_size)
        if image_size is None or not takes_any_size(self.tower(self.inner(model))):
            return tower
        return replace(tower, image_size=in_rows(image_size, tower.image_size, tower.patch_size[0]))

    def image_inputs(
        self, model: PreTrainedModel, image_size: tuple[int, int] | None, placeholders: Tensor, generator: Generator
    ) -> dict[str, Tensor]:
        inputs = super().image_inputs(model, image_size, placeholders, generator)
        if takes_any_size(self.tower(self.inner(model))):
            sides = self.tower_shape(model, image_size).image_size
            inputs["image_sizes"] = torch.tensor([sides] * len(placeholders))
        return inputs


UNSIZED = (
    "image features of a vision tower that was given no image_sizes: it then encodes images as one, however many there "
    "are. Pass image_sizes with pixel_values, as the processor of this model makes them"
)


def takes_any_size(tower: Any) -> bool:
    """Whether images of several sizes are encoded together, and ``image_sizes`` tell them apart."""
    return bool(tower.config.model_type == "pixtral")
