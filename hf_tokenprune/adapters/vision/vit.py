"""ViT: ``ViTModel`` and ``ViTForImageClassification`` (also timm's DeiT without distillation, converted)."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTForMaskedImageModeling, ViTLayer

from ...registry import register_adapter
from ...signals import ModelShape
from .._sizes import as_pair, linear_macs
from ._adapter import VisionAdapter
from ._block import Projections, PrunedVisionBlock


class ViTHalves(PrunedVisionBlock):
    """The halves of ``ViTLayer.forward``, which ``DeiTLayer.forward`` repeats."""

    attention: nn.Module
    mlp: nn.Module
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    dropout: nn.Module

    def attention_half(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), None, **kwargs)
        return self.add_attention(hidden_states, attended)

    def add_attention(self, hidden_states: Tensor, attended: Tensor) -> Tensor:
        return self.dropout(attended) + hidden_states

    def projections(self) -> Projections:
        of: Any = self.attention
        linear = (of.q_proj, of.k_proj, of.v_proj, of.o_proj)
        return Projections(self.layernorm_before, *linear, of.head_dim, of.scaling, of.attention_dropout)

    def mlp_half(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.layernorm_after(hidden_states))) + hidden_states


class PrunedViTLayer(ViTHalves, ViTLayer):
    stock_class = ViTLayer


# Device maps and FSDP policies match blocks by this name; pickle goes by __qualname__.
PrunedViTLayer.__name__ = ViTLayer.__name__


@register_adapter("vit")
class ViTAdapter(VisionAdapter):
    block_class = PrunedViTLayer
    full_grid_heads: ClassVar = {ViTForMaskedImageModeling: "it reconstructs every patch, so none may leave"}
    restored_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = (ViTForMaskedImageModeling,)
    protected_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = (ViTForImageClassification,)
    num_protected = 1

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        layers: nn.ModuleList = self.encoder(model).layers
        return layers

    def attention(self, block: nn.Module) -> nn.Module:
        attention: nn.Module = block.attention  # type: ignore[assignment]  # nn.Module types it as a tensor or module
        return attention

    def shape(self, model: PreTrainedModel) -> ModelShape:
        config, encoder = model.config, self.encoder(model)
        heads = [module for name, module in model.named_children() if module is not encoder and encoder is not model]
        return ModelShape(
            depth=len(encoder.layers),
            width=config.hidden_size,
            mlp_width=config.intermediate_size,
            num_heads=config.num_attention_heads,
            head_dim=encoder.layers[0].attention.head_dim,
            image_size=as_pair(config.image_size),
            patch_size=as_pair(config.patch_size),
            num_channels=config.num_channels,
            num_protected=self.num_protected,
            has_cls=True,
            head_macs=linear_macs(getattr(encoder, "pooler", None), *heads),
        )
