"""Qwen3.5 (3.6 and 3.8 share its structure): three of four layers of its language model are recurrent."""

from typing import Any

from transformers import PreTrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from ...registry import register_adapter
from .._sizes import projection_macs
from ._grids import GridAdapter
from ._layer import PrunedDecoderLayer


class PrunedQwen35DecoderLayer(PrunedDecoderLayer, Qwen3_5DecoderLayer, text="qwen3_5_text"):
    @property
    def index(self) -> int:
        mixer: Any = self.linear_attn if self.block_type == "linear_attention" else self.self_attn
        return int(mixer.layer_idx)


@register_adapter("qwen3_5")
class Qwen35Adapter(GridAdapter):
    def token_macs(self, model: PreTrainedModel) -> tuple[int, ...]:
        text = self.decoder(self.inner(model)).config
        width, heads = text.hidden_size, text.linear_num_value_heads
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = heads * text.linear_value_head_dim
        mixers = {
            "full_attention": projection_macs(text, gated=True),
            "linear_attention": width * (2 * keys + 3 * values + 2 * heads) + 3 * values * text.linear_key_head_dim,
        }
        return tuple(mixers[kind] + 3 * width * text.intermediate_size for kind in text.layer_types)
