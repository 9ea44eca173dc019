"""Qwen3.5 (3.6 and 3.8 share its structure): three of four layers of its language model are recurrent."""

from typing import Any

from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer

from ...registry import register_adapter
from ._grids import GridAdapter
from ._layer import PrunedDecoderLayer


class PrunedQwen35DecoderLayer(PrunedDecoderLayer, Qwen3_5DecoderLayer, text="qwen3_5_text"):
    @property
    def index(self) -> int:
        mixer: Any = self.linear_attn if self.block_type == "linear_attention" else self.self_attn
        return int(mixer.layer_idx)


@register_adapter("qwen3_5")
class Qwen35Adapter(GridAdapter):
    pass
