"""The encoder of ViT-MAE, for features of whole images: the ViT block under another name."""

from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAELayer

from ..errors import UnsupportedModelError
from ..registry import register_adapter
from ..signals import Stage
from .vit import ViTAdapter, ViTHalves


class PrunedViTMAELayer(ViTHalves, ViTMAELayer):
    stock_class = ViTMAELayer


PrunedViTMAELayer.__name__ = ViTMAELayer.__name__


@register_adapter("vit_mae")
class ViTMAEAdapter(ViTAdapter):
    block_class = PrunedViTMAELayer
    full_grid_heads: ClassVar = {ViTMAEForPreTraining: "its decoder puts every visible patch back in its place"}
    protected_heads: ClassVar = ()

    def check(self, model: PreTrainedModel, stages: tuple[Stage, ...], **options: Any) -> None:
        if model.config.mask_ratio:
            raise UnsupportedModelError(
                f"mask_ratio={model.config.mask_ratio}: the encoder sees a random part of the patches in random order; "
                "for features of whole images set model.config.mask_ratio = 0"
            )
        super().check(model, stages, **options)
