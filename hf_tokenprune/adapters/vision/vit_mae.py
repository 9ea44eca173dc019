"""The encoder of ViT-MAE, for features of whole images: the ViT block under another name."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAELayer

from ...errors import UnsupportedModelError
from ...registry import register_adapter
from ...signals import Stage
from .._sizes import as_pair
from ._block import require
from .vit import ViTAdapter, ViTHalves


class PrunedViTMAELayer(ViTHalves, ViTMAELayer):
    stock_class = ViTMAELayer


PrunedViTMAELayer.__name__ = ViTMAELayer.__name__


def in_order(pixels: Tensor, patch_size: int | tuple[int, int] | list[int]) -> Tensor:
    """(B, N) noise that leaves the patches of images (B, C, H, W) in raster order."""
    height, width = as_pair(patch_size)
    num_patches = (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
    return torch.arange(num_patches, device=pixels.device).expand(pixels.shape[0], -1)


def check_whole_images(mask_ratio: float) -> None:
    """Raise UnsupportedModelError where patches are masked."""
    if mask_ratio:
        raise UnsupportedModelError(
            f"mask_ratio={mask_ratio}: the encoder sees a random part of the patches in random order; for features of "
            "whole images set model.config.mask_ratio = 0"
        )


class RasterOrder:
    """Forward pre-hook: patches stay in their order, as methods and records suppose, and are not shuffled or masked."""

    def __call__(self, encoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = ("pixel_values", "noise", "interpolate_pos_encoding", "attention_mask")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        config: Any = encoder.config
        check_whole_images(config.mask_ratio)  # it may have been set since
        noise = given.get("noise")
        if noise is None:
            noise = in_order(given["pixel_values"], config.patch_size)
        else:
            require(noise.diff(dim=1) > 0, "noise shuffles the patches; leave it out, or give an ascending one")
        return (), {**given, "noise": noise}


@register_adapter("vit_mae")
class ViTMAEAdapter(ViTAdapter):
    block_class = PrunedViTMAELayer
    full_grid_heads: ClassVar = {ViTMAEForPreTraining: "its decoder puts every visible patch back in its place"}
    protected_heads: ClassVar = ()
    encoder_hooks: ClassVar = (RasterOrder(),)

    def image_inputs(self, model: PreTrainedModel, pixels: Tensor) -> dict[str, Any]:
        return {**super().image_inputs(model, pixels), "noise": in_order(pixels, model.config.patch_size)}

    def check(self, model: PreTrainedModel, stages: tuple[Stage, ...], **options: Any) -> None:
        check_whole_images(model.config.mask_ratio)
        super().check(model, stages, **options)
