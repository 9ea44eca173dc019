"""Idefics3 and SmolVLM: an image is cut into tiles of equal size, with text between them that says which is where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...registry import register_adapter
from .._views import ImageView, arrangement, raster, tiled
from ._adapter import DecoderAdapter
from ._images import PIECES, GivenImages, ImageTokens, is_token
from ._tower import Squares

TILES_A_SIDE = 4
"""Of the longer side of any image: what processors scale it to, unless told otherwise; models do not know."""


@register_adapter("idefics3")
class Idefics3Adapter(DecoderAdapter):
    decoder_name = "text_model"
    tower_name = "vision_model"
    connector_name = "connector.modality_projection"
    tile_option = "do_image_splitting=False"

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        """An image ends with a tile that shows the whole of it.

        Every prompt's last tile is such a one, so the token in front of it is that in front of all of them.

        Raises:
            UnsupportedModelError: a piece of a prompt, whose last tile may be any.
        """
        if given.as_one:
            raise UnsupportedModelError(PIECES)
        ids = given.call.get("input_ids")
        tokens: Tensor = given.call["inputs_embeds"] if ids is None else ids
        places = is_token(inner, tokens, inner.config.image_token_id).flatten().nonzero().flatten()
        in_front = tokens.flatten(0, 1)[places[[0, *accumulate(given.runs[:-1])]] - 1]
        ends = (in_front == in_front[-1]).view(len(given.runs), -1).all(1).tolist()
        bounds = [0, *(number for number, is_last in enumerate(ends, start=1) if is_last)]  # of images, in tiles
        return [ImageTokens(sum(given.runs[start:end]), parts=end - start) for start, end in pairwise(bounds)]

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        short, long = sorted(image_size or (1, 1))
        tiles = TILES_A_SIDE * math.ceil(TILES_A_SIDE * short / long) + 1  # the last one is the whole
        return tiles, tiles * self.inner(model).image_seq_len, 0

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        """The tiles as one, and the whole behind them."""
        grid, tiles = self.token_grid(model), inputs["pixel_values"].shape[1] - 1
        whole = ImageView(raster(grid, tiles * grid[0] * grid[1]))
        return [ImageView(tiled(arrangement(tiles, size), grid)), whole] if tiles else [whole]

    def squares(self, model: PreTrainedModel) -> Squares:
        return Squares(model.config.scale_factor)

    def feature_layer(self, model: PreTrainedModel) -> None:
        return None

    def image_inputs(
        self, model: PreTrainedModel, image_size: tuple[int, int] | None, placeholders: Tensor, generator: Generator
    ) -> dict[str, Tensor]:
        inputs = super().image_inputs(model, image_size, placeholders, generator)
        pixels = inputs["pixel_values"].unflatten(0, (len(placeholders), -1))
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).long()}
