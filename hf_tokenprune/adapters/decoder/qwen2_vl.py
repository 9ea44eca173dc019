"""Qwen2-VL: images of any size, tokens placed in time, rows and columns."""

from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLDecoderLayer

from ...registry import register_adapter
from ._grids import GridAdapter
from ._layer import PrunedDecoderLayer


class PrunedQwen2VLDecoderLayer(PrunedDecoderLayer, Qwen2VLDecoderLayer, text="qwen2_vl_text"):
    pass


@register_adapter("qwen2_vl")
class Qwen2VLAdapter(GridAdapter):
    pass
