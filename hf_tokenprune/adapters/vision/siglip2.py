"""SigLIP 2's vision tower, for images that fill its patches: the blocks of SigLIP with images of any aspect ratio."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2EncoderLayer,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2VisionModel,
)

from ...registry import register_adapter
from .._views import ImageView, raster
from ._block import require
from .clip import CLIPHalves
from .siglip import SiglipAdapter


class PrunedSiglip2EncoderLayer(CLIPHalves, Siglip2EncoderLayer):
    stock_class = Siglip2EncoderLayer


PrunedSiglip2EncoderLayer.__name__ = Siglip2EncoderLayer.__name__


PADDED = (
    "pixel_attention_mask has padding, and a pruned SigLIP 2 takes images that fill their patches; resize them to one "
    "shape and set max_num_patches of the image processor to its number of patches, or call unprune(model)"
)


class WholeImages:
    """Forward pre-hook: a mask without padding is left out, because it is as long as all patches together."""

    def __call__(self, encoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = given.get("pixel_attention_mask")
        if mask is not None:
            require(mask == 1, PADDED)
        return (), {**given, "pixel_attention_mask": None}


@register_adapter("siglip2")
@register_adapter("siglip2_vision_model")
class Siglip2Adapter(SiglipAdapter):
    block_class: ClassVar = PrunedSiglip2EncoderLayer
    full_grid_heads: ClassVar = {Siglip2ForImageClassification: "it averages patches under the mask of the whole image"}
    restored_heads: ClassVar = (Siglip2ForImageClassification,)
    pooling_heads: ClassVar = (Siglip2Model, Siglip2VisionModel)
    encoder_hooks: ClassVar = (WholeImages(),)
    no_graph: ClassVar = (
        "it interpolates positions image by image, so that a graph would be of one batch size; take a SigLIP of fixed "
        "size, or torch.compile"
    )

    def image_inputs(self, model: PreTrainedModel, pixels: Tensor) -> dict[str, Any]:
        side: int = self.encoder(model).config.patch_size
        patches = pixels.unfold(2, side, side).unfold(3, side, side)  # (B, C, rows, columns, side, side)
        batch, _, rows, columns, _, _ = patches.shape
        return {
            "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2),
            "pixel_attention_mask": torch.ones(batch, rows * columns, dtype=torch.int64, device=pixels.device),
            "spatial_shapes": torch.tensor([[rows, columns]] * batch, device=pixels.device),
        }

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        rows, columns = inputs["spatial_shapes"][0].tolist()
        return [ImageView(raster((rows, columns)))]

    def image_size(self, tower: PreTrainedModel) -> tuple[int, int]:
        config: Any = tower.config  # as a square: it names the number of patches only
        side = math.isqrt(config.num_patches) * config.patch_size
        return side, side
