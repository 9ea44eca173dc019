"""What a model is given, as a picture again."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor


def to_image(pixels: Tensor, processor: object | None = None) -> Image.Image:
    """(C, H, W) model input as a picture.

    Args:
        processor: its ``image_mean`` and ``image_std``, or those of its image processor, turn pixels back into colours;
            None: contrast is stretched.
    """
    pixels = pixels.detach().float().cpu()
    processor = getattr(processor, "image_processor", processor)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    else:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def crops(processor: Any, size: tuple[int, int]) -> bool:
    """Whether an image processor cuts something off an image of ``size`` (width, height)."""
    processor = getattr(processor, "image_processor", processor)
    if not getattr(processor, "do_center_crop", False):
        return False
    width, height = size
    if getattr(processor, "do_resize", False):
        to = processor.size
        if "shortest_edge" in to:
            width, height = (to["shortest_edge"] * side / min(size) for side in size)
        else:
            width, height = to["width"], to["height"]
    crop = processor.crop_size
    return int(width) > crop["width"] or int(height) > crop["height"]
