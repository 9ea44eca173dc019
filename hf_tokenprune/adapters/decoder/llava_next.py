"""LLaVA-NeXT (1.6): an image is a whole and crops of it, unpadded, with a newline token behind every row of patches."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from ...registry import register_adapter
from .llava import LlavaFamilyAdapter


@register_adapter("llava_next")
class LlavaNextAdapter(LlavaFamilyAdapter):
    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        side = model.config.vision_config.image_size
        size = list(image_size or (2 * side, 2 * side))  # crops in two rows and columns, the commonest grid
        pinpoints = model.config.image_grid_pinpoints
        patches = side // model.config.vision_config.patch_size
        rows, columns = get_anyres_image_grid_shape(size, pinpoints, side)
        grid = torch.empty(1, rows * patches, columns * patches, device="meta")
        height, width = self.scaled_down(model, *unpad_image(grid, size).shape[1:])
        tokens = self.patch_tokens(model) + height * (width + 1)
        return image_size_to_num_patches(size, pinpoints, side), tokens, height

    def scaled_down(self, model: PreTrainedModel, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of the crops, as they come into the decoder."""
        return height, width
