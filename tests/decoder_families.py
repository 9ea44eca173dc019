"""Tiny random vision-language models of every registered family with a decoder, prompts with images for them, and a
config of every method that fits their depth. Families, language models and methods all come from the registries."""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import Cache

from hf_tokenprune import PruneConfig, list_adapters
from hf_tokenprune.adapters.decoder import LAYER_CLASSES, DecoderAdapter
from hf_tokenprune.engine import plan
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.signals import Stage

from .families import methods_for

FAMILIES = [name for name in list_adapters() if isinstance(get_adapter(name), DecoderAdapter)]
TEXTS = sorted(LAYER_CLASSES)
DEPTH = 8
VOCABULARY = 64
IMAGE, VIDEO = VOCABULARY - 2, VOCABULARY - 1
KEY_VALUE_HEADS = {"llama": 4, "mistral": 1}
"""Of four heads; two where a language model is not named: grouped queries."""


# -- models ----------------------------------------------------------------------------------------------------------


def tiny_vlm(family: str, text: str = "llama", *, attention: str = "sdpa", **overrides: Any) -> PreTrainedModel:
    """A model with random weights, attention far from uniform and features that differ, in eval mode.

    ``overrides`` are fields of its config; those of ``text_config`` and ``vision_config`` add to the tiny ones.
    """
    if overrides:
        return _build(family, text, attention, overrides)
    return copy.deepcopy(_built(family, text, attention))


@functools.cache
def _built(family: str, text: str, attention: str) -> PreTrainedModel:
    return _build(family, text, attention, {})


def _build(family: str, text: str, attention: str, overrides: dict[str, Any]) -> PreTrainedModel:
    overrides = dict(overrides)
    stock = AutoConfig.for_model(family)
    crops = hasattr(stock, "image_grid_pinpoints")
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
        **overrides.pop("text_config", {}),
    }
    vision_config = {
        "model_type": stock.vision_config.model_type,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 9 if crops else 20,  # a crop has 3 × 3 patches, an image without crops 5 × 5
        "patch_size": 3 if crops else 4,
        "vision_use_head": False,
        **overrides.pop("vision_config", {}),
    }
    side = vision_config["image_size"]
    fields: dict[str, Any] = {"image_token_id": IMAGE, "text_config": text_config, "vision_config": vision_config}
    if crops:
        fields["image_grid_pinpoints"] = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]]
    if hasattr(stock, "video_token_id"):
        fields["video_token_id"] = VIDEO
    config = AutoConfig.for_model(family, **(fields | overrides))
    config._attn_implementation = attention
    model = AutoModelForImageTextToText.from_config(config).eval()
    spread(model)
    # A generated placeholder would ask for an image that nobody has given.
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    model.generation_config.pad_token_id = 0
    return model


def spread(model: PreTrainedModel) -> None:
    """Weights of a size that makes tokens, attention and logits differ by a lot; biases and norms that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() > 1:
                scale = 1.2 if "q_proj" in name or "k_proj" in name else 4 if "embed_tokens" in name else 1
                parameter.copy_(noise * scale * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise)


def adapter_of(model: PreTrainedModel) -> DecoderAdapter:
    adapter: DecoderAdapter = get_adapter(model.config.model_type)
    return adapter


# -- prompts ---------------------------------------------------------------------------------------------------------

Inputs = dict[str, Tensor]


def sample(model: PreTrainedModel, parts: str, seed: int = 0) -> Inputs:
    """Inputs of one prompt, without padding.

    Args:
        parts: "." a token of text, "I" an image, "i" an image of another size where the family has crops, "V" a video.
        seed: of words and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision_config.image_size
    crops = hasattr(model.config, "image_grid_pinpoints")
    ids: list[int] = []
    pixels, sizes, videos = [], [], []
    for part in parts:
        if part == ".":
            ids.append(int(torch.randint(1, IMAGE, (), generator=generator)))
        elif part == "V":
            videos.append(torch.randn(1, 4, 3, side, side, generator=generator))
            ids += [VIDEO] * video_features(model, videos[-1]).shape[0]
        else:
            assert part in "Ii", part
            size = torch.tensor([[2 * side, 2 * side]] if part == "I" else [[side, 2 * side - 2]])
            num_crops = 5 if part == "I" else 3
            pixel = torch.randn(1, *([num_crops] if crops else []), 3, side, side, generator=generator)
            features = image_features(model, pixel, size if crops else None)
            ids += [IMAGE] * features.shape[0]
            pixels.append(pixel)
            sizes.append(size)
    return collate([_without_none(ids, pixels, sizes if crops else [], videos)])


def _without_none(ids: list[int], pixels: list[Tensor], sizes: list[Tensor], videos: list[Tensor]) -> Inputs:
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    lists = {"pixel_values": pixels, "image_sizes": sizes, "pixel_values_videos": videos}
    return inputs | {name: _stack(tensors) for name, tensors in lists.items() if tensors}


def _stack(tensors: list[Tensor]) -> Tensor:
    """Joined along the first axis; crops that an image lacks are zero, as processors make them."""
    longest = max(t.shape[1] for t in tensors)
    padded = [torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])], 1) for t in tensors]
    return torch.cat(padded)


def collate(samples: list[Inputs], side: str = "left") -> Inputs:
    """One batch of several prompts, padded on one side."""
    longest = max(s["input_ids"].shape[1] for s in samples)
    batch: dict[str, list[Tensor]] = {}
    for inputs in samples:
        for name, tensor in inputs.items():
            if name in ("input_ids", "attention_mask"):
                padding = tensor.new_zeros(1, longest - tensor.shape[1])
                tensor = torch.cat([padding, tensor] if side == "left" else [tensor, padding], 1)
            batch.setdefault(name, []).append(tensor)
    return {name: _stack(tensors) for name, tensors in batch.items()}


def image_features(model: PreTrainedModel, pixels: Tensor, sizes: Tensor | None = None) -> Tensor:
    """(N, D): features of images one behind the other, as the model itself makes them."""
    more = {} if sizes is None else {"image_sizes": sizes}
    with torch.no_grad():
        return torch.cat(list(model.get_image_features(pixel_values=pixels, return_dict=True, **more).pooler_output))


def video_features(model: PreTrainedModel, videos: Tensor) -> Tensor:
    """(N, D): features of videos one behind the other, as the model itself makes them."""
    with torch.no_grad():  # by position: the name of the argument differs between versions
        made = model.model.get_video_features(videos, return_dict=True).pooler_output
        if hasattr(model.model, "apply_pooling") and not torch.equal(made[0, -1], model.model.image_newline):
            # LLaVA-OneVision ends a video with a newline, which old versions add later, in the forward.
            made = torch.cat([made, model.model.image_newline.expand(len(made), 1, -1)], dim=1)
    return torch.cat([part.flatten(0, -2) for part in made])


def is_image(inputs: Inputs) -> Tensor:
    """(B, T) bool: placeholders."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def run(model: PreTrainedModel, inputs: Inputs, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **kwargs)


def lengths(cache: Cache) -> list[int]:
    """Keys in each layer of a cache."""
    return [layer.keys.shape[2] for layer in cache.layers]


# -- configs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A method, and how its config is made to fit a tiny model."""

    method: str
    in_layers: bool = False
    """Give ``layers`` although the method has a default for them."""

    def __str__(self) -> str:
        return f"{self.method}-in-layers" if self.in_layers else self.method

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
        return config_class(**{name: value for name, value in {**tiny, **fields}.items() if name in defaults})


def cases() -> list[Case]:
    """Every method that prunes decoders; those that choose their layers by depth, also with layers of one's own."""
    names = methods_for("decoder")
    free = [name for name in names if any(_is_free(f) for f in dataclasses.fields(get_method(name)))]
    return [*(Case(name) for name in names), *(Case(name, in_layers=True) for name in free)]


def _is_free(field: dataclasses.Field) -> bool:
    return field.name == "layers" and field.default is None


@functools.cache
def places(case: Case) -> frozenset[str]:
    """Where a method makes tokens leave: "vision_tower", "entrance", "after_block"."""
    model = _built(FAMILIES[0], TEXTS[0], "sdpa")
    return frozenset(stage.where for stage in plan(case.config(model), adapter_of(model).shape(model)))


def one_for_each_place(model: PreTrainedModel) -> list[Case]:
    """What a stack is made of: one method at every place where this family lets tokens leave."""
    single = [case for case in CASES if case.parts is None and not case.in_layers]
    by_place = {place: case for case in single for place in places(case)}
    if adapter_of(model).tower_grid:
        by_place.pop("vision_tower", None)
    return list(by_place.values())


CASES = cases()


def is_refused(family: str, case: Case) -> bool:
    """Whether a family cannot have what a method wants: a choice in a tower whose patches are pooled."""
    return bool(get_adapter(family).tower_grid) and "vision_tower" in places(case) and case.parts is None


SUPPORTED = [(family, case) for family in FAMILIES for case in CASES if not is_refused(family, case)]
ONCE = [
    (family, case)
    for family, case in SUPPORTED
    if family == max(FAMILIES, key=lambda name: (len([f for f, _ in SUPPORTED if f == name]), name)) or case.parts
]
"""Every method on one of the families that support the most, and a stack of methods on the others: for what depends on
neither the family nor on pairs."""

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
