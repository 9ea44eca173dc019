"""InternVL (2.5, 3, 3.5): an image is cut into tiles of equal size, which touch in the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from ...registry import register_adapter
from .._views import ImageView, raster, tiled
from ._adapter import DecoderAdapter
from ._images import GivenImages, ImageTokens
from ._tower import Squares

MOST_TILES = 12
"""Of an image: what processors cut it into at most, unless told otherwise; models do not know."""


@register_adapter("internvl")
class InternVLAdapter(DecoderAdapter):
    no_videos = "this family takes frames of a video as images of their own"
    tile_option = "crop_to_patches=False"

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        """An image is what stands between ``<img>`` and ``</img>``: all its tiles, or one frame of a video."""
        if given.as_one:  # whole images, by the way they come, but nothing tells their tiles
            return [ImageTokens(length) for length in given.runs]
        tiles = given.as_encoded()
        of_tile = tiles[0].length
        if any(length % of_tile for length in given.runs):
            return tiles  # which are then not together
        return [ImageTokens(length, parts=length // of_tile) for length in given.runs]

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        tower = self.tower_shape(model, image_size)
        height, width = tower.image_size
        columns, rows = get_optimal_tiled_canvas(image_size or (2 * height, 2 * width), (height, width), 1, MOST_TILES)
        tiles = columns * rows + (columns * rows > 1)  # several have a thumbnail of the whole behind them
        return tiles, tiles * tower.num_patches // self.squares(model).side ** 2, 0

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        """The tiles as one, and the thumbnail of the whole behind them."""
        grid, tiles = self.token_grid(model), len(inputs["pixel_values"]) - 1
        if not tiles:
            return [ImageView(raster(grid))]
        columns, rows = get_optimal_tiled_canvas(size, self.tower_shape(model, None).image_size, tiles, tiles)
        return [ImageView(tiled((rows, columns), grid)), ImageView(raster(grid, tiles * grid[0] * grid[1]))]

    def squares(self, model: PreTrainedModel) -> Squares:
        return Squares(round(1 / model.config.downsample_ratio))

    def feature_layer(self, model: PreTrainedModel) -> int | list[int] | None:
        layer = super().feature_layer(model)
        return None if layer == -1 else layer  # the last one has passed a norm
