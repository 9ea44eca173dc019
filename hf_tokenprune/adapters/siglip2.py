"""SigLIP 2's vision tower, for images that fill its patches: the blocks of SigLIP with images of any aspect ratio."""

import math
from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.models.siglip2.modeling_siglip2 import Siglip2EncoderLayer, Siglip2ForImageClassification

from ..registry import register_adapter
from .clip import CLIPHalves
from .siglip import SiglipAdapter


class PrunedSiglip2EncoderLayer(CLIPHalves, Siglip2EncoderLayer):
    stock_class = Siglip2EncoderLayer


PrunedSiglip2EncoderLayer.__name__ = Siglip2EncoderLayer.__name__


@register_adapter("siglip2")
@register_adapter("siglip2_vision_model")
class Siglip2Adapter(SiglipAdapter):
    block_class: ClassVar = PrunedSiglip2EncoderLayer
    full_grid_heads: ClassVar = {Siglip2ForImageClassification: "it averages patches under the mask of the whole image"}
    restored_heads: ClassVar = (Siglip2ForImageClassification,)

    def image_size(self, tower: PreTrainedModel) -> tuple[int, int]:
        config: Any = tower.config  # as a square: it names the number of patches only
        side = math.isqrt(config.num_patches) * config.patch_size
        return side, side
