"""Tiny random vision-language models of every registered family with a decoder, prompts with images for them, and a
config of every method that fits their depth. Families, language models and methods all come from the registries."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from hf_tokenprune import PruneConfig, list_adapters
from hf_tokenprune.adapters.decoder import LAYER_CLASSES, DecoderAdapter
from hf_tokenprune.engine import plan
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.signals import DecoderShape, Stage

from . import decoder_visuals
from .copies import copier
from .decoder_prompts import collate as collate
from .decoder_prompts import is_image as is_image
from .decoder_prompts import sample as sample
from .decoder_visuals import IMAGE as IMAGE
from .decoder_visuals import SPECIAL, VOCABULARY, Inputs
from .decoder_visuals import VIDEO as VIDEO
from .decoder_visuals import image_features as image_features
from .decoder_visuals import video_features as video_features
from .families import methods_for, with_choices

FAMILIES = [name for name in list_adapters() if isinstance(get_adapter(name), DecoderAdapter)]
T = TypeVar("T")
DEPTH = 8
KEY_VALUE_HEADS = {"llama": 4, "mistral": 1}
"""Of four heads; two where a language model is not named: grouped queries."""


# -- models ----------------------------------------------------------------------------------------------------------


@functools.cache
def texts_of(family: str) -> list[str]:
    """The language models that a family can have and decoders are known for; the one of the stock config first."""
    stock = AutoConfig.for_model(family)
    own = stock.text_config.model_type
    if stock.sub_configs["text_config"] is not AutoConfig or stock.text_config.base_config_key:
        return [own]
    parts = {name for name in LAYER_CLASSES if AutoConfig.for_model(name).base_config_key}  # of other families
    return [own, *sorted(LAYER_CLASSES.keys() - parts - {own})]


TEXTS = [(family, text) for family in FAMILIES for text in texts_of(family)]
"""Every family with every language model it can have."""
OF_TEXT = {text: family for family, text in reversed(TEXTS)}
"""A family for every language model: for what depends on its layers alone."""


def takes_any_tower(family: str) -> bool:
    """Whether the vision tower of a family is of any kind, by its stock config."""
    return AutoConfig.for_model(family).sub_configs["vision_config"] is AutoConfig


def tiny_vlm(family: str, text: str | None = None, *, attention: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A model with random weights, attention far from uniform and features that differ, in eval mode.

    Args:
        family: a key of ``decoder_visuals.FAMILIES``.
        text: ``model_type`` of its language model; None: that of its stock config.
        overrides: fields of its config; those of ``text_config`` and ``vision_config`` add to the tiny ones.
    """
    if overrides:
        return _build(family, text, attention, overrides)
    return _copier(family, text, attention)()


@functools.cache
def _copier(family: str, text: str | None, attention: str) -> Callable[[], PreTrainedModel]:
    return copier(built(family, text, attention))


@functools.cache
def built(family: str, text: str | None = None, attention: str = "sdpa") -> PreTrainedModel:
    """What ``tiny_vlm`` copies: one model for all tests, to be looked at and never changed."""
    return _build(family, text, attention, {})


def _build(family: str, text: str | None, attention: str, overrides: dict[str, Any]) -> PreTrainedModel:
    tiny, model_type = decoder_visuals.FAMILIES[family], family.partition("+")[0]
    stock = AutoConfig.for_model(model_type)
    text = text or stock.text_config.model_type
    text_config = {
        "model_type": text,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "num_key_value_heads": KEY_VALUE_HEADS.get(text, 2),
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    vision_config = {
        "model_type": stock.vision_config.model_type,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        **({"depth": 3} if hasattr(stock.vision_config, "depth") else {}),  # the same, which 5.17 knows by this name
        "num_attention_heads": 2,
        "image_size": 20,
        "patch_size": 4,
        "vision_use_head": False,
    }
    fields: dict[str, Any] = {name: token for name, token in SPECIAL.items() if hasattr(stock, name)} | tiny.fields
    for name, config, own in (("text_config", text_config, tiny.text), ("vision_config", vision_config, tiny.vision)):
        fields[name] = config | own | overrides.get(name, {})
    if hasattr(stock, "image_grid_pinpoints"):
        side = fields["vision_config"]["image_size"]
        fields["image_grid_pinpoints"] = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    rest = {name: value for name, value in overrides.items() if not name.endswith("_config")}
    config = AutoConfig.for_model(model_type, **{"tie_word_embeddings": False, **fields, **rest})
    config._attn_implementation = attention
    model = AutoModelForImageTextToText.from_config(config).eval()
    spread(model)
    # A generated placeholder would ask for an image that nobody has given.
    model.generation_config.suppress_tokens = sorted(set(SPECIAL.values()))
    model.generation_config.pad_token_id = 0
    return model


def spread(model: PreTrainedModel) -> None:
    """Weights of a size that makes tokens, attention and logits differ by a lot; biases and norms that do something."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"q_proj": 1.2, "k_proj": 1.2, "embed_tokens": 4, "linear_attn.out_proj": 0.25}
    # Recurrent layers bring small states to size one, and sums of their decays: both round off.
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.1 * noise)  # to what is stock, 1 or 0
            elif parameter.dim() > 1:
                size = next((size for part, size in sizes.items() if part in name), 1)
                parameter.copy_(noise * size * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise - (3 if name.endswith("A_log") else 0))


def shape_of(model: PreTrainedModel) -> DecoderShape:
    """Of a model and one image "I"."""
    return adapter_of(model).shape(model, decoder_visuals.family_of(model).size(model, "I"))


def adapter_of(model: PreTrainedModel) -> DecoderAdapter:
    adapter: DecoderAdapter = get_adapter(model.config.model_type)
    return adapter


def small_size(model: PreTrainedModel) -> tuple[int, int] | None:
    """Of an image, in families that take any size: a usual one has a thousand tokens, too many for a test."""
    return (40, 24) if adapter_of(model).shape(model).image_tokens > 500 else None


def run(model: PreTrainedModel, inputs: Inputs, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **kwargs)


def lengths(cache: Cache) -> list[int]:
    """Keys in each layer of a cache that has some: recurrent layers have a state instead."""
    return [layer.keys.shape[2] for layer in cache.layers if hasattr(layer, "keys")]


def with_keys(model: PreTrainedModel, by_layer: Iterable[T]) -> list[T]:
    """What is told for each layer, of the layers that have keys."""
    types = getattr(model.get_decoder().config, "layer_types", None) or DEPTH * ["full_attention"]
    return [value for value, kind in zip(by_layer, types, strict=True) if kind != "linear_attention"]


# -- configs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method, and how its config is made to fit a tiny model."""

    method: str
    in_layers: bool = False
    """Give ``layers`` although the method has a default for them."""
    choice: tuple[str, Any] | None = None
    """A field and its value, with which the method reads something else, or elsewhere, than by default."""

    def __str__(self) -> str:
        choice = "-{}={}".format(*self.choice) if self.choice else ""
        return f"{self.method}-in-layers" if self.in_layers else self.method + choice

    @property
    def default(self) -> PruneConfig:
        """The method's config with nothing set but the choice, if there is one."""
        config: PruneConfig = get_method(self.method)(**dict([self.choice] if self.choice else []))
        return config

    @property
    def parts(self) -> str | None:
        """Name of the field that holds other configs, of a method that stacks them."""
        hints = get_type_hints(get_method(self.method))
        return next((name for name, hint in hints.items() if hint == tuple[PruneConfig, ...]), None)

    def config(self, model: PreTrainedModel, **fields: Any) -> PruneConfig:
        """The method's config with its own fields set for a decoder of 8 layers and images of a few patches."""
        config_class = get_method(self.method)
        defaults = {f.name: f.default for f in dataclasses.fields(config_class)}
        tiny: dict[str, Any] = {
            "layer": 2,
            "keep_ratio": 0.4,
            "dominant": 3,
            "contextual": 2,
            "accumulate_layers": (0, 1, 3),
        }
        if "layers" in defaults and (self.in_layers or defaults["layers"] is not None):
            tiny |= {"layers": (1, 4), "keep_ratios": (0.7, 0.4)}
        elif not isinstance(defaults.get("keep_ratios"), tuple):
            tiny["keep_ratios"] = 0.4
        if self.parts is not None:
            tiny[self.parts] = tuple(case.config(model) for case in one_for_each_place(model))
        tiny |= dict([self.choice] if self.choice else [])
        return config_class(**{name: value for name, value in {**tiny, **fields}.items() if name in defaults})


def prunes_videos_only(method: str) -> bool:
    """Whether images stay whole: by the stages of its default config, in a decoder of 32 layers."""
    shape = dataclasses.replace(adapter_of(built("llava")).shape(built("llava")), depth=32)
    return all(stage.videos_only for stage in get_method(method)().stages_for(shape))


def cases() -> list[Case]:
    """Every method that prunes images; those that choose their layers by depth, also with layers of one's own; and
    with each choice by which they read something else, or elsewhere."""
    default = [Case(name) for name in methods_for("decoder") if not prunes_videos_only(name)]
    free = [case.method for case in default if any(_is_free(f) for f in dataclasses.fields(get_method(case.method)))]
    chosen = [Case(case.method, choice=choice) for case in default if case.parts is None for choice in choices(case)]
    return [*default, *(Case(name, in_layers=True) for name in free), *chosen]


def choices(case: Case) -> list[tuple[str, Any]]:
    model = built("llava")
    config, shape = case.config(model), shape_of(model)

    def reads(config: PruneConfig) -> list[Any]:
        return [(stage.where, stage.needs, stage.text_rows) for stage in config.stages_for(shape)]

    return [choice for choice, other in with_choices(config, shape).items() if reads(other) != reads(config)]


def _is_free(field: dataclasses.Field) -> bool:
    return field.name == "layers" and field.default is None


@functools.cache
def places(case: Case) -> frozenset[str]:
    """Where a method makes tokens leave: "vision_tower", "entrance", "after_block"."""
    model = built("llava")
    return frozenset(stage.where for stage in plan(case.config(model), adapter_of(model).shape(model)))


def is_recurrent(model: PreTrainedModel) -> bool:
    """Whether some layers have a state instead of keys: it cannot be cut, or taken apart into samples."""
    return len(with_keys(model, range(DEPTH))) < DEPTH


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty one; recurrent layers need to be told."""
    return DynamicCache(config=model.config.get_text_config()) if is_recurrent(model) else DynamicCache()


def one_for_each_place(model: PreTrainedModel) -> list[Case]:
    """What a stack is made of: one method at every place where this family lets tokens leave."""
    single = [case for case in CASES if case == Case(case.method) and case.parts is None]
    by_place = {place: case for case in single for place in places(case) if place not in closed_places(model)}
    return list(by_place.values())


def closed_places(model: PreTrainedModel) -> set[str]:
    """Where this family lets no tokens leave: a tower whose patches are pooled, between layers that are recurrent."""
    tower = {"vision_tower"} if adapter_of(model).tower_grid else set()
    return tower | ({"after_block"} if is_recurrent(model) else set())


CASES = cases()
VIDEO_CASES = [Case(name) for name in methods_for("decoder") if prunes_videos_only(name)]
"""Every method that prunes videos and leaves images whole."""


def may_renumber(family: str) -> bool:
    """Whether positions of what is left may close up."""
    return get_adapter(family).position_axes == 1


def is_refused(family: str, case: Case) -> bool:
    """Whether a family cannot have what a method wants: tokens that leave where it lets none leave, or at two; a CLS
    token."""
    model = built(family)
    if case.parts is not None:
        return len(one_for_each_place(model)) < 2
    lacks_cls = case.method == "cls_attention" and not adapter_of(model).shape(model).tower.has_cls
    return lacks_cls or bool(closed_places(model) & places(case))


SUPPORTED = [(family, case) for family in FAMILIES for case in CASES if not is_refused(family, case)]


def _once() -> list[tuple[str, Case]]:
    of_family = {family: [case for name, case in SUPPORTED if name == family] for family in FAMILIES}
    richest = max(FAMILIES, key=lambda family: (len(of_family[family]), family))
    stack = {family: max(of_family[family], key=lambda case: case.parts is not None) for family in FAMILIES}
    return [(family, case) for family, case in SUPPORTED if family == richest or case == stack[family]]


ONCE = _once()
"""Every method on one of the families that support the most, and a stack of methods on the others, or what comes first
where there is none: for what depends on neither the family nor on pairs."""

ONCE_WITH_KEYS = [(family, case) for family, case in ONCE if not is_recurrent(built(family))]
"""Of these, the families whose caches can be cut and taken apart."""

WITH_VIDEOS = [(family, case) for family in FAMILIES if not get_adapter(family).no_videos for case in VIDEO_CASES]
"""Every method of ``VIDEO_CASES`` on every family that tells videos from images."""

REFUSED = [(family, case) for family in FAMILIES for case in CASES if is_refused(family, case)]


def stages_of(model: PreTrainedModel, config: PruneConfig) -> tuple[Stage, ...]:
    """The stages a config means for a model."""
    return plan(config, adapter_of(model).shape(model))


@contextmanager
def attached(model: PreTrainedModel, *stages: Stage) -> Iterator[PreTrainedModel]:
    """The model with stages that no config describes."""
    adapter = adapter_of(model)
    adapter.check(model, stages)
    adapter.attach(model, stages)
    try:
        yield model
    finally:
        adapter.detach(model)
