"""What encoders of image patches share: blocks that drop tokens, and putting them into a model and taking them out.

A family (one file) names its stock block class, restates that block's two halves, and tells the shape of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..signals import ModelShape, Stage
from ..tokens import gather_tokens, merge_tokens, with_protected
from ._capture import CAPTURE_ARGUMENT, Capture, disable_capture, enable_capture
from ._carry import Carry, StartCarry
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
        stage: None for a block that drops nothing itself.
        layer: index of the block.
        proportional: whether sizes of merged tokens bias its attention.
        exact: it is the last block, and computes for protected tokens only what the head reads.
        restore: tokens are remembered, and the last block gives them all back.
        config: of the whole model, set by the engine.
    """

    stage: Stage | None
    num_protected: int
    has_cls: bool
    layer: int
    is_last: bool
    proportional: bool = False
    exact: bool = False
    restore: bool = False
    config: Any = None
    recorder: Recorder | None = field(default=None, compare=False)


class PrunedVisionBlock(nn.Module):
    """Mixed in before a stock block class; the subclass adds the two halves of that block."""

    stock_class: ClassVar[type[nn.Module]]
    no_mask: ClassVar[dict[str, None]] = {"attention_mask": None}
    """What tells the stock block that there is no mask."""
    token_prune: BlockState

    def attention_half(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """First half of the block: (B, T, D) with attention and its residual added."""
        raise NotImplementedError

    def mlp_half(self, hidden_states: Tensor) -> Tensor:
        """Second half of the block: (B, T, D) with the MLP and its residual added."""
        raise NotImplementedError

    def protected_half(self, hidden_states: Tensor, num_protected: int, bias: Tensor | None) -> Tensor:
        """First half of the block for the first P tokens, which attend to all: (B, T, D) -> (B, P, D)."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_prune_carry: Carry | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The stock block, with ``stage.num_kept`` of the prunable tokens going on: (B, T, D) -> (B, P + n, D)."""
        refuse_mask(attention_mask)
        state, carry = self.token_prune, token_prune_carry
        num_prunable = hidden_states.shape[1] - state.num_protected
        stage = state.stage if state.stage and state.stage.num_kept(num_prunable) < num_prunable else None
        if carry is not None:
            carry.on_block(state.layer)
        bias = carry.bias(state.layer) if carry is not None and state.proportional else None
        if state.exact and carry is not None and carry.exact:
            return self.mlp_half(self.protected_half(hidden_states, state.num_protected, bias))
        if stage is None and bias is None:
            tokens = super().forward(hidden_states, **self.no_mask, **kwargs)
        else:
            capture = Capture(stage.needs if stage else frozenset(), bias)
            if capture.needs or bias is not None:  # a stock attention function may not know the argument
                kwargs[CAPTURE_ARGUMENT] = capture
            tokens = self.attention_half(hidden_states, **kwargs)
            if stage is not None and stage.where == "mid_block":
                tokens = self._reduce(stage, tokens, hidden_states, capture, carry)
            tokens = self.mlp_half(tokens)
            if stage is not None and stage.where == "after_block":
                tokens = self._reduce(stage, tokens, hidden_states, capture, carry)
        if state.restore and state.is_last and carry is not None:
            return carry.restored(state.layer, tokens, state.num_protected)
        return tokens

    def _reduce(self, stage: Stage, tokens: Tensor, inputs: Tensor, capture: Capture, carry: Carry | None) -> Tensor:
        state = self.token_prune
        n_keep = stage.num_kept(tokens.shape[1] - state.num_protected)
        sizes = carry.sizes.get(state.layer) if carry is not None else None
        # Autocast would take the scores to half precision.
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
            signals = capture.signals(tokens, inputs, state.num_protected, state.has_cls, sizes)
            reduction = stage.reduce(signals, n_keep)
        if state.recorder is not None:
            state.recorder.on_reduction(stage.name, reduction.keep)
        if carry is not None:
            carry.on_reduction(state.layer, reduction, tokens, state.num_protected, state.restore)
        if reduction.merged is not None and reduction.into is not None:
            protected, prunable = tokens.split([state.num_protected, tokens.shape[1] - state.num_protected], dim=1)
            merged = merge_tokens(prunable, reduction.keep, reduction.merged, reduction.into, reduction.weights)
            return torch.cat([protected, merged], dim=1)
        return gather_tokens(tokens, with_protected(reduction.keep, state.num_protected))


def refuse_mask(attention_mask: Tensor | None) -> None:
    """Masks are as long as the full sequence; one that masks nothing (all that ViTs make) can be left out."""
    if attention_mask is None:
        return
    message = "a pruned vision model takes no attention_mask; call unprune(model) to use one"
    if torch.compiler.is_compiling() and attention_mask.dim() == 4:  # the values are not known yet
        require(attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0, message)
        return
    raise UnsupportedModelError(message)


def require(visible: Tensor, message: str) -> None:
    """Raise UnsupportedModelError with ``message`` unless all of ``visible`` is true; where it runs, if compiled."""
    if torch.compiler.is_compiling():
        torch._assert_async(visible.all(), message)
    elif not bool(visible.all()):
        raise UnsupportedModelError(message)


class VisionAdapter:
    """Base of the adapters of vision encoders. One instance serves all models of its family."""

    block_class: ClassVar[type[PrunedVisionBlock]]
    """The family's :class:`PrunedVisionBlock`."""
    provides: ClassVar[frozenset[str]] = frozenset({"attention", "cls_attention", "queries", "keys", "values"})
    full_grid_heads: ClassVar[dict[type[PreTrainedModel], str]] = {}
    """Model classes that cannot work on fewer tokens, and why."""
    restored_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = ()
    """Those of ``full_grid_heads`` that can work where the last block restores all tokens."""
    protected_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = ()
    """Model classes that read protected tokens only after the last block."""
    encoder_hooks: ClassVar[tuple[Callable[..., Any], ...]] = ()
    """Forward pre-hooks (with keyword arguments) that the encoder needs while it is pruned."""

    def encoder(self, model: PreTrainedModel) -> PreTrainedModel:
        """The part of the model that holds embeddings and blocks."""
        return model.base_model

    def image_inputs(self, model: PreTrainedModel, pixels: Tensor) -> dict[str, Any]:
        """Images (B, C, H, W) of any size as arguments of the encoder, and of a model without a text tower."""
        if tuple(pixels.shape[-2:]) == self.shape(model).image_size:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels, "interpolate_pos_encoding": True}

    def blocks(self, model: PreTrainedModel) -> nn.ModuleList:
        """The blocks, in order."""
        raise NotImplementedError

    def attention(self, block: nn.Module) -> nn.Module:
        """The attention module of a block, the one that reads ``config._attn_implementation``."""
        raise NotImplementedError

    def shape(self, model: PreTrainedModel) -> ModelShape:
        """Sizes of this model."""
        raise NotImplementedError

    def check(
        self,
        model: PreTrainedModel,
        stages: tuple[Stage, ...],
        *,
        exact_last_block: bool = False,
        restore: bool = False,
    ) -> None:
        """Raise UnsupportedModelError where pruned tokens cannot work; changes nothing."""
        for head, reason in self.full_grid_heads.items():
            if isinstance(model, head) and not (restore and head in self.restored_heads):
                raise UnsupportedModelError(f"{type(model).__name__} cannot be pruned: {reason}")
        if exact_last_block and type(model) not in self.protected_heads:
            names = ", ".join(sorted(head.__name__ for head in self.protected_heads)) or "none of this family"
            raise UnsupportedModelError(
                f"exact_last_block: {type(model).__name__} reads patches after the last block; it works for {names}"
            )
        carries = exact_last_block or restore or any(stage.merges for stage in stages)
        parameters = inspect.signature(self.block_class.stock_class.forward).parameters.values()
        if carries and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            raise UnsupportedModelError(
                f"blocks of {model.config.model_type!r} take no keyword arguments in this version of transformers; "
                "merging, exact_last_block and restore need them: pip install -U transformers"
            )
        for stage in stages:
            missing = stage.needs - self.provides
            if missing:
                raise UnsupportedModelError(
                    f"{type(stage).__name__} needs {', '.join(sorted(missing))}, which the adapter for "
                    f"{model.config.model_type!r} does not provide (it provides: {', '.join(sorted(self.provides))})"
                )
        implementation = self.encoder(model).config._attn_implementation
        if any(stage.proportional for stage in stages) and implementation not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"attention {implementation!r} takes no bias for the sizes of merged tokens; load the model with "
                'attn_implementation="sdpa"'
            )
        for index, block in enumerate(self.blocks(model)):
            check_swappable(block, self.block_class.stock_class, f"block {index}")

    def attach(
        self,
        model: PreTrainedModel,
        stages: tuple[Stage, ...],
        *,
        exact_last_block: bool = False,
        restore: bool = False,
    ) -> None:
        """Make the blocks from the first pruning layer on pruned ones. Call :meth:`check` before.

        Args:
            exact_last_block: it computes for protected tokens only what the head reads.
            restore: the last block gives every patch a state again.
        """
        shape = self.shape(model)
        by_layer = {stage.layer: stage for stage in stages}
        proportional = any(stage.proportional for stage in stages)
        carries = exact_last_block or restore or any(stage.merges for stage in stages)
        # Blocks behind the first stage are told to run without the full-length mask; all of them take a carry out.
        first = 0 if carries else min(by_layer)
        for index, block in enumerate(self.blocks(model)):
            if index < first:
                continue
            stage, is_last = by_layer.get(index), index == shape.depth - 1
            swap_class(block, self.block_class)
            block.__dict__["token_prune"] = BlockState(
                stage,
                shape.num_protected,
                shape.has_cls,
                layer=index,
                is_last=is_last,
                proportional=proportional,
                exact=exact_last_block and is_last,
                restore=restore,
            )
            if proportional or (stage is not None and stage.needs):
                enable_capture(self.attention(block))
        hooks = [*self.encoder_hooks, *([StartCarry()] if carries else [])]
        encoder = self.encoder(model)
        handles = [encoder.register_forward_pre_hook(hook, with_kwargs=True) for hook in hooks]
        encoder.__dict__["token_prune_handles"] = handles

    def detach(self, model: PreTrainedModel) -> None:
        """Undo :meth:`attach`, whatever part of it there is."""
        for handle in self.encoder(model).__dict__.pop("token_prune_handles", ()):
            handle.remove()
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


def attend(
    attention: nn.Module, states: Tensor, num_queries: int, output: nn.Module, scaling: float, bias: Tensor | None
) -> Tensor:
    """Attention of the first tokens to all: (B, T, D) -> (B, ``num_queries``, D).

    Args:
        attention: with ``q_proj``, ``k_proj``, ``v_proj``.
        output: its output projection.
        bias: (B, 1, 1, T) added to the logits.
    """
    projections: Any = attention
    inputs = (states[:, :num_queries], states, states)
    query, key, value = (
        projection(x).unflatten(-1, (-1, projections.head_dim)).transpose(1, 2)
        for projection, x in zip((projections.q_proj, projections.k_proj, projections.v_proj), inputs, strict=True)
    )
    mask = None if bias is None else bias.to(query.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    result: Tensor = output(attended.transpose(1, 2).flatten(2))
    return result


def linear_macs(*modules: nn.Module | None) -> int:
    """Multiply-adds of applying the linear layers in ``modules`` to one token."""
    layers = [m for module in modules if module is not None for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(layer.in_features * layer.out_features for layer in layers)


def as_pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size in a config: one number stands for a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
