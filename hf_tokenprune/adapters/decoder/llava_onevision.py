"""LLaVA-OneVision: crops like LLaVA-NeXT, scaled down where they are many; frames of a video are pooled."""

import math
from typing import ClassVar

from transformers import PreTrainedModel

from ...registry import register_adapter
from .llava_next import LlavaNextAdapter


@register_adapter("llava_onevision")
class LlavaOnevisionAdapter(LlavaNextAdapter):
    placeholders: ClassVar = {"image": "image_token_id", "video": "video_token_id"}
    tower_grid = "patches are pooled and interpolated between their neighbours, so all of them have to be there"

    def scaled_down(self, model: PreTrainedModel, height: int, width: int) -> tuple[int, int]:
        patches = model.config.vision_config.image_size // model.config.vision_config.patch_size
        most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * patches**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)
