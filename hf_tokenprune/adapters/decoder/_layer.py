"""Stock decoder layers that let tokens leave before they run: one class a stock class, swapped in on a pruned model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .._swap import SwappedBlock
from ._forward import Forward

LAYER_CLASSES: dict[str, type[PrunedDecoderLayer]] = {}
"""By ``model_type`` of the language model. Those of one family alone are in its file."""


class PrunedDecoderLayer(SwappedBlock):
    """Mixed in before a stock decoder layer; ``text`` is the ``model_type`` of the language models made of these."""

    stock_class: ClassVar[type[nn.Module]]
    always_slides: ClassVar[bool] = False
    """Whether all layers attend in ``config.sliding_window``, if there is one; others go by ``config.layer_types``."""
    reads_positions: ClassVar[bool] = False
    """Whether its attention wants positions although tokens are rotated already. Others are given none: FlashAttention
    takes gaps in them for packed samples."""
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def __init_subclass__(cls, text: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if text:
            cls.stock_class = cls.__bases__[1]
            # Device maps and FSDP policies match layers by this name; pickle goes by __qualname__.
            cls.__name__ = cls.stock_class.__name__
            LAYER_CLASSES[text] = cls

    @property
    def index(self) -> int:
        """Which layer of the language model this is."""
        layer: Any = self.self_attn.layer_idx
        return int(layer)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Around gradient checkpointing: what is added in front of this layer may have a graph of its own, which a
        layer that runs again for its backward must not go through."""
        forward: Forward | None = kwargs.get("token_prune")
        if forward is not None and forward.side_inputs:
            hidden_states = forward.with_side_inputs(self.index - 1, hidden_states)
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, token_prune: Forward | None = None, **kwargs: Any) -> Tensor:
        """The stock layer on the tokens that are left, (B, L, D) -> (B, L', D)."""
        if token_prune is None:
            return super().forward(hidden_states, **kwargs)
        layer = self.index
        hidden_states = token_prune.arrive(self, layer, hidden_states, kwargs)
        kwargs = token_prune.layer_inputs(layer, hidden_states, kwargs)
        if self.reads_positions:
            kwargs["position_ids"] = token_prune.view(token_prune.segment(layer), hidden_states.device).positions
        if token_prune.layout is not None:
            for recorder in token_prune.recorders:
                recorder.on_block(layer, hidden_states.shape[1])
        token_prune.look(self, layer, hidden_states, kwargs)
        observer = token_prune.observers(layer)
        if observer is None:
            return super().forward(hidden_states, **kwargs)
        outputs, parts = self.in_parts(hidden_states, **kwargs)
        token_prune.observe(observer, layer, parts)
        return outputs

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """(B, 1, R, 1) by what the attention multiplies queries at ``positions`` (B, R); None: by nothing."""
        return None

    def in_parts(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The stock layer, with input and output of its attention and of its MLP beside the result."""
        attention_in = self.input_layernorm(hidden_states)
        attention_out, _ = self.self_attn(hidden_states=attention_in, **kwargs)
        hidden_states = hidden_states + attention_out
        mlp_in = self.post_attention_layernorm(hidden_states)
        mlp_out = self.mlp(mlp_in)
        return hidden_states + mlp_out, (attention_in, attention_out, mlp_in, mlp_out)


class PrunedLlamaDecoderLayer(PrunedDecoderLayer, LlamaDecoderLayer, text="llama"):
    pass


class PrunedMistralDecoderLayer(PrunedDecoderLayer, MistralDecoderLayer, text="mistral"):
    always_slides = True


class PrunedQwen2DecoderLayer(PrunedDecoderLayer, Qwen2DecoderLayer, text="qwen2"):
    pass


class PrunedQwen3DecoderLayer(PrunedDecoderLayer, Qwen3DecoderLayer, text="qwen3"):
    pass
