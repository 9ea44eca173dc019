"""Qwen2.5-VL: like Qwen2-VL, with window attention in most blocks of its tower."""

from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from ...registry import register_adapter
from ._grids import GridAdapter
from ._layer import PrunedDecoderLayer


class PrunedQwen25VLDecoderLayer(PrunedDecoderLayer, Qwen2_5_VLDecoderLayer, text="qwen2_5_vl_text"):
    pass


@register_adapter("qwen2_5_vl")
class Qwen25VLAdapter(GridAdapter):
    pass
