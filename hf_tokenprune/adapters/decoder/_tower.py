"""Choosing image tokens in the vision tower of a vision-language model, where its attention is.

The tower's output stays full length, as the projector, ``generate`` (which encodes images before the first forward) and
user-held features expect. A dropped token's state becomes NaN: it stays NaN through the projector, wherever the
features travel, and the decoder takes it out at its entrance. Should it ever not, the logits say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...signals import Stage
from ...tokens import with_protected
from .._capture import CAPTURE_ARGUMENT, Capture, disable_capture, enable_capture

HAS_CLS = {"clip_vision_model": True, "vit": True, "siglip_vision_model": False}
"""Vision towers whose blocks are known, by ``model_type``, and whether token 0 is a CLS token."""


@dataclass
class StartCapture:
    """Forward pre-hook of the tower: sends a :class:`Capture` along."""

    stage: Stage

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, CAPTURE_ARGUMENT: Capture(self.stage.needs)}


class CaptureAsMask:
    """Forward pre-hook of the scoring attention: SigLIP's hands a mask on to the attention function, nothing else."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        capture = kwargs.pop(CAPTURE_ARGUMENT, None)
        states = args[0] if args else kwargs.pop("hidden_states")
        return (states,), {**kwargs, "attention_mask": capture}


@dataclass
class MarkDropped:
    """Forward hook of the tower: the states that ``stage`` drops become NaN in the hidden state of ``layer``.

    Of the first ``num_protected`` tokens nothing is asked: a CLS token, or a patch that is no feature of this model.
    """

    stage: Stage
    layer: int
    has_cls: bool
    num_protected: int

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        selected = output.hidden_states[self.layer]
        if selected is None:
            raise UnsupportedModelError(
                f"{type(self.stage).__name__} chooses tokens in vision_feature_layer={self.layer}, the layer that the "
                "model's config names; the call asks for another one. Leave the argument out"
            )
        num_protected = self.num_protected
        n_keep = self.stage.num_kept(selected.shape[1] - num_protected)
        with torch.autocast(selected.device.type, enabled=False):
            signals = kwargs[CAPTURE_ARGUMENT].signals(selected, selected, num_protected, self.has_cls)
            reduction = self.stage.reduce(signals, n_keep)
        states = mark(
            selected, with_protected(reduction.keep, num_protected), reduction.tokens, reduction.keep + num_protected
        )
        hidden = list(output.hidden_states)
        hidden[self.layer] = states
        output.hidden_states = tuple(hidden)
        return output


class HideMarks:
    """Forward pre-hook of the projector: 0 for NaN, which would make its gradients NaN."""

    def __call__(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].masked_fill(args[0].isnan(), 0),)


class RestoreMarks:
    """Forward hook of the projector: tokens that came in as all zero go out as NaN again."""

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        # accelerate moves what enters the projector behind the hooks
        return torch.where((args[0] == 0).all(-1, keepdim=True).to(output.device), torch.nan, output)


def mark(states: Tensor, keep: Tensor, tokens: Tensor | None, index: Tensor) -> Tensor:
    """``states`` (I, T, D), NaN everywhere but at ``keep`` (I, m), with ``tokens`` (I, n, D), if any, at ``index``."""
    stays = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device).scatter_(1, keep, True)
    if tokens is not None:
        states = states.scatter(1, index.unsqueeze(-1).expand_as(tokens), tokens.to(states.dtype))
    return torch.where(stays.unsqueeze(-1), states, torch.nan)


def scoring_attention(tower: PreTrainedModel, feature_layer: int | list[int]) -> nn.Module:
    """The attention module of the block that makes the features.

    Raises:
        UnsupportedModelError: an unknown tower, one that is pruned itself, or features of several layers.
    """
    kind = tower.config.model_type
    if kind not in HAS_CLS:
        raise UnsupportedModelError(
            f"the vision tower is a {kind!r}; methods that choose tokens there know {', '.join(sorted(HAS_CLS))}. "
            "Use one that works in the decoder, such as divprune"
        )
    blocks: Any = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    if not isinstance(feature_layer, int) or feature_layer == 0 or not -len(blocks) <= feature_layer <= len(blocks):
        raise UnsupportedModelError(
            f"vision_feature_layer={feature_layer}: methods that choose tokens in the vision tower need one block's "
            "output as features. Use one that works in the decoder, such as divprune"
        )
    if any(hasattr(block, "token_prune") for block in blocks):
        raise UnsupportedModelError(
            "the vision tower is pruned itself, and methods that choose tokens in it read the attention of all its "
            "tokens. Use one that works in the decoder, such as divprune, or call unprune on the tower first"
        )
    block = blocks[feature_layer - 1 if feature_layer > 0 else feature_layer + len(blocks)]
    attention: nn.Module = getattr(block, "self_attn", None) or block.attention
    return attention


def attach_tower(
    tower: PreTrainedModel, projector: nn.Module, stage: Stage, feature_layer: int, select_strategy: str
) -> list[Any]:
    """Make the tower choose; returns handles of the hooks."""
    attention = scoring_attention(tower, feature_layer)
    enable_capture(attention)
    has_cls = HAS_CLS[tower.config.model_type]
    # "default" drops the first token behind the tower, also where it is a patch that could have been chosen.
    mark_dropped = MarkDropped(stage, feature_layer, has_cls, int(has_cls or select_strategy == "default"))
    return [
        attention.register_forward_pre_hook(CaptureAsMask(), with_kwargs=True),
        projector.register_forward_pre_hook(HideMarks()),
        projector.register_forward_hook(RestoreMarks()),
        tower.register_forward_pre_hook(StartCapture(stage), with_kwargs=True),
        tower.register_forward_hook(mark_dropped, with_kwargs=True),
    ]


def detach_tower(tower: PreTrainedModel, feature_layer: int) -> None:
    """Undo :func:`attach_tower`, but for its hooks."""
    disable_capture(scoring_attention(tower, feature_layer))
