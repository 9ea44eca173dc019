"""LLaVA 1.5 and its kind: an image has as many tokens as its vision tower has patches."""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...registry import register_adapter
from ...signals import DecoderShape, ModelShape
from .._sizes import as_pair, linear_macs
from ._adapter import DecoderAdapter
from ._images import GivenImages, ImageTokens, by_tower, encoded, is_alone
from ._tower import HAS_CLS


class LlavaFamilyAdapter(DecoderAdapter):
    """Sizes, which all LLaVA families read from the same fields."""

    def shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None = None) -> DecoderShape:
        inner, text = self.inner(model), self.inner(model).language_model.config
        tower = self.tower(model, image_size)
        tower_images, image_tokens, newline_tokens = self.image_tokens(model, image_size)
        return DecoderShape(
            depth=len(self.blocks(model)),
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=self.blocks(model)[0].self_attn.head_dim,  # type: ignore[union-attr,arg-type]
            vocab_size=text.vocab_size,
            tower=tower,
            tower_images=tower_images,
            image_tokens=image_tokens,
            projector_macs=linear_macs(inner.multi_modal_projector),
            newline_tokens=newline_tokens,
        )

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(images the tower encodes, tokens in the decoder, newlines among them) of one image; None: a usual size."""
        raise NotImplementedError

    def tower(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        """Sizes of the vision tower, for what it encodes of an image of ``image_size`` pixels."""
        return tower_shape(self.inner(model).vision_tower)


@register_adapter("llava")
class LlavaAdapter(LlavaFamilyAdapter):
    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        tower = self.tower(model, image_size)
        first = model.config.vision_feature_select_strategy == "default"  # drops the first, CLS token or not
        return 1, tower.num_patches + tower.has_cls - first, 0

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        if not takes_any_size(inner.vision_tower):
            return given.as_encoded(is_one=given.as_one and given.total == self.image_tokens(inner, None)[1])
        sizes, side = given.image_sizes, inner.vision_tower.patch_size
        if sizes is None:
            output = encoded(given.call).get(given.kind)
            if output is not None and by_tower(output) and is_alone(output.pooler_output):
                raise UnsupportedModelError(UNSIZED)
            return given.as_encoded()
        return [ImageTokens((height // side) * (width // side)) for height, width in sizes]

    def tower(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        tower = super().tower(model, image_size)
        if image_size is None or not takes_any_size(self.inner(model).vision_tower):
            return tower
        return replace(tower, image_size=image_size)


UNSIZED = (
    "image features of a vision tower that was given no image_sizes: it then encodes images as one, however many there "
    "are. Pass image_sizes with pixel_values, as the processor of this model makes them"
)


def takes_any_size(tower: Any) -> bool:
    """Whether images of several sizes are encoded together, and ``image_sizes`` tell them apart."""
    return bool(tower.config.model_type == "pixtral")


def tower_shape(tower: Any) -> ModelShape:
    """Sizes of a vision tower; its head is not used."""
    config = tower.config
    return ModelShape(
        depth=len(next(module for module in tower.modules() if isinstance(module, nn.ModuleList))),
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        num_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        image_size=as_pair(config.image_size),
        patch_size=as_pair(config.patch_size),
        num_channels=config.num_channels,
        num_protected=int(HAS_CLS.get(config.model_type, False)),
        has_cls=HAS_CLS.get(config.model_type, False),
        head_macs=0,
    )
