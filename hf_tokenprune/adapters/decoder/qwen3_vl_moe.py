"""Qwen3-VL with experts: the adapter of the dense one, with a layer of its own."""

from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

from ...registry import register_adapter
from ._layer import PrunedDecoderLayer
from .qwen3_vl import DeepstackAdapter


class PrunedQwen3VLMoeTextDecoderLayer(PrunedDecoderLayer, Qwen3VLMoeTextDecoderLayer, text="qwen3_vl_moe_text"):
    pass


@register_adapter("qwen3_vl_moe")
class Qwen3VLMoeAdapter(DeepstackAdapter):
    pass
