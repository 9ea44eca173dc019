"""DINOv2, without and with registers: the ViT block with scaled branches."""

import inspect
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Backbone, Dinov2ForImageClassification, Dinov2Layer
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersLayer,
)

from ...registry import register_adapter
from ...signals import ModelShape
from .._sizes import as_pair, linear_macs
from ._adapter import VisionAdapter
from ._block import Projections, PrunedVisionBlock

FEATURE_MAPS = "it makes feature maps of several blocks, which need every patch"


class Dinov2Halves(PrunedVisionBlock):
    """The halves of ``Dinov2Layer.forward``."""

    no_mask: ClassVar = {name: None for name in inspect.signature(Dinov2Layer.forward).parameters if "mask" in name}

    attention: nn.Module
    mlp: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    layer_scale1: nn.Module
    layer_scale2: nn.Module
    drop_path: nn.Module

    def attention_half(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended = self.attention(self.norm1(hidden_states), **kwargs)
        attended = attended[0] if isinstance(attended, tuple) else attended  # a tensor in older transformers
        return self.add_attention(hidden_states, attended)

    def add_attention(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        return self.drop_path(self.layer_scale1(attended)) + hidden_states

    def projections(self) -> Projections:
        of: Any = self.attention
        linear = (of.q_proj, of.k_proj, of.v_proj, of.o_proj)
        return Projections(self.norm1, *linear, of.head_dim, of.scaling, of.attention_dropout)

    def mlp_half(self, hidden_states: Tensor) -> Tensor:
        return self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))) + hidden_states


class PrunedDinov2Layer(Dinov2Halves, Dinov2Layer):
    stock_class = Dinov2Layer


class PrunedDinov2WithRegistersLayer(Dinov2Halves, Dinov2WithRegistersLayer):
    stock_class = Dinov2WithRegistersLayer


PrunedDinov2Layer.__name__ = Dinov2Layer.__name__
PrunedDinov2WithRegistersLayer.__name__ = Dinov2WithRegistersLayer.__name__


@register_adapter("dinov2")
class Dinov2Adapter(VisionAdapter):
    block_class: ClassVar = PrunedDinov2Layer
    full_grid_heads: ClassVar = {Dinov2Backbone: FEATURE_MAPS}
    pooling_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = (Dinov2ForImageClassification,)

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        encoder: Any = self.encoder(model).encoder
        layers: nn.ModuleList = encoder.layer
        return layers

    def attention(self, block: nn.Module) -> nn.Module:
        outer: Any = block.attention
        attention: nn.Module = getattr(outer, "attention", outer)  # nested in older transformers
        return attention

    def shape(self, model: PreTrainedModel) -> ModelShape:
        config, block = model.config, self.blocks(model)[0]
        return ModelShape(
            depth=len(self.blocks(model)),
            width=config.hidden_size,
            mlp_width=linear_macs(block.mlp) // (2 * config.hidden_size),  # type: ignore[arg-type]  # SwiGLU has three
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            image_size=as_pair(config.image_size),
            patch_size=as_pair(config.patch_size),
            num_channels=config.num_channels,
            num_protected=1 + getattr(config, "num_register_tokens", 0),
            has_cls=True,
            head_macs=linear_macs(getattr(model, "classifier", None)),
        )


@register_adapter("dinov2_with_registers")
class Dinov2WithRegistersAdapter(Dinov2Adapter):
    block_class: ClassVar = PrunedDinov2WithRegistersLayer
    full_grid_heads: ClassVar = {Dinov2WithRegistersBackbone: FEATURE_MAPS}
    pooling_heads: ClassVar = (Dinov2WithRegistersForImageClassification,)
