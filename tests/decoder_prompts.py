"""Prompts with images and videos for the tiny models of all families, and ragged batches of them."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .decoder_visuals import IMAGE, VIDEO, VIDEO_START, Inputs, Visual, family_of

BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")
"""Inputs with a value for each token of a prompt."""


def sample(model: PreTrainedModel, parts: str, seed: int = 0) -> Inputs:
    """Inputs of one prompt, without padding.

    Args:
        parts: "." a token of text, "I" an image, "i" an image of another size where the family has them, "V" a video,
            "v" one of other frames.
        seed: of words and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    family = family_of(model)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids: list[int] = []
    types: list[int] = []
    tensors: dict[str, list[Tensor]] = {}
    for part in parts:
        assert part in ".IiVv", part
        if part == ".":
            visual = Visual([int(torch.randint(1, VIDEO_START, (), generator=generator))], {})
        else:
            visual = family.video(model, part, draw) if part in "Vv" else family.image(model, part, draw)
        ids += visual.ids
        types += [visual.kind if token in (IMAGE, VIDEO) else 0 for token in visual.ids]
        for name, tensor in visual.tensors.items():
            tensors.setdefault(name, []).append(tensor)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if family.typed:
        inputs["mm_token_type_ids"] = torch.tensor([types])
    return inputs | {name: joined(several, family.axis) for name, several in tensors.items()}


def joined(tensors: list[Tensor], axis: int = 0) -> Tensor:
    """One behind the other along ``axis``; what they lack along the others is zero, as processors make it."""
    sides = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]

    def filled(tensor: Tensor) -> Tensor:
        lacking = [0 if i == axis else side - tensor.shape[i] for i, side in enumerate(sides)]
        return F.pad(tensor, [pad for number in reversed(lacking) for pad in (0, number)])

    return torch.cat([filled(tensor) for tensor in tensors], axis)


def in_one(model: PreTrainedModel, prompts: list[Inputs]) -> Inputs:
    """Prompts one behind the other, as one."""
    axis = family_of(model).axis
    names = dict.fromkeys(name for inputs in prompts for name in inputs)
    return {
        name: joined([inputs[name] for inputs in prompts if name in inputs], 1 if name in BY_TOKEN else axis)
        for name in names
    }


def collate(samples: list[Inputs], side: str = "left") -> Inputs:
    """One batch of several prompts, padded on one side."""
    longest = max(s["input_ids"].shape[1] for s in samples)
    by_row = next((s for s in samples if "pixel_attention_mask" in s), {})  # a prompt without an image has a row too
    batch: dict[str, list[Tensor]] = {}
    for inputs in samples:
        empty = {name: torch.zeros_like(by_row[name]) for name in by_row if name not in inputs}
        for name, tensor in {**inputs, **empty}.items():
            if name in BY_TOKEN:
                padding = tensor.new_zeros(1, longest - tensor.shape[1])
                tensor = torch.cat([padding, tensor] if side == "left" else [tensor, padding], 1)
            batch.setdefault(name, []).append(tensor)
    return {name: joined(tensors) for name, tensors in batch.items()}


def of_images(inputs: Inputs) -> Inputs:
    """What of a prompt's inputs the encoder takes for its images."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask", "batch_num_images")
    return {name: inputs[name] for name in names if name in inputs}


def of_videos(inputs: Inputs) -> Inputs:
    """What of a prompt's inputs the encoder takes for its videos."""
    return {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw") if name in inputs}


def types_of(inputs: Inputs) -> Tensor:
    """(B, T): 0 text, 1 a placeholder of an image, 2 of a video."""
    if "mm_token_type_ids" in inputs:
        return inputs["mm_token_type_ids"]
    return (inputs["input_ids"] == IMAGE) + 2 * (inputs["input_ids"] == VIDEO)


def is_image(inputs: Inputs) -> Tensor:
    """(B, T) bool: placeholders."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)
