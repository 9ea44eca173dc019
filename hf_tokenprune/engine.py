"""Where methods and adapters meet: ``prune``, ``unprune`` and ``pruned``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from torch import nn

from .config import PruneConfig, Where, as_config
from .errors import ConfigError, PruneStateError, UnsupportedModelError
from .registry import get_adapter, list_adapters, list_methods
from .signals import DecoderShape, Shape, Stage
from .threads import changing, nobody_runs
from .weights import fitting, put_in, recovery_in, take_out

Model = TypeVar("Model", bound=nn.Module)
KINDS = {"vision": "vision encoders", "decoder": "vision-language models with a decoder"}
ConfigLike = PruneConfig | dict[str, Any] | str | os.PathLike[str]
WRAPPERS = ("module", "_orig_mod", "base_model", "model")
"""Where DataParallel, ``torch.compile``, PEFT and others keep the model that they wrap."""
WHAT_TO_TAKE: dict[str, tuple[dict[str, Any], ...]] = {
    "vision": (
        {"method": "salience_merge"},
        {"method": "salience_merge", "exact_last_block": False},  # the head reads patches
        {"method": "salience_merge", "exact_last_block": False, "salience": "contrast"},  # there is no CLS token
    ),
    "decoder": ({"method": "divprune", "keep_ratio": 1 / 3},),
}
"""What a model without a config of its own is pruned with: the first that it can take (docs/which_method.md)."""


def prune(model: Model, config: ConfigLike | None = None) -> Model:
    """Prune a stock Transformers model in place and return it.

    Object, class and ``state_dict`` stay; ``model.config.prune_config`` is set so that stock saving carries it. If this
    raises, the model is as it was.

    Args:
        model: a ``PreTrainedModel`` of a family with an adapter (``list_adapters``), not pruned, or the
            ``PeftModel`` around one, whose adapters stay.
        config: a ``PruneConfig``, its dictionary, the name of a method or preset, or a path or Hub repository that
            holds a ``prune_config.json``. None: what the checkpoint carries, else what to take, ``default_config``.

    Raises:
        ConfigError: the config is invalid, does not fit this model, or would prune nothing.
        UnsupportedModelError: there is no adapter, or the model's head needs every token.
        PruneStateError: the model is already pruned, or another thread is running it.
    """
    attach(model, config)
    return model


def attach(model: Model, config: ConfigLike | None, short: bool = False) -> None:
    """``prune``; ``short``: tokens leave before the prompt, see ``hf_tokenprune.serving.short_prompts``."""
    config = default_config(model) if config is None else as_config(config)
    with changing:
        stock = unwrapped(model)
        adapter = find_adapter(stock)
        if adapter.states(stock):
            _check_own(stock)
            raise PruneStateError(f"this model is already pruned by {current_config(stock)}; call unprune(model) first")
        shape = adapter.shape(stock)
        stages, asked = plan(config, shape, stacklevel=4), options(config, shape) | ({"short": True} if short else {})
        adapter.check(stock, stages, **asked)
        values = {} if config.recovery is None else fitting(stock, config.recovery)
        with nobody_runs(stock):
            try:
                adapter.attach(stock, stages, **asked)
                for state in adapter.states(stock):
                    state.config = config
                put_in(stock, values)
            except BaseException:
                adapter.detach(stock)
                take_out(stock)
                raise
            # Without a recovery: stock saving writes the values that the parameters have, and no file of them.
            stock.config.prune_config = config.with_recovery(None).to_dict()


def unprune(model: Model) -> Model:
    """Undo ``prune``, also on a copy: the model computes bit for bit what it did before. Returns the model.

    Recovered values are taken out too; ``merge_recovery`` before keeps them.

    Raises:
        PruneStateError: the model is not pruned, or another thread is running it.
        UnsupportedModelError: PEFT has copied pruned parts since (``modules_to_save``).
    """
    with changing:
        stock = unwrapped(model)
        adapter = find_adapter(stock)
        if not adapter.states(stock):
            raise PruneStateError("this model is not pruned; call prune(model, config) first")
        _check_own(stock)
        adapter.check_copies(stock)
        with nobody_runs(stock):
            adapter.detach(stock)
            take_out(stock)
            if hasattr(stock.config, "prune_config"):
                del stock.config.prune_config
    return model


@contextmanager
def pruned(model: Model, config: ConfigLike | None = None) -> Iterator[Model]:
    """Prune for the length of a ``with`` block. A model that was pruned before gets its former config back.

    It is pruned for all threads. Where another one is running it at the end, it stays so, and that is an error.
    """
    config = default_config(model) if config is None else as_config(config)
    stock = unwrapped(model)
    former, carried = current_config(stock), getattr(stock.config, "prune_config", None)
    short = any(getattr(state, "short", False) for state in find_adapter(stock).states(stock))
    if former is not None:
        unprune(model)
    try:
        prune(model, config)
        try:
            yield model
        finally:
            unprune(model)
    finally:
        if current_config(model) is not None:
            pass  # another thread is running it, so it could not be unpruned
        elif former is not None:
            attach(model, former, short)
        elif carried is not None:  # by a dense model that stock from_pretrained loaded
            stock.config.prune_config = carried


def default_config(model: nn.Module) -> PruneConfig:
    """What ``prune(model)`` takes: the config that the checkpoint carries, else the method that loses least by far.

    That is ``salience_merge`` for vision encoders, about 0.6 of the multiply-adds, and for vision-language models
    ``divprune`` with a third of the image tokens.

    Raises:
        ConfigError: what ``model.config.prune_config`` says is no valid config.
        UnsupportedModelError: there is no adapter, or the model cannot be pruned; the message says why.
    """
    model = unwrapped(model)
    adapter = find_adapter(model)
    carried = getattr(model.config, "prune_config", None)
    if carried is not None:
        return PruneConfig.from_dict(carried)  # a string there would be a path or repository to read
    shape = adapter.shape(model)
    for fields in WHAT_TO_TAKE[shape.kind]:
        config = PruneConfig.from_dict(fields)
        try:
            adapter.check(model, plan(config, shape), **options(config, shape))
            return config
        except UnsupportedModelError as error:
            reason = error
    raise reason


def current_config(model: nn.Module) -> PruneConfig | None:
    """The config a model is pruned with, with the recovered values that are in it now; None if it is dense."""
    # Not from model.config: it may be shared with another model, and anybody can write to it.
    stock = unwrapped(model)
    config: PruneConfig | None = next((state.config for state in find_adapter(stock).states(stock)), None)
    return config and config.with_recovery(recovery_in(stock, config.recovery))


def unwrapped(model: nn.Module) -> Any:
    """The model in PEFT's ``PeftModel``, which has the adapters in its layers; any other model as it is.

    Also in one around another (``get_peft_model`` called twice), and in a ``PeftMixedModel``.
    """
    module: Any = model
    while True:  # Asked of the class: attributes of other wrappers, as of torch.compile, may lead to what they wrap.
        if hasattr(type(module), "get_base_model"):
            module = module.get_base_model()
        elif type(module).__name__ == "PeftMixedModel":
            module = module.base_model.model
        else:
            return module


def _check_own(model: nn.Module) -> None:
    """Raise PruneStateError for a pruned model that is a part of the one that was pruned."""
    if current_config(model) is None:
        raise PruneStateError(
            "this vision encoder is pruned together with the model around it; call unprune on that model instead"
        )


def find_adapter(model: nn.Module) -> Any:
    """The adapter for a model, found by ``model.config.model_type``.

    Raises:
        UnsupportedModelError: not a ``PreTrainedModel``, or no adapter for its family; the message says what to do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inner = _way_to_the_model(model)
        hint = f"; pass {inner}, or prune before wrapping" if inner else ""
        raise UnsupportedModelError(f"expected a transformers PreTrainedModel, got {type(model).__name__}{hint}")
    try:
        return get_adapter(model.config.model_type)
    except UnsupportedModelError as error:
        for name, part in model.named_children():  # such as an image encoder beside a text encoder
            if isinstance(part, PreTrainedModel) and part.config.model_type in list_adapters():
                hint = f"or pass model.{name} instead: {part.config.model_type!r} has an adapter"
                raise UnsupportedModelError(f"{error}, {hint}") from None
        raise


def _way_to_the_model(wrapper: nn.Module) -> str:
    """How to get at the model inside wrappers, such as ``"model.module"``; empty if there is none."""
    from transformers import PreTrainedModel

    way, module = "model", wrapper
    while not isinstance(module, PreTrainedModel):
        if callable(getattr(module, "get_base_model", None)):  # PEFT, whose attributes lead past the model's head
            return f"{way}.get_base_model()"
        own = getattr(module, "__dict__", {})  # not by getattr, which a wrapper may send on to what it wraps
        children = {**own, **own.get("_modules", {})}
        name = next((name for name in WRAPPERS if isinstance(children.get(name), nn.Module)), None)
        if name is None:
            return ""
        way, module = f"{way}.{name}", children[name]
    return way


def plan(config: PruneConfig, shape: Shape, stacklevel: int = 3) -> tuple[Stage, ...]:
    """The stages of a config that drop something on a model of this shape; ``stacklevel``: of whom a warning is for.

    Raises:
        ConfigError: the config does not fit the shape, or nothing would be dropped.
        UnsupportedModelError: the method works on another kind of model.
    """
    effective = _effective(config, shape)
    if getattr(config, "exact_last_block", False):  # which prunes, whatever the stages do
        return effective
    if not effective:
        raise ConfigError(
            f"{config} prunes nothing on this model: every layer keeps all {shape.num_prunable} tokens. "
            "Keep less, or leave the model dense"
        )
    last = effective[-1]
    if last.layer == shape.depth - 1 and last.where == "after_block":
        warnings.warn(
            f"pruning after block {last.layer}, the last one, saves no work: no block follows", stacklevel=stacklevel
        )
    return effective


def _effective(config: PruneConfig, shape: Shape) -> tuple[Stage, ...]:
    """``plan``, where nothing need be dropped."""
    if shape.kind not in config.prunes:
        works_on, this = " and ".join(KINDS[kind] for kind in sorted(config.prunes)), KINDS[shape.kind]
        usable = ", ".join(list_methods(shape.kind))
        raise UnsupportedModelError(
            f"method {config.method!r} works on {works_on}; this model is one of the {this}. Methods for it: {usable}"
        )
    stages = config.stages_for(shape)
    layers = [stage.layer for stage in stages if stage.where in get_args(Where)]
    followed = isinstance(shape, DecoderShape)  # tokens leave where the layer behind a stage begins
    noun = "layers" if followed else "blocks"
    if layers != sorted(set(layers)) or not all(0 <= layer < shape.depth - followed for layer in layers):
        raise ConfigError(
            f"{config} prunes in {noun} {layers}: expected ascending ones of 0..{shape.depth - 1 - followed}"
            f"{', each with a layer behind it' if followed else ''}, this model has {shape.depth} {noun}"
        )
    effective = [
        stage for stage, entering, n_keep in counts(stages, shape) if n_keep < entering or drops_of_video(stage)
    ]
    if getattr(config, "exact_last_block", False):  # which reads all tokens, and gives none of them on
        return tuple(stage for stage in effective if stage.layer < shape.depth - 1)
    return tuple(effective)


def drops_of_video(stage: Stage, tokens: int = 100) -> bool:
    """Whether a stage that leaves images whole takes tokens of a video of two frames, of so many ``tokens`` each."""
    return stage.videos_only and stage.num_kept_of(2 * tokens, 2) < 2 * tokens


def plan_on(model: nn.Module, config: PruneConfig, shape: Shape) -> tuple[Stage, ...]:
    """``plan``, where ``prune`` would take it too, and an image loses tokens; ``model`` is not changed.

    Raises:
        ConfigError: the config prunes videos only, and what is counted or timed is a prompt with one image.
        UnsupportedModelError: the adapter refuses it.
    """
    model = unwrapped(model)
    stages, adapter = plan(config, shape), find_adapter(model)
    if not adapter.states(model):  # blocks of a pruned model are no stock ones, which a check would refuse
        adapter.check(model, stages, **options(config, shape))
    if stages and all(stage.videos_only for stage in stages):
        raise ConfigError(
            f"{config.method} prunes videos only, and what is counted or timed is a prompt with one image, of which "
            "nothing leaves. Give a method that prunes images, or time prompts of your own with pruned(model, config)"
        )
    return stages


def options(config: PruneConfig, shape: Shape) -> dict[str, Any]:
    """What a config asks of the adapter besides its stages; empty for most.

    Raises:
        ConfigError: its part for the blocks of the vision tower does not fit them.
    """
    asked: dict[str, Any] = {name: True for name in ("exact_last_block", "restore") if getattr(config, name, False)}
    part = config.tower_part
    if part is not None and isinstance(shape, DecoderShape):
        try:
            tower = _effective(part, shape.encoder)
        except ConfigError as error:
            makes = f"{shape.encoder.depth} of {shape.tower.depth} blocks make the image tokens"
            raise ConfigError(f"in the vision tower, of which {makes}: {error}") from error
        asked |= {"tower": tower} if tower else {}
    return asked


def counts(stages: Iterable[Stage], shape: Shape, num_prunable: int | None = None) -> Iterator[tuple[Stage, int, int]]:
    """(stage, image tokens that enter it, image tokens it leaves) for one image; None: of the checkpoint's own size.

    Protected newline tokens are image tokens here, which every stage leaves; one that prunes videos only leaves all.
    """
    stages = tuple(stages)
    newlines = shape.newline_tokens if isinstance(shape, DecoderShape) else 0
    safe = newlines if any(stage.newlines == "protect" for stage in stages) else 0
    entering = original = (shape.num_prunable if num_prunable is None else num_prunable) - safe
    for stage in stages:
        if stage.where == "vision_tower":
            assert isinstance(shape, DecoderShape)
            kept = stage.num_kept(shape.tower_tokens)
            n_keep = shape.tower_images * kept if kept < shape.tower_tokens else entering
        elif stage.videos_only:
            n_keep = entering
        else:
            n_keep = stage.num_kept(original if stage.counts_from == "original" else entering)
        n_keep = min(n_keep, entering)
        yield stage, entering + safe, n_keep + safe
        entering = n_keep
        if stage.layer < 0:
            original = n_keep
