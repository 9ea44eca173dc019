"""Tiny random vision models of every registered family, found without a list kept by hand."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_tokenprune import ConfigError, PruneConfig, UnsupportedModelError, list_adapters, list_methods
from hf_tokenprune.adapters.vision import VisionAdapter
from hf_tokenprune.engine import options, plan
from hf_tokenprune.field_types import few_values, field_types
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.signals import Shape

from .copies import copier

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 5,
}
TINY_TEXT = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "projection_size": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def model_classes(family: str) -> list[type[PreTrainedModel]]:
    """Every concrete model class that Transformers has for a family."""
    config_class = type(AutoConfig.for_model(family))
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    classes = (getattr(module, name) for name in module.__all__)
    concrete = [c for c in classes if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    return [
        c
        for c in concrete
        if c.config_class is config_class
        and c.forward is not PreTrainedModel.forward
        and not c.__name__.endswith("PreTrainedModel")
        and takes(c, "pixel_values")
    ]


def methods_for(kind: str) -> list[str]:
    """Names of the methods that prune "vision" encoders, or the "decoder" of vision-language models."""
    return [name for name in list_methods() if kind in get_method(name).prunes]


def with_choices(config: PruneConfig, shape: Shape) -> dict[tuple[str, Any], PruneConfig]:
    """The config with each other value of each field that has few, and with None where a field may be None, one at a
    time: those that go together and fit."""
    found = {}
    for name, hint in field_types(type(config)).items():
        for value in few_values(hint) or (None,) * (type(None) in get_args(hint)):
            with suppress(ConfigError):
                other = replace(config, **{name: value})
                other.stages_for(shape)
                found[name, value] = other
    return {choice: other for choice, other in found.items() if other != config}


def supported_classes() -> list[tuple[str, type[PreTrainedModel]]]:
    """(family, model class) pairs of vision encoders whose heads can work on fewer tokens."""
    return [
        (family, cls)
        for family in list_adapters()
        if isinstance(get_adapter(family), VisionAdapter)
        for cls in model_classes(family)
        if cls not in get_adapter(family).full_grid_heads
    ]


def tiny_model(family: str, cls: type[PreTrainedModel], attention: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A model with random weights whose attention is far from uniform, in eval mode."""
    model = _copier(family, cls, attention, **overrides)()
    torch.manual_seed(1)  # what a test draws next does not depend on whether the model was there already
    return model


@functools.cache
def _copier(*args: Any, **overrides: Any) -> Callable[[], PreTrainedModel]:
    return copier(built(*args, **overrides))


@functools.cache
def built(family: str, cls: type[PreTrainedModel], attention: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """What ``tiny_model`` copies: one model for all tests, to be looked at and never changed."""
    torch.manual_seed(1)
    fields, stock = {**TINY, **overrides}, AutoConfig.for_model(family)
    vision = getattr(stock, "vision_config", stock)
    if hasattr(vision, "num_patches"):  # in the place of a size of the image
        fields["num_patches"] = (fields["image_size"] // fields["patch_size"]) ** 2
    if hasattr(vision, "mask_ratio"):
        fields["mask_ratio"] = 0.0
    if vision is not stock:  # a model that has a text tower too
        fields = {"vision_config": fields, "text_config": TINY_TEXT, "num_labels": fields["num_labels"]}
    config = AutoConfig.for_model(family, **fields)
    config._attn_implementation = attention
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("q_proj" in name or "k_proj" in name) and parameter.std() < 0.05:  # SigLIP's are large already
                parameter.mul_(8)
    return model


def refused(model: PreTrainedModel, config: PruneConfig) -> bool:
    """Whether the family, or the head of this model, lacks what the config needs."""
    adapter = get_adapter(model.config.model_type)
    try:
        shape = adapter.shape(model)
        adapter.check(model, plan(config, shape), **options(config, shape))
    except UnsupportedModelError:
        return True
    return False


def fitting(
    families: Iterable[tuple[str, type[PreTrainedModel]]], configs: Iterable[PruneConfig]
) -> list[tuple[tuple[str, type[PreTrainedModel]], PruneConfig]]:
    """Pairs of a model class with a config that it does not refuse: what is refused has tests of its own."""
    configs = list(configs)
    models = [(family, built(*family)) for family in families]
    return [(family, config) for family, model in models for config in configs if not refused(model, config)]


def images(batch: int = 2, size: int = TINY["image_size"]) -> torch.Tensor:
    """(B, 3, size, size) random pixels."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def takes(cls: type[PreTrainedModel], argument: str) -> bool:
    """Whether the forward of a model class has an argument."""
    return argument in inspect.signature(cls.forward).parameters


def inputs_for(model: PreTrainedModel, pixels: torch.Tensor) -> dict[str, Any]:
    """What the forward of a model needs for images (B, 3, H, W)."""
    inputs: dict[str, Any] = get_adapter(model.config.model_type).image_inputs(model, pixels)
    if takes(type(model), "input_ids"):
        inputs["input_ids"] = torch.arange(1, 6, device=pixels.device).expand(2, -1)
    return inputs


def first_tensor(output: Any) -> torch.Tensor:
    """Logits of a classifier or of images against texts, last hidden state of a base model."""
    names = ("logits", "logits_per_image", "last_hidden_state")  # embeddings of length 1 would have no gradient here
    return next(value for name in names if (value := getattr(output, name, None)) is not None)


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that pruning might touch."""
    return {
        "classes": [type(module) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "configs": [id(module.__dict__.get("config")) for module in model.modules()],
        "config": model.config.to_dict(),
        "state": list(model.state_dict()),
    }
