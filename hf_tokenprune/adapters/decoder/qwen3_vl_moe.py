"""Qwen3-VL with experts: the adapter of the dense one, with a layer of its own."""

from transformers import PreTrainedModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextDecoderLayer

from ...registry import register_adapter
from .._sizes import projection_macs
from ._layer import PrunedDecoderLayer
from .qwen3_vl import DeepstackAdapter


class PrunedQwen3VLMoeTextDecoderLayer(PrunedDecoderLayer, Qwen3VLMoeTextDecoderLayer, text="qwen3_vl_moe_text"):
    pass


@register_adapter("qwen3_vl_moe")
class Qwen3VLMoeAdapter(DeepstackAdapter):
    def token_macs(self, model: PreTrainedModel) -> tuple[int, ...]:
        text = self.decoder(self.inner(model)).config
        width, attention = text.hidden_size, projection_macs(text)
        dense = 3 * width * text.intermediate_size
        sparse = width * text.num_experts + text.num_experts_per_tok * 3 * width * text.moe_intermediate_size
        return tuple(attention + (sparse if hasattr(b.mlp, "experts") else dense) for b in self.blocks(model))
