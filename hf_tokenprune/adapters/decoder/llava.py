"""LLaVA 1.5 and its kind: an image has as many tokens as its vision tower has patches."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from ...registry import register_adapter
from ...signals import ModelShape
from ._adapter import DecoderAdapter
from ._images import GivenImages, ImageTokens


@register_adapter("llava")
class LlavaAdapter(DecoderAdapter):
    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        tower = self.tower_shape(model, image_size)
        first = model.config.vision_feature_select_strategy == "default"  # drops the first, CLS token or not
        return 1, tower.num_patches + tower.has_cls - first, 0

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        sizes = given.image_sizes
        if given.features is not None or sizes is None:
            return given.as_encoded()
        side = inner.vision_tower.patch_size  # a tower for images of any size: Pixtral
        return [ImageTokens((height // side) * (width // side)) for height, width in sizes]

    def tower_shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        tower = super().tower_shape(model, image_size)
        takes_any_size = self.tower(self.inner(model)).config.model_type == "pixtral"
        return replace(tower, image_size=image_size) if image_size is not None and takes_any_size else tower
