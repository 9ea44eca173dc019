"""Where methods and adapters meet: ``prune``, ``unprune``, ``pruned`` and ``record``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

from .config import PruneConfig, as_config
from .errors import ConfigError, PruneStateError, UnsupportedModelError
from .registry import get_adapter
from .signals import ModelShape, Stage

Model = TypeVar("Model", bound=nn.Module)
ConfigLike = PruneConfig | dict[str, Any] | str | os.PathLike[str]


def prune(model: Model, config: ConfigLike) -> Model:
    """Prune a stock Transformers model in place and return it.

    Object, class and ``state_dict`` stay; ``model.config.prune_config`` is set so that stock saving carries it. If this
    raises, the model is as it was.

    Args:
        model: a ``PreTrainedModel`` of a family with an adapter (:func:`list_adapters`), not pruned.
        config: a :class:`PruneConfig`, its dictionary, or a path or Hub repository that holds a ``prune_config.json``.

    Raises:
        ConfigError: the config is invalid, does not fit this model, or would prune nothing.
        UnsupportedModelError: there is no adapter, or the model's head needs every token.
        PruneStateError: the model is already pruned.
    """
    config = as_config(config)
    adapter = find_adapter(model)
    if adapter.pruned_blocks(model):
        raise PruneStateError(f"this model is already pruned by {current_config(model)}; call unprune(model) first")
    stages = plan(config, adapter.shape(model))
    adapter.check(model, stages)
    try:
        adapter.attach(model, stages)
        for block in adapter.pruned_blocks(model).values():
            block.token_prune.config = config
    except BaseException:
        adapter.detach(model)
        raise
    model.config.prune_config = config.to_dict()  # type: ignore[union-attr]
    return model


def unprune(model: Model) -> Model:
    """Undo :func:`prune`, also on a copy: the model computes bit for bit what it did before. Returns the model.

    Raises:
        PruneStateError: the model is not pruned.
    """
    adapter = find_adapter(model)
    if not adapter.pruned_blocks(model):
        raise PruneStateError("this model is not pruned; call prune(model, config) first")
    adapter.detach(model)
    if hasattr(model.config, "prune_config"):
        del model.config.prune_config
    return model


@contextmanager
def pruned(model: Model, config: ConfigLike) -> Iterator[Model]:
    """Prune for the length of a ``with`` block. A model that was pruned before gets its former config back."""
    config = as_config(config)
    former, carried = current_config(model), getattr(model.config, "prune_config", None)
    if former is not None:
        unprune(model)
    try:
        prune(model, config)
        try:
            yield model
        finally:
            unprune(model)
    finally:
        if former is not None:
            prune(model, former)
        elif carried is not None:  # by a dense model that stock from_pretrained loaded
            model.config.prune_config = carried  # type: ignore[union-attr]


def current_config(model: nn.Module) -> PruneConfig | None:
    """The config a model is pruned with, or None if it is dense."""
    # Not from model.config: it may be shared with another model, and anybody can write to it.
    blocks = find_adapter(model).pruned_blocks(model)
    return next((block.token_prune.config for block in blocks.values()), None)


def find_adapter(model: nn.Module) -> Any:
    """The adapter for a model, found by ``model.config.model_type``.

    Raises:
        UnsupportedModelError: not a ``PreTrainedModel``, or no adapter for its family; the message says what to do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        wrappers = ("module", "_orig_mod", "base_model", "model")
        inner = next((name for name in wrappers if isinstance(getattr(model, name, None), nn.Module)), "")
        hint = f"; pass model.{inner}, or prune before wrapping" if inner else ""
        raise UnsupportedModelError(f"expected a transformers PreTrainedModel, got {type(model).__name__}{hint}")
    return get_adapter(model.config.model_type)


def plan(config: PruneConfig, shape: ModelShape) -> tuple[Stage, ...]:
    """The stages of a config that drop something on a model of this shape.

    Raises:
        ConfigError: the config does not fit the shape, or nothing would be dropped.
    """
    stages = config.stages(shape)
    layers = [stage.layer for stage in stages]
    if layers != sorted(set(layers)) or not all(0 <= layer < shape.depth for layer in layers):
        raise ConfigError(
            f"{config} prunes in blocks {layers}: expected ascending ones of 0..{shape.depth - 1}, "
            f"this model has {shape.depth} blocks"
        )
    remaining = shape.num_patches
    effective = []
    for stage in stages:
        n_keep = stage.num_kept(remaining)
        if n_keep < remaining:
            effective.append(stage)
        remaining = n_keep
    if not effective:
        raise ConfigError(
            f"{config} prunes nothing on this model: every layer keeps all {shape.num_patches} tokens. "
            "Lower keep_ratios, or leave the model dense"
        )
    last = effective[-1]
    if last.layer == shape.depth - 1 and last.where == "after_block":
        warnings.warn(f"pruning after block {last.layer}, the last one, saves no work: no block follows", stacklevel=3)
    return tuple(effective)


class LayerDict(Mapping[str, Any]):
    """Values by block, in order. Keys are strings ("3"); looking up an int works too."""

    def __init__(self, values: Mapping[int, Any]) -> None:
        self._values = {str(layer): values[layer] for layer in sorted(values)}

    def __getitem__(self, layer: str | int) -> Any:
        return self._values[str(layer)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"LayerDict({self._values!r})"


class Record:
    """What happened in the last forward inside :func:`record`."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._local: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

    def on_start(self) -> None:
        self._local.clear()
        self._lengths.clear()

    def on_reduction(self, layer: int, keep: Tensor) -> None:
        self._local[layer] = keep

    def on_block(self, layer: int, num_tokens: int) -> None:
        self._lengths[layer] = num_tokens

    @property
    def kept(self) -> LayerDict:
        """By pruned layer: (B, n) int64, ascending positions among the ORIGINAL prunable tokens."""
        kept: dict[int, Tensor] = {}
        original: Tensor | None = None
        for layer in sorted(self._local):
            keep = self._local[layer]
            original = keep if original is None else original.gather(1, keep)
            kept[layer] = original
        return LayerDict(kept)

    @property
    def tokens(self) -> LayerDict:
        """By block: number of tokens that entered it, protected ones included."""
        return LayerDict(self._lengths)

    def summary(self) -> str:
        """A table with a row a block: tokens that entered, and prunable tokens that its pruning layer kept."""
        if not self._lengths:
            return "nothing recorded yet: call the model inside the with block"
        rows = [f"{'block':>5}  {'tokens in':>9}  {'kept':>5}"]
        kept = self.kept
        for layer in range(self.depth):
            n = kept[layer].shape[1] if layer in self._local else ""
            rows.append(f"{layer:>5}  {self._lengths.get(layer, '-'):>9}  {n:>5}")
        return "\n".join(rows)


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record which tokens stay at every pruned layer, for the forwards inside a ``with`` block (the last one counts).

    Raises:
        PruneStateError: the model is not pruned.
    """
    adapter = find_adapter(model)
    changed = adapter.pruned_blocks(model)
    if not changed:
        raise PruneStateError(
            "this model is not pruned, so there is nothing to record; call prune(model, config) first"
        )
    blocks = adapter.blocks(model)
    rec = Record(len(blocks))

    def count(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rec.on_block(layer, args[0].shape[1])

        return hook

    with ExitStack() as undo:
        # Not with block 0: gradient checkpointing may call the blocks once more, last one first.
        undo.callback(adapter.encoder(model).register_forward_pre_hook(lambda *_: rec.on_start()).remove)
        for layer, block in enumerate(blocks):
            undo.callback(block.register_forward_pre_hook(count(layer)).remove)
        for block in changed.values():
            undo.callback(setattr, block.token_prune, "recorder", block.token_prune.recorder)
            block.token_prune.recorder = rec
        yield rec
