"""DeiT: the ViT block with a distillation token behind CLS; classification with and without the teacher head."""

from typing import ClassVar

from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTForMaskedImageModeling,
    DeiTLayer,
)

from ...registry import register_adapter
from .vit import ViTAdapter, ViTHalves


class PrunedDeiTLayer(ViTHalves, DeiTLayer):
    stock_class = DeiTLayer


PrunedDeiTLayer.__name__ = DeiTLayer.__name__


@register_adapter("deit")
class DeiTAdapter(ViTAdapter):
    block_class = PrunedDeiTLayer
    full_grid_heads: ClassVar = {DeiTForMaskedImageModeling: "it reconstructs every patch, so none may leave"}
    restored_heads: ClassVar = (DeiTForMaskedImageModeling,)
    protected_heads: ClassVar = (DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
    num_protected = 2  # DeiTModel embeds a distillation token whether a head reads it or not
