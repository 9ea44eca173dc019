"""Tiny random vision models of every registered family, found without a list kept by hand."""

import importlib
import inspect
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from hf_tokenprune import list_adapters, list_methods
from hf_tokenprune.adapters.vision import VisionAdapter
from hf_tokenprune.registry import get_adapter, get_method

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "image_size": 32,
    "patch_size": 4,
    "num_labels": 5,
}


NEEDS_MORE = {"input_ids", "spatial_shapes", "noise"}
"""Arguments of models that a batch of images alone is not enough for: these need tests of their own."""


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
        and not NEEDS_MORE & set(inspect.signature(c.forward).parameters)
    ]


def methods_for(kind: str) -> list[str]:
    """Names of the methods that prune "vision" encoders, or the "decoder" of vision-language models."""
    return [name for name in list_methods() if kind in get_method(name).prunes]


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
    torch.manual_seed(1)
    fields = {**TINY, **overrides}
    if hasattr(AutoConfig.for_model(family), "vision_config"):  # of a model that has a text tower too
        fields = {"vision_config": fields, "num_labels": fields["num_labels"]}
    config = AutoConfig.for_model(family, **fields)
    config._attn_implementation = attention
    model = cls(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("q_proj" in name or "k_proj" in name) and parameter.std() < 0.05:  # SigLIP's are large already
                parameter.mul_(8)
    return model


def images(batch: int = 2, size: int = TINY["image_size"]) -> torch.Tensor:
    """(B, 3, size, size) random pixels."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(2))


def first_tensor(output: Any) -> torch.Tensor:
    """Logits of a classifier, last hidden state of a base model."""
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


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
