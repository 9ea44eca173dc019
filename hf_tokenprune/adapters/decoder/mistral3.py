"""Mistral 3 (Small 3.1 and later, Ministral 3): images of any size, with a text token behind every row of patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel
from transformers.models.ministral3.modeling_ministral3 import Ministral3DecoderLayer, get_llama_4_attn_scale

from ...registry import register_adapter
from ...signals import ModelShape
from .._sizes import in_rows
from .._views import ImageView, raster
from ._adapter import DecoderAdapter
from ._grids import USUAL_SIDE
from ._images import GivenImages, ImageTokens
from ._layer import PrunedDecoderLayer
from ._short import BREAKS
from ._tower import Squares


class PrunedMinistral3DecoderLayer(PrunedDecoderLayer, Ministral3DecoderLayer, text="ministral3"):
    always_slides = True
    reads_positions = True

    def query_scale(self, positions: Tensor) -> Tensor:
        attention: Any = self.self_attn
        rope = attention.config.rope_parameters
        beta, usual = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
        scale: Tensor = get_llama_4_attn_scale(positions, beta, usual)
        return scale


@register_adapter("mistral3")
class Mistral3Adapter(DecoderAdapter):
    tower_grid = "it attends to all images of a batch at once, as one sequence with a mask between them"

    def no_short_prompts(self, model: PreTrainedModel) -> str:
        return BREAKS

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        sizes = given.image_sizes
        if sizes is None:
            return given.as_encoded()
        side = token_side(inner)
        return [ImageTokens((height // side) * (width // side)) for height, width in sizes]

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        (height, width), side = inputs["image_sizes"][0].tolist(), token_side(self.inner(model))
        return [ImageView(raster((height // side, width // side)))]

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        height, width = self.tower_shape(model, image_size).image_size
        side = token_side(self.inner(model))
        return 1, (height // side) * (width // side), 0

    def squares(self, model: PreTrainedModel) -> Squares:
        return Squares(self.inner(model).config.spatial_merge_size)

    def image_inputs(
        self, model: PreTrainedModel, image_size: tuple[int, int] | None, placeholders: Tensor, generator: Generator
    ) -> dict[str, Tensor]:
        inputs = super().image_inputs(model, image_size, placeholders, generator)
        sizes = [self.tower_shape(model, image_size).image_size] * len(placeholders)
        return {**inputs, "image_sizes": torch.tensor(sizes)}

    def tower_shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        tower = super().tower_shape(model, image_size)
        side, largest = token_side(self.inner(model)), tower.image_size
        usual = min(USUAL_SIDE * side, *largest)
        return replace(tower, image_size=in_rows(image_size or (usual, usual), largest, side))


def token_side(inner: Any) -> int:
    """Pixels of an image that one token stands for, across and down."""
    side: int = inner.vision_tower.patch_size * inner.config.spatial_merge_size
    return side
