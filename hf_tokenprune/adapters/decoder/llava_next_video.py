"""LLaVA-NeXT-Video: LLaVA-NeXT for images; frames of a video are pooled, and are image tokens like any other."""

from typing import Any, ClassVar

from ...registry import register_adapter
from ._frames import in_frames
from ._images import GivenImages, ImageTokens
from .llava_next import LlavaNextAdapter


@register_adapter("llava_next_video")
class LlavaNextVideoAdapter(LlavaNextAdapter):
    placeholders: ClassVar = {"image": "image_token_id", "video": "video_token_id"}
    no_videos = ""
    tower_grid = "frames of a video are pooled over neighbouring patches, so all of them have to be there"

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        images = super().images(inner, given)
        if given.kind != "video" or not given.with_frames:
            return images
        config = inner.config
        side = config.vision_config.image_size // config.vision_config.patch_size // config.spatial_pool_stride
        return [in_frames(video, side**2) for video in images]
