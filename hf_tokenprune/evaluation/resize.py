"""The baseline without a method: fewer image tokens by fewer pixels, through the processor.

What a user can do without this package, so every table should have it (Liao et al., arXiv 2510.07143). A ratio holds
for each picture on its own, from below, by what its processor offers:

* pictures of one size (ViT, CLIP, SigLIP, DINOv2, LLaVA-1.5): a smaller size; crops keep their part of the picture;
* a number of patches (SigLIP 2): a smaller one;
* tiles that a setting counts (InternVL: ``max_patches``; Idefics3, SmolVLM: ``size["longest_edge"]``): fewer tiles;
* any size, or tiles that fit the picture (Qwen-VL, GLM-4V, Mistral 3; LLaVA-NeXT, -OneVision): a smaller picture.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from PIL import Image
from torch import nn

from hf_tokenprune.errors import TokenPruneError

STEPS = 256
"""A picture is made smaller in steps of this part of its sides: finer than patches, up to 3584 pixels of 14."""

ROUNDING = 1e-6
"""Of a count of tokens that a ratio was made from."""

Count = Callable[[Any, int, int], int]


class Choice(NamedTuple):
    """``settings`` of the image processor, and the ``scale`` of the picture's sides that it is given.

    Not for pictures whose longer side would be below ``least``: smaller ones lose detail and no tokens.
    """

    settings: dict[str, Any]
    scale: float = 1.0
    least: int = 1


class Plan(NamedTuple):
    """What becomes of a picture.

    Attributes:
        usual, kept: its tokens, as the processor makes them; those that end its rows (Mistral 3) count.
        size: (height, width) in pixels that the picture is given to the processor in.
        settings: of the image processor.
    """

    usual: int
    kept: int
    size: tuple[int, int]
    settings: dict[str, Any]


def resized(processor: Any, keep_ratio: float, patch_size: int | tuple[int, int] | None = None) -> Any:
    """A copy of a processor that makes at most ``keep_ratio`` of the usual image tokens, as near to it as it can.

    The aspect of pictures is kept, so few counts can be met exactly: ``plan(height, width)`` of the copy tells, for a
    picture of so many pixels, what it gets, and ``mean_tokens()`` the ``(usual, kept)`` tokens a picture of all that it
    has made. The processor given is not changed. A model with a table of positions must run within
    `interpolated_positions`.

    Args:
        processor: of a vision-language model, of a two-tower model, or an image processor.
        keep_ratio: of the image tokens, in (0, 1]; 1 changes nothing.
        patch_size: of the model, in pixels (or height and width), where the processor does not know it: encoders.

    Raises:
        TokenPruneError: a ratio out of range, a processor without a size to change. When called: pictures that cannot
            have so few tokens, pictures of one call that need different settings, videos, images that are not PIL's.
    """
    if not 0 < keep_ratio <= 1:
        raise TokenPruneError(f"keep_ratio={keep_ratio}: expected a number in (0, 1], the share of image tokens kept")
    count, choices = _ways(processor, keep_ratio, patch_size)
    kind = type(processor)
    small = copy.copy(processor)
    small.__class__ = type(kind.__name__, (_Resized, kind), {"__doc__": kind.__doc__})
    small._resizer = _Resizer(processor, keep_ratio, count, choices)
    return small


@contextmanager
def interpolated_positions(model: nn.Module) -> Iterator[None]:
    """Within it, tables of positions are interpolated to the size of the picture; those made for it stay as they are.

    ``interpolate_pos_encoding=True`` is what encoders take for it; LLaVA does not hand it on in ``generate``.
    """

    def ask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "interpolate_pos_encoding": True}

    with ExitStack() as hooks:
        for module in model.modules():
            takes = "interpolate_pos_encoding" in inspect.signature(module.forward).parameters
            if takes and hasattr(module, "interpolate_pos_encoding"):  # embeddings, not the models around them
                hooks.callback(module.register_forward_pre_hook(ask, with_kwargs=True).remove)
        yield


class _Resizer:
    """What to do to each picture, and the processors that do it."""

    def __init__(self, processor: Any, keep_ratio: float, count: Count, choices: list[Choice]) -> None:
        self.processor = processor
        self.keep_ratio = keep_ratio
        self.count = count
        self.choices = choices
        self.plans: dict[tuple[int, int], Plan] = {}
        self.made: list[Plan] = []

    def plan(self, height: int, width: int) -> Plan:
        """With most of those counts that are few enough; of equal ones with the largest picture."""
        if (height, width) not in self.plans:
            usual = self.count(self.processor, height, width)
            every = list(self._every_plan(height, width, usual))
            few = [plan for plan in every if plan.kept <= self.keep_ratio * usual + ROUNDING]
            if not few:
                least = min(plan.kept for plan in every)
                enough = -(-1000 * least // usual) / 1000  # rounded up, so that it is
                raise TokenPruneError(
                    f"keep_ratio={self.keep_ratio}: {type(self.processor).__name__} makes at least {least} of the "
                    f"usual {usual} tokens of an image of {height}x{width} pixels; keep at least {enough:.3f}"
                )
            self.plans[height, width] = max(few, key=lambda plan: plan.kept)
        return self.plans[height, width]

    def _every_plan(self, height: int, width: int, usual: int) -> Iterator[Plan]:
        for choice in self.choices:
            size = max(1, round(height * choice.scale)), max(1, round(width * choice.scale))
            if choice.scale == 1 or max(size) >= choice.least:
                kept = self.count(with_settings(self.processor, choice.settings), *size)
                yield Plan(usual, kept, size, choice.settings)

    def shrink(self, images: Any, plans: list[Plan]) -> Any:
        """Pictures as the processor is to be given them; adds what becomes of each."""
        if isinstance(images, (list, tuple)):
            return [self.shrink(image, plans) for image in images]
        if not isinstance(images, Image.Image):
            raise TokenPruneError(f"an image is of type {type(images).__name__}; resized processors take PIL images")
        plan = self.plan(images.height, images.width)
        plans.append(plan)
        height, width = plan.size
        if images.size == (width, height):
            return images
        if images.mode in ("1", "P"):  # of which PIL would take the nearest pixel
            images = images.convert("RGB")
        return images.resize((width, height), Image.Resampling.BICUBIC)


class _Resized:
    """Goes in front of a processor's class."""

    _resizer: _Resizer

    def __call__(self, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        resizer = self._resizer
        if kwargs.get("videos") is not None:
            raise TokenPruneError("videos are not resized; give the frames as images, or sample fewer of them")
        if images is None:
            return resizer.processor(images, *args, **kwargs)
        plans: list[Plan] = []
        images = resizer.shrink(images, plans)
        settings = plans[0].settings if plans else {}
        if any(other.settings != settings for other in plans):
            raise TokenPruneError(
                f"keep_ratio={resizer.keep_ratio}: these images need different settings of the processor, which takes "
                f"one a call ({settings}, ...); give one image a call (batch_size=1)"
            )
        resizer.made += plans
        inputs = with_settings(resizer.processor, settings)(images, *args, **kwargs)
        if (numbers := inputs.get("batch_num_images")) is not None and max(numbers) > 1:
            raise TokenPruneError(
                f"{type(resizer.processor).__name__} cuts no tiles of several images of one prompt, so there are none "
                "to save; give one image a prompt"
            )
        return inputs

    def plan(self, height: int, width: int) -> Plan:
        """What becomes of a picture of so many pixels.

        Raises:
            TokenPruneError: it cannot have so few tokens.
        """
        return self._resizer.plan(height, width)

    def mean_tokens(self) -> tuple[float, float]:
        """``(usual, kept)`` tokens a picture, of all that went through; NaN before the first."""
        made = self._resizer.made
        usual, kept = sum(plan.usual for plan in made), sum(plan.kept for plan in made)
        return (usual / len(made), kept / len(made)) if made else (math.nan, math.nan)


def with_settings(processor: Any, settings: dict[str, Any]) -> Any:
    """The processor, or a copy with attributes of its image processor set."""
    if not settings:
        return processor
    processor = copy.copy(processor)
    pictures = processor
    if hasattr(processor, "image_processor"):
        pictures = processor.image_processor = copy.copy(processor.image_processor)
    for name, value in settings.items():
        setattr(pictures, name, value)
    return processor


def _ways(processor: Any, keep_ratio: float, patch_size: int | tuple[int, int] | None) -> tuple[Count, list[Choice]]:
    """How tokens are counted, and what can be done, from most tokens to fewest. What it is made for comes first."""
    pictures = getattr(processor, "image_processor", processor)
    if most := getattr(pictures, "max_num_patches", None):
        return _most_patches, [Choice({}), Choice({"max_num_patches": max(1, int(keep_ratio * most + ROUNDING))})]
    size = getattr(pictures, "size", None)
    if size is None:
        raise TokenPruneError(f"{type(pictures).__name__} has no size to change; give a processor of images")
    crop = getattr(pictures, "crop_size", None) if getattr(pictures, "do_center_crop", False) else None
    cropped = crop or size
    tiles_fit, tiles_count = getattr(pictures, "image_grid_pinpoints", None), hasattr(pictures, "max_patches")
    if not tiles_fit and not tiles_count and "height" in cropped and "width" in cropped:
        patch = patch_size or getattr(processor, "patch_size", None)
        if patch is None:
            raise TokenPruneError(f"{type(processor).__name__} does not know the model's patches; give patch_size")
        return _smaller(size, crop, (patch, patch) if isinstance(patch, int) else patch)
    if pictures is processor:
        raise TokenPruneError(
            f"{type(processor).__name__} with size {dict(size)} makes images of several sizes and does not say how "
            "many tokens they have; give that of the whole model, or one that crops or resizes to one size"
        )
    if tiles_count:
        numbers = range(pictures.max_patches - 1, 0, -1)
        return _tokens_of_tiles, [Choice({}), *(Choice({"max_patches": number}) for number in numbers)]
    if getattr(pictures, "max_image_size", None):
        side = pictures.max_image_size["longest_edge"]
        edges = range((size["longest_edge"] - 1) // side * side, 0, -side)
        return _tokens_of_rows, [Choice({}), *(Choice({"size": type(size)(longest_edge=edge)}) for edge in edges)]
    settings = {}
    if keep_ratio < 1 and "shortest_edge" in size and "longest_edge" in size:  # a least size; pixels or a side
        least = max(1, int(keep_ratio * size["shortest_edge"]))
        settings = {"size": type(size)(**{**dict(size), "shortest_edge": least})}
    tile = min(dict(size).values()) if tiles_fit else 1
    smaller = [Choice(settings, step / STEPS, tile) for step in range(STEPS - 1, 0, -1)]
    return _all_tokens, [Choice({}), *smaller]


def _smaller(size: Any, crop: Any, patch: tuple[int, int]) -> tuple[Count, list[Choice]]:
    """Of a processor that makes pictures of one size, by patches of the model."""
    full = crop or size
    rows, columns = full["height"] // patch[0], full["width"] // patch[1]

    def count(given: Any, *_: int) -> int:
        pictures = getattr(given, "image_processor", given)
        made = pictures.crop_size if crop else pictures.size
        return int((made["height"] // patch[0]) * (made["width"] // patch[1]))

    choices = [Choice({})]
    for fewer in range(rows - 1, 0, -1):
        height, width = fewer * patch[0], max(1, fewer * columns // rows) * patch[1]
        made = type(full)(height=height, width=width)
        settings = {"size": made}
        if crop:
            part = max(height / crop["height"], width / crop["width"])
            settings = {"size": type(size)(**{key: round(value * part) for key, value in dict(size).items()})}
            settings["crop_size"] = made
        choices.append(Choice(settings))
    return count, choices


def _most_patches(processor: Any, *_: int) -> int:
    return int(getattr(processor, "image_processor", processor).max_num_patches)


def _all_tokens(processor: Any, height: int, width: int) -> int:
    return int(processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0])


def _tokens_of_tiles(processor: Any, height: int, width: int) -> int:
    tiles = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_patches"][0]
    return int(tiles * processor.image_seq_length)


def _tokens_of_rows(processor: Any, height: int, width: int) -> int:
    tiles, _, _ = processor.image_processor.get_number_of_image_patches(height, width)
    return max(1, tiles) * int(processor.image_seq_len)
