"""Where the parts of a vision-language model are, and their sizes: all that a schedule and its cost depend on."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from ...signals import DecoderShape, ModelShape
from .._sizes import as_pair, head_dim, linear_macs, mlp_matrices
from ._tower import HAS_CLS, Squares, tower_blocks


class DecoderParts:
    """Base of the adapters of vision-language models, without what makes these prune."""

    decoder_name: ClassVar[str] = "language_model"
    tower_name: ClassVar[str] = "vision_tower"
    connector_name: ClassVar[str] = "multi_modal_projector"
    """What the parts of ``inner`` are called; with dots where one is inside another."""
    position_axes: ClassVar[int] = 1
    """Axes of the positions that tokens are rotated by: 3 where they tell time, row and column. Then every token keeps
    its own: no number of tokens less would close the gap of one that left."""

    def inner(self, model: PreTrainedModel) -> Any:
        """The model without its language modelling head: vision tower, projector, language model."""
        return model.base_model

    def decoder(self, inner: Any) -> Any:
        """The language model, without its head."""
        return inner.get_submodule(self.decoder_name)

    def tower(self, inner: Any) -> Any:
        """The vision tower."""
        return inner.get_submodule(self.tower_name)

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers: nn.ModuleList = self.decoder(self.inner(model)).layers
        return layers

    def shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None = None) -> DecoderShape:
        """Sizes of this model, for an image of ``image_size`` (height, width) pixels; None: of a usual size."""
        inner = self.inner(model)
        text = self.decoder(inner).config
        kinds = getattr(text, "layer_types", None) or ()
        tower_images, image_tokens, newline_tokens = self.image_tokens(model, image_size)
        tower = self.tower_shape(model, image_size)
        return DecoderShape(
            depth=len(self.blocks(model)),
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            num_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            head_dim=head_dim(text),
            vocab_size=text.vocab_size,
            tower=tower,
            tower_images=tower_images,
            tower_tokens=tower.num_patches // self.squares(model).side ** 2,
            image_tokens=image_tokens,
            projector_macs=linear_macs(*self.connectors(inner)),
            newline_tokens=newline_tokens,
            position_axes=self.position_axes,
            token_macs=self.token_macs(model),
            recurrent=frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention"),
            feature_depth=self.feature_depth(model),
        )

    def feature_layer(self, model: PreTrainedModel) -> int | list[int] | None:
        """Number of the hidden state of the vision tower that makes the features; None: its output."""
        layer: int | list[int] | None = getattr(model.config, "vision_feature_layer", None)
        return layer

    def feature_depth(self, model: PreTrainedModel) -> int:
        """How many blocks of the vision tower the features have passed."""
        layer, depth = self.feature_layer(model), len(tower_blocks(self.tower(self.inner(model))))
        layers = [depth] if layer is None else [layer] if isinstance(layer, int) else layer
        return max(number if number >= 0 else number + depth + 1 for number in layers)

    def token_macs(self, model: PreTrainedModel) -> tuple[int, ...]:
        """See ``DecoderShape``; empty for layers of attention and a gated MLP."""
        return ()

    def connectors(self, inner: Any) -> list[nn.Module]:
        """What makes tokens of the language model of what the tower gives."""
        return [inner.get_submodule(self.connector_name)]

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(images the tower encodes, tokens in the decoder, newlines among them) of one image; None: a usual size."""
        raise NotImplementedError

    def tower_shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        """Sizes of the vision tower, for what it encodes of an image of ``image_size`` pixels."""
        return tower_shape(self.tower(self.inner(model)))

    def squares(self, model: PreTrainedModel) -> Squares:
        """Which patches of the vision tower become one image token."""
        return Squares()

    def image_inputs(
        self, model: PreTrainedModel, image_size: tuple[int, int] | None, placeholders: Tensor, generator: Generator
    ) -> dict[str, Tensor]:
        """At random, what the processor returns besides text of prompts with one image each.

        Args:
            image_size: (height, width) in pixels of all images; None: a usual size.
            placeholders: (B, T) bool, the tokens that stand for these images.
        """
        tower = self.tower_shape(model, image_size)
        tower_images, _, _ = self.image_tokens(model, image_size)
        shape = (len(placeholders) * tower_images, tower.num_channels, *tower.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}


def tower_shape(tower: Any) -> ModelShape:
    """Sizes of a vision tower; its head is not used."""
    config = tower.config
    blocks = tower_blocks(tower)
    return ModelShape(
        depth=len(blocks),
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
        mlp_matrices=mlp_matrices(blocks[0]),
    )
