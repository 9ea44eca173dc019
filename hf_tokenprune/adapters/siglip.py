"""SigLIP's vision tower: CLIP's blocks without a CLS token; a head pools all patches by attention."""

from typing import ClassVar

from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from ..registry import register_adapter
from .clip import CLIPAdapter, CLIPHalves


class PrunedSiglipEncoderLayer(CLIPHalves, SiglipEncoderLayer):
    stock_class = SiglipEncoderLayer


PrunedSiglipEncoderLayer.__name__ = SiglipEncoderLayer.__name__


@register_adapter("siglip")
@register_adapter("siglip_vision_model")
class SiglipAdapter(CLIPAdapter):
    block_class = PrunedSiglipEncoderLayer
    protected_heads: ClassVar = ()
    provides = frozenset({"attention", "queries", "keys", "values"})
    has_cls = False
    heads: ClassVar = ("classifier",)
