"""Choosing image tokens in the vision tower of a vision-language model, where its attention is.

The tower's output stays full length, as the projector, ``generate`` (which encodes images before the first forward) and
user-held features expect. A dropped token's state becomes NaN: it stays NaN through the projector, wherever the
features travel, and the decoder takes it out at its entrance. Should it ever not, the logits say so.

Where squares of patches become one token, that token is what is chosen: attention that its patches draw adds up, and
all of them leave together.

Axes: I images, P protected states, N patches, n tokens, s side of a square, H heads, D width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...signals import Signals, Stage
from ...tokens import with_protected
from .._capture import CURRENT, Capture, enable_capture
from .._swap import with_copies
from ._told import tell_reduction

HAS_CLS = {
    "clip_vision_model": True,
    "idefics3_vision": False,
    "internvl_vision": True,
    "siglip_vision_model": False,
    "smolvlm_vision": False,
    "vit": True,
}
"""Vision towers whose blocks are known, by ``model_type``, and whether token 0 is a CLS token."""


@dataclass(frozen=True)
class Squares:
    """Which patches become one token: ``side`` × ``side`` of them.

    Attributes:
        raster: the patches of an image, which is a square, come row by row; else those of one token come together.
    """

    side: int = 1
    raster: bool = True

    def split(self, patches: Tensor, dim: int) -> Tensor:
        """(..., N, ...) as (..., n, s², ...), tokens row by row; ``dim`` is not negative."""
        if self.side == 1 or not self.raster:
            return patches.unflatten(dim, (-1, self.side**2))
        across = math.isqrt(patches.shape[dim]) // self.side
        grid = patches.unflatten(dim, (across, self.side, across, self.side))
        return grid.transpose(dim + 1, dim + 2).flatten(dim + 2, dim + 3).flatten(dim, dim + 1)

    def join(self, tokens: Tensor) -> Tensor:
        """(I, n, s², D) as (I, N, D): undoes ``split``."""
        if self.side == 1 or not self.raster:
            return tokens.flatten(1, 2)
        across = math.isqrt(tokens.shape[1])
        grid = tokens.unflatten(2, (self.side, self.side)).unflatten(1, (across, across))
        return grid.transpose(2, 3).flatten(1, 4)

    def of_signals(self, found: Mapping[str, Tensor], num_protected: int = 0) -> dict[str, Tensor]:
        """What was captured of patches, (I, H, P + N, ...), as of tokens, (I, H, P + n, ...).

        Attention adds up, so that shares sum to 1 as before; queries, keys and values are averaged.
        """
        if self.side == 1:
            return dict(found)
        of_tokens = {}
        for name, of_patches in found.items():
            split = self.split(of_patches[:, :, num_protected:].float(), 2)
            merged = split.sum(3) if name.endswith("attention") else split.mean(3)
            of_tokens[name] = torch.cat([of_patches[:, :, :num_protected].float(), merged], 2)
        return of_tokens


@dataclass
class StartCapture:
    """Forward pre-hook of the tower: its scoring attention finds where to put what it finds."""

    stage: Stage

    def __call__(self, module: nn.Module, args: Any) -> None:
        CURRENT.set(Capture(self.stage.needs))


@dataclass
class Choice:
    """Forward hook of the tower, also where that raises: states that ``stage`` drops become NaN in its output."""

    stage: Stage
    recorders: list[Any] = field(default_factory=list, compare=False, kw_only=True)

    chooses_tokens: ClassVar[bool] = True
    """What an adapter of the tower by itself knows this hook by."""

    by_position: ClassVar[tuple[str, ...]] = ("pixel_values",)
    """What the first arguments of the tower are called."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        capture = CURRENT.get()
        CURRENT.set(None)
        if isinstance(output, tuple):
            raise UnsupportedModelError(
                f"{type(self.stage).__name__} marks what leaves in the output of the vision tower, by its names: call "
                "the tower with return_dict=True"
            )
        if output is not None:
            assert capture is not None
            call = {**dict(zip(self.by_position, args, strict=False)), **kwargs}
            with torch.autocast(output.last_hidden_state.device.type, enabled=False):
                self.choose(capture, call, output)

    def choose(self, capture: Capture, call: dict[str, Any], output: Any) -> None:
        """Mark what leaves in ``output`` of the tower, whose arguments were ``call``."""
        raise NotImplementedError

    def marked(self, signals: Signals) -> Tensor:
        """``signals.tokens`` (I, P + n, D), NaN where they leave, and with new states where the stage merges."""
        tokens, num_protected = signals.tokens, signals.num_protected
        reduction = self.stage.reduce(signals, self.stage.num_kept(tokens.shape[1] - num_protected))
        for recorder in self.recorders:
            tell_reduction(recorder, self.stage.name, reduction)
        keep = with_protected(reduction.keep, num_protected)
        return mark(tokens, keep, reduction.tokens, reduction.keep + num_protected)


@dataclass
class ChooseStates(Choice):
    """Of towers that give images of one size, whose patches' states are features, or squares of them behind the tower.

    To the method a token is the states of its patches side by side, as it is to the projector.

    Attributes:
        layer: number of the hidden state that makes the features; None: what the tower gives out in the end.
        has_cls: whether state 0 is of a CLS token.
        num_protected: the first states, of which nothing is asked: CLS, or a patch that is no feature of this model.
        squares: which patches become one token.
    """

    layer: int | None
    has_cls: bool
    num_protected: int
    squares: Squares

    def choose(self, capture: Capture, call: dict[str, Any], output: Any) -> None:
        selected = output.last_hidden_state if self.layer is None else output.hidden_states[self.layer]
        if selected is None:
            raise UnsupportedModelError(
                f"{type(self.stage).__name__} chooses tokens in vision_feature_layer={self.layer}, the layer that the "
                "model's config names; the call asks for another one. Leave the argument out"
            )
        first, side = self.num_protected, self.squares.side
        patches = self.squares.split(selected[:, first:], 1)  # (I, n, s², D)
        tokens = torch.cat([selected[:, :first].repeat(1, 1, side**2), patches.flatten(2)], 1)
        found = self.squares.of_signals({name: of for block in capture.found for name, of in block.items()}, first)
        if "tower_features" in self.stage.needs:
            found["tower_features"] = patches.detach().float().mean(2)
        capture.found = [found]
        signals = capture.signals(tokens, tokens, first, self.has_cls)
        height, width = call["pixel_values"].shape[-2:]
        tokens = self.marked(replace(signals, columns=round(math.sqrt(patches.shape[1] * width / height))))
        patches = self.squares.join(tokens[:, first:].unflatten(2, (side**2, -1)))
        states = torch.cat([tokens[:, :first, : selected.shape[2]], patches], 1)
        if self.layer is None:
            output.last_hidden_state = states
        else:
            hidden = list(output.hidden_states)
            hidden[self.layer] = states
            output.hidden_states = tuple(hidden)


@dataclass
class ChooseMerged(Choice):
    """Of towers that pack images of any size in one sequence, and merge squares of patches at their end.

    The method sees every image, or frame of a video, on its own: the merged tokens, without a CLS token.

    Attributes:
        squares: which patches become one token.
        raster: of the tower's arguments: where in the order of the blocks each token of the output stands,
            (n,) int64; None: in the same order.
    """

    by_position: ClassVar = ("hidden_states", "grid_thw")

    squares: Squares
    raster: Callable[[dict[str, Any]], Tensor] | None = None

    def choose(self, capture: Capture, call: dict[str, Any], output: Any) -> None:
        features = output.pooler_output  # (n of all images, D)
        pieces_of = defaultdict(list)
        for found in capture.found:  # of each block, image by image
            for name, piece in found.items():
                pieces_of[name].append(piece)
        packed = {name: torch.cat(pieces, 2) for name, pieces in pieces_of.items()}
        signals = {name: of_tokens.to(features.device) for name, of_tokens in self.squares.of_signals(packed).items()}
        if "tower_features" in self.stage.needs:
            patches = output.last_hidden_state.detach().to(features.device).float()  # from in front of the merger
            signals["tower_features"] = patches.unflatten(0, (len(features), -1)).mean(1)[None, None]
        if self.raster is not None:
            order = self.raster(call).to(features.device)
            signals = {name: of_tokens.index_select(2, order) for name, of_tokens in signals.items()}
        grids = call["grid_thw"].tolist()  # every frame is attended by itself
        side = self.squares.side
        shapes = [(rows // side, columns // side) for frames, rows, columns in grids for _ in range(frames)]
        lengths = [math.prod(shape) for shape in shapes]
        images = list(features.split(lengths))
        pieces = {name: of_tokens.split(lengths, 2) for name, of_tokens in signals.items()}
        alike = defaultdict(list)
        for i, shape in enumerate(shapes):
            alike[shape].append(i)
        for (_, columns), members in alike.items():
            tokens = torch.stack([images[i] for i in members])
            of_these: dict[str, Any] = {name: torch.cat([each[i] for i in members]) for name, each in pieces.items()}
            if "tower_features" in of_these:
                of_these["tower_features"] = of_these["tower_features"].squeeze(1)
            marked = self.marked(Signals(tokens, tokens, 0, False, columns=columns, **of_these))
            for i, states in zip(members, marked, strict=True):
                images[i] = states
        output.pooler_output = torch.cat(images)


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


def scoring_attention(tower: PreTrainedModel, block: int) -> nn.Module:
    """The attention module of a block.

    Raises:
        UnsupportedModelError: the tower is pruned itself.
    """
    blocks: Any = tower_blocks(tower)
    if any(hasattr(block, "token_prune") for block in blocks):
        raise UnsupportedModelError(
            "the vision tower is pruned itself, and methods that choose tokens in it read the attention of all its "
            "tokens. Use one that works in the decoder, such as divprune, or call unprune on the tower first"
        )
    names = ("self_attn", "attention", "attn")
    return next(getattr(blocks[block], name) for name in names if hasattr(blocks[block], name))


def tower_blocks(tower: nn.Module) -> nn.ModuleList:
    """The blocks of a vision tower, in order."""
    return next(module for module in tower.modules() if isinstance(module, nn.ModuleList))


def feature_block(tower: PreTrainedModel, feature_layer: int | list[int] | None) -> int:
    """Index of the block whose output is the ``feature_layer``-th hidden state; of the last one for None.

    Raises:
        UnsupportedModelError: an unknown tower, features of several layers, or of no block.
    """
    kind, depth = tower.config.model_type, len(tower_blocks(tower))
    if kind not in HAS_CLS:
        raise UnsupportedModelError(
            f"the vision tower is a {kind!r}; methods that choose tokens there know {', '.join(sorted(HAS_CLS))}. "
            "Use one that works in the decoder, such as divprune"
        )
    if feature_layer is None:
        return depth - 1
    if not isinstance(feature_layer, int) or feature_layer == 0 or not -depth <= feature_layer <= depth:
        raise UnsupportedModelError(
            f"vision_feature_layer={feature_layer}: methods that choose tokens in the vision tower need one block's "
            "output as features. Use one that works in the decoder, such as divprune"
        )
    return feature_layer - 1 if feature_layer > 0 else feature_layer + depth


def attach_tower(tower: PreTrainedModel, block: int, projector: nn.Module, choice: Choice) -> list[Any]:
    """Make the tower choose by the attention of a ``block``, as far as it needs any; returns handles of the hooks."""
    stage = choice.stage
    if own := stage.needs - {"tower_features", "earlier_attention"}:
        enable_capture(scoring_attention(tower, block), own)
    if "earlier_attention" in stage.needs:
        enable_capture(scoring_attention(tower, stage.earlier_block), frozenset({"earlier_attention"}))
    handles = [
        tower.register_forward_pre_hook(StartCapture(choice.stage)),
        tower.register_forward_hook(choice, with_kwargs=True, always_call=True),
    ]
    if isinstance(choice, ChooseStates):  # else the projector is a part of the tower
        for each in with_copies(projector):  # which outlive their wrapper
            handles += [each.register_forward_pre_hook(HideMarks()), each.register_forward_hook(RestoreMarks())]
    return handles


def detach_projector(projector: nn.Module) -> None:
    """Remove the hooks of ``attach_tower`` from the copies too that PEFT has made since."""
    for each in with_copies(projector):
        for hooks in (each._forward_pre_hooks, each._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (HideMarks, RestoreMarks))]:
                del hooks[key]
