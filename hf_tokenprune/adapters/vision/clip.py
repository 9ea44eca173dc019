"""CLIP's vision tower, alone or in a model with a text tower, which is left alone; SigLIP repeats its blocks."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.clip.modeling_clip import (
    CLIPEncoderLayer,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModelWithProjection,
)

from ...registry import register_adapter
from ...signals import ModelShape
from .._capture import CAPTURE_ARGUMENT
from .._sizes import as_pair, linear_macs
from ._adapter import VisionAdapter
from ._block import Projections, PrunedVisionBlock


class CLIPHalves(PrunedVisionBlock):
    """The halves of ``CLIPEncoderLayer.forward``."""

    self_attn: nn.Module
    mlp: nn.Module
    layer_norm1: nn.Module
    layer_norm2: nn.Module

    def attention_half(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # As the mask, which SigLIP hands on to the attention function; other keyword arguments it does not.
        capture = kwargs.pop(CAPTURE_ARGUMENT, None)
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), capture, **kwargs)
        return self.add_attention(hidden_states, attended)

    def add_attention(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        return hidden_states + attended

    def projections(self) -> Projections:
        of: Any = self.self_attn
        linear = (of.q_proj, of.k_proj, of.v_proj, of.out_proj)
        return Projections(self.layer_norm1, *linear, of.head_dim, of.scale, of.dropout)

    def mlp_half(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class PrunedCLIPEncoderLayer(CLIPHalves, CLIPEncoderLayer):
    stock_class = CLIPEncoderLayer


PrunedCLIPEncoderLayer.__name__ = CLIPEncoderLayer.__name__


@register_adapter("clip")
@register_adapter("clip_vision_model")
class CLIPAdapter(VisionAdapter):
    block_class = PrunedCLIPEncoderLayer
    protected_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = (CLIPModel, CLIPVisionModelWithProjection)
    pooling_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = (CLIPForImageClassification,)
    has_cls = True
    heads: ClassVar[tuple[str, ...]] = ("visual_projection", "classifier")
    """Linear layers behind the tower that read images."""

    def encoder(self, model: PreTrainedModel) -> PreTrainedModel:
        tower: PreTrainedModel = getattr(model, "vision_model", model)
        return tower

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        layers: nn.ModuleList = self.encoder(model).encoder.layers
        return layers

    def attention(self, block: nn.Module) -> nn.Module:
        attention: nn.Module = block.self_attn  # type: ignore[assignment]  # nn.Module types it as a tensor or module
        return attention

    def shape(self, model: PreTrainedModel) -> ModelShape:
        tower = self.encoder(model)
        config, blocks = tower.config, self.blocks(model)
        return ModelShape(
            depth=len(blocks),
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=self.attention(blocks[0]).head_dim,  # type: ignore[arg-type]
            image_size=self.image_size(tower),
            patch_size=as_pair(config.patch_size),
            num_channels=config.num_channels,
            num_protected=int(self.has_cls),
            has_cls=self.has_cls,
            head_macs=linear_macs(*(getattr(model, name, None) for name in self.heads)),
        )

    def image_size(self, tower: PreTrainedModel) -> tuple[int, int]:
        """(height, width) in pixels that the checkpoint was made for."""
        return as_pair(tower.config.image_size)
