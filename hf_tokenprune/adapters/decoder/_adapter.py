"""What vision-language models with a causal decoder share: image tokens that leave inside the language model.

Placeholders, processors, labels and the scatter of image features stay stock. A family (one file) tells the shape of
its model and how many tokens an image has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from ...errors import UnsupportedModelError
from ...signals import DecoderShape, Stage
from .._swap import check_swappable, swap_class
from ._entrance import CountProposals, EnterDecoder, LeaveDecoder
from ._forward import Forward
from ._images import FindImages, GivenImages, ImageTokens
from ._tower import attach_tower, detach_tower, scoring_attention


@dataclass
class DecoderState:
    """What a pruned language model knows. No tensors: it is copied, pickled and moved with the module.

    Attributes:
        stages: in the order tokens pass them.
        handles: of the hooks; they follow a copy of the model.
        config: of the whole model, set by the engine.
    """

    stages: tuple[Stage, ...]
    handles: list[Any] = field(default_factory=list)
    config: Any = None
    recorder: Any = None


class PrunedDecoderLayer(nn.Module):
    """Mixed in before a stock decoder layer."""

    stock_class: ClassVar[type[nn.Module]]
    self_attn: nn.Module
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, token_prune: Forward | None = None, **kwargs: Any) -> Tensor:
        """The stock layer on the tokens that are left, (B, L, D) -> (B, L', D)."""
        if token_prune is None:
            return super().forward(hidden_states, **kwargs)
        layer: Any = self.self_attn.layer_idx
        hidden_states = token_prune.arrive(self, layer, hidden_states, kwargs)
        kwargs = token_prune.layer_inputs(layer, hidden_states, kwargs)
        if token_prune.recorder is not None and token_prune.layout is not None:
            token_prune.recorder.on_block(layer, hidden_states.shape[1])
        token_prune.look(self, layer, hidden_states, kwargs)
        observer = token_prune.observers(layer)
        if observer is None:
            return super().forward(hidden_states, **kwargs)
        outputs, parts = self.in_parts(hidden_states, **kwargs)
        token_prune.observe(observer, layer, parts)
        return outputs

    def in_parts(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The stock layer, with input and output of its attention and of its MLP beside the result."""
        attention_in = self.input_layernorm(hidden_states)
        attention_out, _ = self.self_attn(hidden_states=attention_in, **kwargs)
        hidden_states = hidden_states + attention_out
        mlp_in = self.post_attention_layernorm(hidden_states)
        mlp_out = self.mlp(mlp_in)
        return hidden_states + mlp_out, (attention_in, attention_out, mlp_in, mlp_out)


class PrunedLlamaDecoderLayer(PrunedDecoderLayer, LlamaDecoderLayer):
    stock_class = LlamaDecoderLayer


class PrunedMistralDecoderLayer(PrunedDecoderLayer, MistralDecoderLayer):
    stock_class = MistralDecoderLayer


class PrunedQwen2DecoderLayer(PrunedDecoderLayer, Qwen2DecoderLayer):
    stock_class = Qwen2DecoderLayer


LAYER_CLASSES: dict[str, type[PrunedDecoderLayer]] = {
    "llama": PrunedLlamaDecoderLayer,
    "mistral": PrunedMistralDecoderLayer,
    "qwen2": PrunedQwen2DecoderLayer,
}
"""By ``model_type`` of the language model."""

for _pruned in LAYER_CLASSES.values():
    # Device maps and FSDP policies match layers by this name; pickle goes by __qualname__.
    _pruned.__name__ = _pruned.stock_class.__name__


class DecoderAdapter:
    """Base of the adapters of vision-language models. One instance serves all models of its family."""

    provides: ClassVar[frozenset[str]] = frozenset({"text_attention", "layer_scores"})
    tower_provides: ClassVar[frozenset[str]] = frozenset({"attention", "queries", "keys", "values"})
    full_grid_heads: ClassVar[dict[type[PreTrainedModel], str]] = {}
    placeholders: ClassVar[dict[str, str]] = {"image": "image_token_id"}
    """Kinds of visual input, and the field of the model's config that names their placeholder token."""
    tower_grid: ClassVar[str] = ""
    """Why tokens cannot be chosen in the vision tower of this family; empty where they can."""

    def shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None = None) -> DecoderShape:
        """Sizes of this model, for an image of ``image_size`` (height, width) pixels."""
        raise NotImplementedError

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        """How many tokens each image of a forward of ``inner`` has, and which are newlines; in the prompts' order."""
        return given.as_encoded()

    def inner(self, model: PreTrainedModel) -> Any:
        """The model without its language modelling head: vision tower, projector, language model."""
        return model.base_model

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers: nn.ModuleList = self.inner(model).language_model.layers
        return layers

    def check(self, model: PreTrainedModel, stages: tuple[Stage, ...]) -> None:
        """Raise UnsupportedModelError where image tokens cannot leave; changes nothing."""
        inner = self.inner(model)
        kind = inner.language_model.config.model_type
        if kind not in LAYER_CLASSES:
            raise UnsupportedModelError(
                f"the language model is a {kind!r}; its layers are known for {', '.join(sorted(LAYER_CLASSES))}"
            )
        layer_types = getattr(inner.language_model.config, "layer_types", None) or ()
        if getattr(inner.language_model.config, "sliding_window", None) and (
            kind == "mistral" or "sliding_attention" in layer_types
        ):
            raise UnsupportedModelError(
                "the language model attends in a sliding window, which counts positions that pruning changes; for "
                "prompts within the window set model.config.text_config.sliding_window = None before loading: the "
                "result is the same"
            )
        for stage in stages:
            in_tower = stage.where == "vision_tower"
            if in_tower and self.tower_grid:
                raise UnsupportedModelError(
                    f"tokens cannot be chosen in the vision tower of {model.config.model_type!r}: {self.tower_grid}. "
                    "Use a method that works in the decoder, such as divprune"
                )
            provided = self.tower_provides if in_tower else self.provides
            if missing := stage.needs - provided:
                raise UnsupportedModelError(
                    f"{type(stage).__name__} needs {', '.join(sorted(missing))}, which the adapter for "
                    f"{model.config.model_type!r} does not provide there (it provides: {', '.join(sorted(provided))})"
                )
            if in_tower:
                scoring_attention(inner.vision_tower, model.config.vision_feature_layer)
        for index, block in enumerate(self.blocks(model)):
            check_swappable(block, LAYER_CLASSES[kind].stock_class, f"decoder layer {index}")

    def attach(self, model: PreTrainedModel, stages: tuple[Stage, ...]) -> None:
        """Make the model prune. Call :meth:`check` before."""
        inner = self.inner(model)
        decoder = inner.language_model
        state = DecoderState(stages)
        decoder.__dict__["token_prune"] = state
        for block in self.blocks(model):
            swap_class(block, LAYER_CLASSES[decoder.config.model_type])
        state.handles += [
            inner.register_forward_pre_hook(FindImages(self), with_kwargs=True),
            decoder.register_forward_pre_hook(EnterDecoder(), with_kwargs=True),
            decoder.register_forward_hook(LeaveDecoder(), with_kwargs=True),
        ]
        if model is not inner:
            state.handles.append(model.register_forward_pre_hook(CountProposals(), with_kwargs=True))
        for stage in stages:
            if stage.where == "vision_tower":
                layer, strategy = model.config.vision_feature_layer, model.config.vision_feature_select_strategy
                state.handles += attach_tower(inner.vision_tower, inner.multi_modal_projector, stage, layer, strategy)

    def detach(self, model: PreTrainedModel) -> None:
        """Undo :meth:`attach`, whatever part of it there is."""
        inner = self.inner(model)
        state: DecoderState | None = inner.language_model.__dict__.pop("token_prune", None)
        if state is None:
            return
        for handle in state.handles:
            handle.remove()
        if any(stage.where == "vision_tower" for stage in state.stages):
            detach_tower(inner.vision_tower, model.config.vision_feature_layer)
        for block in self.blocks(model):
            if isinstance(block, PrunedDecoderLayer):
                swap_class(block, block.stock_class)

    def states(self, model: PreTrainedModel) -> list[DecoderState]:
        """What the pruned language model knows; empty where it is dense."""
        state = self.inner(model).language_model.__dict__.get("token_prune")
        return [] if state is None else [state]

    @contextmanager
    def recording(self, model: PreTrainedModel, recorder: Any) -> Iterator[None]:
        """Tell ``recorder`` what happens in the forwards inside a ``with`` block that have an image in them."""
        (state,) = self.states(model)
        former, state.recorder = state.recorder, recorder
        try:
            yield
        finally:
            state.recorder = former
