"""SigLIP's vision tower: CLIP's blocks without a CLS token; a head pools all patches by attention."""

from dataclasses import replace
from typing import Any, ClassVar

from transformers import PreTrainedModel
from transformers.models.siglip.modeling_siglip import (
    SiglipEncoderLayer,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionModel,
)

from ...registry import register_adapter
from ...signals import ModelShape
from .._sizes import linear_macs
from .clip import CLIPAdapter, CLIPHalves


class PrunedSiglipEncoderLayer(CLIPHalves, SiglipEncoderLayer):
    stock_class = SiglipEncoderLayer


PrunedSiglipEncoderLayer.__name__ = SiglipEncoderLayer.__name__


@register_adapter("siglip")
@register_adapter("siglip_vision_model")
class SiglipAdapter(CLIPAdapter):
    block_class = PrunedSiglipEncoderLayer
    protected_heads: ClassVar = ()
    pooling_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = (
        SiglipModel,
        SiglipVisionModel,
        SiglipForImageClassification,
    )
    provides = frozenset({"attention", "queries", "keys", "values"})
    has_cls = False
    heads: ClassVar = ("classifier",)

    def shape(self, model: PreTrainedModel) -> ModelShape:
        shape = super().shape(model)
        head: Any = getattr(self.encoder(model), "head", None)
        if head is None:
            return shape
        width = shape.width  # keys and values of every token, and attention of one query, the probe, to them
        pooling = 2 * width**2 + linear_macs(head.mlp)
        return replace(shape, head_macs=shape.head_macs + pooling, head_token_macs=2 * width**2 + 2 * width)
