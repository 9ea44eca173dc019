"""GLM-4.1V and GLM-4.6V: like Qwen2.5-VL, with norms behind attention and MLP too; frames stand as images do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.glm4v.modeling_glm4v import Glm4vTextDecoderLayer

from ...registry import register_adapter
from ...signals import ModelShape
from ._grids import GridAdapter
from ._images import GivenImages, ImageTokens, given_kinds
from ._layer import PrunedDecoderLayer


class PrunedGlm4vTextDecoderLayer(PrunedDecoderLayer, Glm4vTextDecoderLayer, text="glm4v_text"):
    post_self_attn_layernorm: nn.Module
    post_mlp_layernorm: nn.Module

    def in_parts(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        attention_in = self.input_layernorm(hidden_states)
        attention_out, _ = self.self_attn(hidden_states=attention_in, **kwargs)
        hidden_states = hidden_states + self.post_self_attn_layernorm(attention_out)
        mlp_in = self.post_attention_layernorm(hidden_states)
        mlp_out = self.mlp(mlp_in)
        parts = (attention_in, attention_out, mlp_in, mlp_out)
        return hidden_states + self.post_mlp_layernorm(mlp_out), parts


@register_adapter("glm46v")
@register_adapter("glm4v")
class Glm4vAdapter(GridAdapter):
    placeholders: ClassVar = {"image": "image_token_id"}

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        """Videos too: their placeholders are those of images, so the stock model takes only one kind at a time."""
        (kind,) = given_kinds(given.call)
        return super().images(inner, replace(given, kind=kind))

    def connectors(self, inner: Any) -> list[nn.Module]:
        return [self.tower(inner).downsample, *super().connectors(inner)]

    def tower_shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        width = self.tower(self.inner(model)).config.out_hidden_size  # its intermediate_size is that of the merger
        return replace(super().tower_shape(model, image_size), mlp_width=width)
