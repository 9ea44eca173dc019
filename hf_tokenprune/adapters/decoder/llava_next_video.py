"""LLaVA-NeXT-Video: LLaVA-NeXT for images; frames of a video are pooled, and are image tokens like any other."""

from typing import ClassVar

from ...registry import register_adapter
from .llava_next import LlavaNextAdapter


@register_adapter("llava_next_video")
class LlavaNextVideoAdapter(LlavaNextAdapter):
    placeholders: ClassVar = {"image": "image_token_id", "video": "video_token_id"}
    tower_grid = "frames of a video are pooled over neighbouring patches, so all of them have to be there"
