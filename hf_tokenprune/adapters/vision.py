"""What encoders of image patches share: blocks that drop tokens, and putting them into a model and taking them out.

A family (one file) names its stock block class, restates that block's two halves, and tells the shape of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..signals import ModelShape, Stage
from ..tokens import gather_tokens, with_protected
from ._capture import CAPTURE_ARGUMENT, Capture, disable_capture, enable_capture
from ._swap import check_swappable, swap_class


class Recorder(Protocol):
    """Whoever wants to know what left; see ``hf_tokenprune.recording.Record``."""

    def on_start(self) -> None: ...

    def on_reduction(self, name: str, keep: Tensor) -> None: ...

    def on_kept(self, name: str, kept: Tensor) -> None: ...

    def on_block(self, layer: int, num_tokens: int) -> None: ...


@dataclass
class BlockState:
    """What a pruned block knows. No tensors: it is copied, pickled and moved with the module.

    Attributes:
        stage: None for a block behind the first pruning layer that drops nothing itself.
        config: of the whole model, set by the engine.
    """

    stage: Stage | None
    num_protected: int
    has_cls: bool
    config: Any = None
    recorder: Recorder | None = field(default=None, compare=False)


class PrunedVisionBlock(nn.Module):
    """Mixed in before a stock block class; the subclass adds the two halves of that block."""

    stock_class: ClassVar[type[nn.Module]]
    token_prune: BlockState

    def attention_half(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """First half of the block: (B, T, D) with attention and its residual added."""
        raise NotImplementedError

    def mlp_half(self, hidden_states: Tensor) -> Tensor:
        """Second half of the block: (B, T, D) with the MLP and its residual added."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The stock block, with ``stage.num_kept`` of the prunable tokens going on: (B, T, D) -> (B, P + n, D)."""
        refuse_mask(attention_mask)
        stage = self.token_prune.stage
        num_prunable = hidden_states.shape[1] - self.token_prune.num_protected
        if stage is None or stage.num_kept(num_prunable) == num_prunable:
            return super().forward(hidden_states, None, **kwargs)
        capture = Capture(stage.needs)
        if stage.needs:  # a stock attention function may not know what to do with the argument
            kwargs[CAPTURE_ARGUMENT] = capture
        if stage.where == "mid_block":
            tokens = self.attention_half(hidden_states, **kwargs)
            return self.mlp_half(self._reduce(stage, tokens, hidden_states, capture))
        tokens = super().forward(hidden_states, None, **kwargs)
        return self._reduce(stage, tokens, hidden_states, capture)

    def _reduce(self, stage: Stage, tokens: Tensor, inputs: Tensor, capture: Capture) -> Tensor:
        state = self.token_prune
        n_keep = stage.num_kept(tokens.shape[1] - state.num_protected)
        # Autocast would take the scores to half precision.
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            keep = stage.reduce(capture.signals(tokens, inputs, state.num_protected, state.has_cls), n_keep).keep
        if state.recorder is not None:
            state.recorder.on_reduction(stage.name, keep)
        return gather_tokens(tokens, with_protected(keep, state.num_protected))


def refuse_mask(attention_mask: Tensor | None) -> None:
    """Masks are as long as the full sequence; one that masks nothing (all that ViTs make) can be left out."""
    if attention_mask is None:
        return
    message = "a pruned vision model takes no attention_mask; call unprune(model) to use one"
    if torch.compiler.is_compiling() and attention_mask.dim() == 4:  # the values are not known yet
        visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        torch._assert_async(visible.all(), message)
        return
    raise UnsupportedModelError(message)


class VisionAdapter:
    """Base of the adapters of vision encoders. One instance serves all models of its family."""

    block_class: ClassVar[type[PrunedVisionBlock]]
    """The family's :class:`PrunedVisionBlock`."""
    provides: ClassVar[frozenset[str]] = frozenset({"attention", "queries", "keys", "values"})
    full_grid_heads: ClassVar[dict[type[PreTrainedModel], str]] = {}
    """Model classes that cannot work on fewer tokens, and why."""

    def encoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The part of the model that holds embeddings and blocks."""
        return model.base_model

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The blocks, in order."""
        raise NotImplementedError

    def attention(self, block: nn.Module) -> nn.Module:
        """The attention module of a block, the one that reads ``config._attn_implementation``."""
        raise NotImplementedError

    def shape(self, model: PreTrainedModel) -> ModelShape:
        """Sizes of this model."""
        raise NotImplementedError

    def check(self, model: PreTrainedModel, stages: tuple[Stage, ...]) -> None:
        """Raise UnsupportedModelError where pruned tokens cannot work; changes nothing."""
        for head, reason in self.full_grid_heads.items():
            if isinstance(model, head):
                raise UnsupportedModelError(f"{type(model).__name__} cannot be pruned: {reason}")
        for stage in stages:
            missing = stage.needs - self.provides
            if missing:
                raise UnsupportedModelError(
                    f"{type(stage).__name__} needs {', '.join(sorted(missing))}, which the adapter for "
                    f"{model.config.model_type!r} does not provide (it provides: {', '.join(sorted(self.provides))})"
                )
        for index, block in enumerate(self.blocks(model)):
            check_swappable(block, self.block_class.stock_class, f"block {index}")

    def attach(self, model: PreTrainedModel, stages: tuple[Stage, ...]) -> None:
        """Make every block from the first pruning layer on a pruned one. Call :meth:`check` before."""
        shape = self.shape(model)
        by_layer = {stage.layer: stage for stage in stages}
        for index, block in enumerate(self.blocks(model)):
            if index >= min(by_layer):  # later blocks are told to run without the full-length mask
                stage = by_layer.get(index)
                swap_class(block, self.block_class)
                block.__dict__["token_prune"] = BlockState(stage, shape.num_protected, shape.has_cls)
                if stage is not None and stage.needs:
                    enable_capture(self.attention(block))

    def detach(self, model: PreTrainedModel) -> None:
        """Undo :meth:`attach`, whatever part of it there is."""
        for block in self.pruned_blocks(model).values():
            disable_capture(self.attention(block))
            swap_class(block, self.block_class.stock_class)
            block.__dict__.pop("token_prune", None)  # an interrupted attach may not have come to it

    def pruned_blocks(self, model: PreTrainedModel) -> dict[int, PrunedVisionBlock]:
        """The blocks that :meth:`attach` has changed, by index."""
        return {i: block for i, block in enumerate(self.blocks(model)) if isinstance(block, PrunedVisionBlock)}

    def states(self, model: PreTrainedModel) -> list[BlockState]:
        """What the pruned blocks know; empty where the model is dense."""
        return [block.token_prune for block in self.pruned_blocks(model).values()]

    @contextmanager
    def recording(self, model: PreTrainedModel, recorder: Recorder) -> Iterator[None]:
        """Tell ``recorder`` what happens in the forwards inside a ``with`` block."""

        def count(layer: int) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                recorder.on_block(layer, args[0].shape[1])

            return hook

        with ExitStack() as undo:
            # Not with block 0: gradient checkpointing may call the blocks once more, last one first.
            undo.callback(self.encoder(model).register_forward_pre_hook(lambda *_: recorder.on_start()).remove)
            for layer, block in enumerate(self.blocks(model)):
                undo.callback(block.register_forward_pre_hook(count(layer)).remove)
            for state in self.states(model):
                undo.callback(setattr, state, "recorder", state.recorder)
                state.recorder = recorder
            yield


def linear_macs(*modules: nn.Module | None) -> int:
    """Multiply-adds of applying the linear layers in ``modules`` to one token."""
    layers = [m for module in modules if module is not None for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(layer.in_features * layer.out_features for layer in layers)


def as_pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size in a config: one number stands for a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
