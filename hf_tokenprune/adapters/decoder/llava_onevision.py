"""LLaVA-OneVision: crops like LLaVA-NeXT, scaled down where they are many; frames of a video are pooled."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ...registry import register_adapter
from ._frames import in_frames
from ._images import GivenImages, ImageTokens
from .llava_next import LlavaNextAdapter, like_the_last


@register_adapter("llava_onevision")
class LlavaOnevisionAdapter(LlavaNextAdapter):
    placeholders: ClassVar = {"image": "image_token_id", "video": "video_token_id"}
    no_videos = ""
    tower_grid = "patches are pooled and interpolated between their neighbours, so all of them have to be there"

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        if given.kind != "video":
            return super().images(inner, given)
        features = given.features  # with one newline, behind the last frame
        is_one = features is not None and given.as_one and int(like_the_last(features[0]).sum()) == 1
        videos = [ImageTokens(video.length, (video.length - 1,)) for video in given.as_encoded(is_one)]
        if not given.with_frames:
            return videos
        patches = (inner.config.vision_config.image_size // inner.config.vision_config.patch_size) ** 2
        pooled = inner.apply_pooling(torch.zeros(1, patches, 1, device="cpu"))
        return [in_frames(video, pooled.shape[1]) for video in videos]

    def num_crops(self, inner: Any, sizes: list[list[int]], given: GivenImages) -> list[int]:
        crops = super().num_crops(inner, sizes, given)
        per_sample = given.call.get("batch_num_images")
        if per_sample is None:
            return crops
        alone = [number == 1 for number in torch.as_tensor(per_sample).tolist() for _ in range(number)]
        return [number if cropped else 1 for number, cropped in zip(crops, alone, strict=True)]

    def pack(self, inner: Any, features: list[Tensor], sizes: list[list[int]], newline: Tensor) -> tuple[Any, Any]:
        aspect = inner.config.vision_aspect_ratio
        made: tuple[Any, Any] = inner.pack_image_features(
            features, sizes, image_newline=newline, vision_aspect_ratio=aspect
        )
        return made
