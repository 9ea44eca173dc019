"""Idefics3 and SmolVLM: an image is cut into tiles of equal size, with text between them that says which is where."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from ...registry import register_adapter
from ._adapter import DecoderAdapter
from ._images import GivenImages, ImageTokens

TILES_A_SIDE = 4
"""Of the longer side of any image: what processors scale it to, unless told otherwise; models do not know."""


@register_adapter("idefics3")
class Idefics3Adapter(DecoderAdapter):
    decoder_name = "text_model"
    tower_name = "vision_model"
    connector_name = "connector"
    tower_grid = "squares of patches are shuffled into one token, so all of them have to be there"

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        """Tiles: nothing but the words between them tells a model which of them are of one image."""
        length = inner.image_seq_len
        return [ImageTokens(length)] * (given.total // length)

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        short, long = sorted(image_size or (1, 1))
        tiles = TILES_A_SIDE * math.ceil(TILES_A_SIDE * short / long) + 1  # the last one is the whole
        return tiles, tiles * self.inner(model).image_seq_len, 0

    def image_inputs(
        self, model: PreTrainedModel, image_size: tuple[int, int] | None, placeholders: Tensor, generator: Generator
    ) -> dict[str, Tensor]:
        inputs = super().image_inputs(model, image_size, placeholders, generator)
        pixels = inputs["pixel_values"].unflatten(0, (len(placeholders), -1))
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).long()}
