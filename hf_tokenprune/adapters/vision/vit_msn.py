"""ViT-MSN: the ViT block under another name."""

from typing import ClassVar

from transformers.models.vit_msn.modeling_vit_msn import ViTMSNForImageClassification, ViTMSNLayer

from ...registry import register_adapter
from .vit import ViTAdapter, ViTHalves


class PrunedViTMSNLayer(ViTHalves, ViTMSNLayer):
    stock_class = ViTMSNLayer


PrunedViTMSNLayer.__name__ = ViTMSNLayer.__name__


@register_adapter("vit_msn")
class ViTMSNAdapter(ViTAdapter):
    block_class = PrunedViTMSNLayer
    full_grid_heads: ClassVar = {}
    protected_heads: ClassVar = (ViTMSNForImageClassification,)
