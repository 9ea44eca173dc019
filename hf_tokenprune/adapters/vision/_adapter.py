"""What encoders of image patches share: blocks that drop tokens, and putting them into a model and taking them out.

A family (one file) names its stock block class, restates that block's two halves, and tells the shape of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import DOCS, UnsupportedModelError
from ...signals import ModelShape, Stage
from .._capture import disable_capture, enable_capture, is_captured
from .._swap import check_copies, check_swappable, own_class, swap_class
from .._views import ImageView, raster
from ._block import BlockState, PrunedVisionBlock, Recorder
from ._carry import RestoreStates, StartCarry, check_bias

READ = (
    "is read by the method that prunes the model around it; call unprune on that model first, or prune it with a "
    "method that works in the decoder, such as divprune"
)


class VisionAdapter:
    """Base of the adapters of vision encoders. One instance serves all models of its family."""

    block_class: ClassVar[type[PrunedVisionBlock]]
    """The family's ``PrunedVisionBlock``."""
    provides: ClassVar[frozenset[str]] = frozenset({"attention", "cls_attention", "queries", "keys", "values"})
    full_grid_heads: ClassVar[dict[type[PreTrainedModel], str]] = {}
    """Model classes that cannot work on fewer tokens, and why."""
    restored_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = ()
    """Those of ``full_grid_heads`` that can work where the last block restores all tokens."""
    protected_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = ()
    """Model classes that read protected tokens only after the last block."""
    pooling_heads: ClassVar[tuple[type[PreTrainedModel], ...]] = ()
    """Model classes that pool all patches after the last block: where tokens were merged, they get all of them back."""
    no_graph: ClassVar[str] = ""
    """Why there is no graph for batches of any size, and what to do; empty: there is one."""
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

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        """How the model sees an image of ``size`` (height, width) pixels, of which ``inputs`` were made."""
        (pixels,) = inputs["pixel_values"]
        rows, columns = (n // side for n, side in zip(pixels.shape[-2:], self.shape(model).patch_size, strict=True))
        return [ImageView(raster((rows, columns)), pixels)]

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
        for stage in stages:
            missing = stage.needs - self.provides
            if missing:
                reason = "" if self.shape(model).has_cls else ", having no CLS token"
                raise UnsupportedModelError(
                    f"{stage.title} needs {', '.join(sorted(missing))}, which the adapter for "
                    f"{model.config.model_type!r} does not provide{reason} (it provides: "
                    f"{', '.join(sorted(self.provides))}); {DOCS}/methods.md lists the methods for each family"
                )
        if exact_last_block and own_class(model) not in self.protected_heads:
            names = ", ".join(sorted(head.__name__ for head in self.protected_heads)) or "none of this family"
            raise UnsupportedModelError(
                f"exact_last_block: {own_class(model).__name__} reads patches after the last block; use "
                f"exact_last_block=False (True works for {names})"
            )
        carries = needs_carry(stages, exact_last_block, restore)
        parameters = inspect.signature(self.block_class.stock_class.forward).parameters.values()
        if carries and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            raise UnsupportedModelError(
                f"blocks of {model.config.model_type!r} take no keyword arguments in this version of transformers; "
                "merging, exact_last_block, restore and where='queries' need them: pip install -U transformers"
            )
        for stage in stages:
            if stage.where == "queries" and stage.needs & {"attention", "queries"}:
                raise UnsupportedModelError(
                    f"{stage.title} needs {', '.join(sorted(stage.needs))}, but with where='queries' tokens "
                    'leave before there are queries of all; use where="mid_block"'
                )
        if any(stage.proportional for stage in stages):
            check_bias(self.encoder(model).config._attn_implementation)
        self.check_copies(model)
        for index, block in enumerate(self.blocks(model)):
            check_swappable(block, self.block_class.stock_class, f"block {index}")
            if is_captured(self.attention(block)):
                raise UnsupportedModelError(f"the attention of block {index} {READ}")
        if any(getattr(hook, "chooses_tokens", False) for hook in model._forward_hooks.values()):
            raise UnsupportedModelError(f"the output of this encoder {READ}")

    def check_copies(self, model: PreTrainedModel) -> None:
        """Raise UnsupportedModelError where PEFT keeps copies of what pruning changes, or has changed."""
        check_copies(model, self.blocks(model))

    def attach(
        self,
        model: PreTrainedModel,
        stages: tuple[Stage, ...],
        *,
        exact_last_block: bool = False,
        restore: bool = False,
    ) -> None:
        """Make the blocks from the first pruning layer on pruned ones. Call ``check`` before.

        Args:
            exact_last_block: it computes for protected tokens only what the head reads.
            restore: the last block gives every patch a state again; so do hidden states of the others.
        """
        shape, encoder = self.shape(model), self.encoder(model)
        by_layer = {stage.layer: stage for stage in stages}
        proportional = any(stage.proportional for stage in stages)
        carries = needs_carry(stages, exact_last_block, restore)
        states_hook = RestoreStates(shape.num_protected) if restore else None
        # A mean or an attention over merged tokens would not count their sizes; over restored patches it does.
        restore = restore or (any(stage.merges for stage in stages) and isinstance(model, self.pooling_heads))
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
                num_heads=shape.num_heads,
                proportional=proportional,
                exact=exact_last_block and is_last,
                restore=restore,
            )
            if proportional or (stage is not None and stage.needs and stage.where != "queries"):
                enable_capture(self.attention(block))
        hooks = [*self.encoder_hooks, *([StartCarry(proportional)] if carries else [])]
        handles = [encoder.register_forward_pre_hook(hook, with_kwargs=True) for hook in hooks]
        if states_hook is not None:
            handles.append(encoder.register_forward_hook(states_hook, with_kwargs=True))
        encoder.__dict__["token_prune_handles"] = handles

    def detach(self, model: PreTrainedModel) -> None:
        """Undo ``attach``, whatever part of it there is."""
        for handle in self.encoder(model).__dict__.pop("token_prune_handles", ()):
            handle.remove()
        for block in self.pruned_blocks(model).values():
            disable_capture(self.attention(block))
            swap_class(block, self.block_class.stock_class)
            block.__dict__.pop("token_prune", None)  # an interrupted attach may not have come to it

    def pruned_blocks(self, model: PreTrainedModel) -> dict[int, PrunedVisionBlock]:
        """The blocks that ``attach`` has changed, by index."""
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
                state.recorders.append(recorder)
                undo.callback(state.recorders.remove, recorder)
            yield


def needs_carry(stages: tuple[Stage, ...], exact_last_block: bool, restore: bool) -> bool:
    """Whether blocks of one forward have something to tell each other."""
    return exact_last_block or restore or any(stage.merges or stage.where == "queries" for stage in stages)
