"""An evaluation from the options of a command: what ``hf-tokenprune eval`` and ``compare`` do before they print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import PruneConfig
from ..cost import cost
from ..cost.decoder import TEXT_TOKENS, generation_cost
from ..engine import find_adapter, pruned
from ..errors import ConfigError
from ..signals import DecoderShape
from . import (
    AnswersReport,
    ImageDataset,
    PairedReport,
    QuestionDataset,
    evaluate_answers,
    evaluate_paired,
    evaluate_zero_shot,
    interpolated_positions,
    load_processor,
    mean_text_tokens,
    resized,
)
from .zero_shot import TEMPLATES

Configs = dict[str, PruneConfig]
Processors = dict[str, Any]
"""By the name of a run without a method, what makes its images of fewer tokens; see `resized`."""


def evaluate_model(
    path: str,
    model: Any,
    data: ImageDataset | QuestionDataset,
    choose: Callable[..., Configs],
    *,
    resize: Sequence[float],
    class_names: Path | None,
    templates: list[str] | None,
    prompt: str | None,
    new_tokens: int | None,
    batch_size: int,
    accelerator: Any,
    progress: bool,
) -> tuple[PairedReport | AnswersReport, Configs, Processors]:
    """The report that fits the data, and the configs and resized processors in it.

    Args:
        path: of the model's checkpoint, for its processor.
        choose: makes the configs; for questions, of the number of text tokens in a prompt.
        resize: shares of the image tokens, of further runs with a `resized` processor and no method.
        class_names, templates: see `paired_report`.
        prompt, new_tokens: see `answers_report`.
    """
    settings: dict[str, Any] = {"batch_size": batch_size, "accelerator": accelerator, "progress": progress}
    processor = processor_of(path, model)
    settings["small"] = small = resizes(model, processor, resize)
    if isinstance(data, QuestionDataset):
        texts: dict[str, Any] = {"prompt": prompt, "new_tokens": new_tokens}
        return *answers_report(processor, model, data, choose, **texts, **settings), small
    variants = choose()
    texts = {"class_names": class_names, "templates": templates}
    return paired_report(processor, model, data, variants, **texts, **settings), variants, small


def paired_report(
    processor: Any,
    model: Any,
    images: Any,
    variants: Configs,
    *,
    class_names: Path | None,
    templates: list[str] | None = None,
    batch_size: int,
    accelerator: Any,
    progress: bool,
    small: Processors | None = None,
) -> PairedReport:
    """The model as it is, and pruned by each of ``variants``, on the same images; zero-shot if it has a text tower.

    Args:
        processor: of the model, see `processor_of`.
        class_names: for a model with a text tower: file with a class in each line; None: the images say.
        templates: for a model with a text tower; None: "a photo of a {}.".
    """
    settings: dict[str, Any] = {
        "variants": arms(model, variants, small),
        "macs": macs_of(model, variants, small=small),
        "batch_size": batch_size,
        "accelerator": accelerator,
        "progress": progress,
        "processors": small,
    }
    if hasattr(model, "get_text_features"):
        names = names_for_texts(class_names, images)
        return evaluate_zero_shot(model, images, processor, names, templates=templates or TEMPLATES, **settings)
    for option, value in (("--class-names", class_names), ("--template", templates)):
        if value:
            raise ConfigError(f"{option} has no effect: this model has a classifier of its own")
    return evaluate_paired(model, images, processor, **settings)


def names_for_texts(class_names: Path | None, images: ImageDataset) -> Sequence[str]:
    """What to call the classes in texts: the lines of a file, or what the images call them.

    Raises:
        ConfigError: neither says it, or what `read_class_names` raises.
    """
    if class_names is None:
        if images.classes is None:
            raise ConfigError("the images have labels without names: give --class-names FILE, a line a class")
        return images.classes
    return read_class_names(class_names)


def read_class_names(class_names: Path) -> list[str]:
    """The lines of a file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return class_names.read_text(encoding="utf-8-sig").splitlines()  # editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--class-names {class_names}: not a text file in UTF-8 ({error}); save it again as such, a line a class"
        ) from error


def answers_report(
    processor: Any,
    model: Any,
    questions: Any,
    choose: Callable[[int], Configs],
    *,
    prompt: str | None,
    new_tokens: int | None,
    batch_size: int,
    accelerator: Any,
    progress: bool,
    small: Processors | None = None,
) -> tuple[AnswersReport, Configs]:
    """A vision-language model as it is, and pruned by several configs, on the same questions; and these configs.

    Args:
        processor: of the model, see `processor_of`.
        choose: makes the configs for prompts of so many text tokens.
        prompt: as for ``collect_answers``.
        new_tokens: of an answer, at most; None: 32.
    """
    text_tokens = mean_text_tokens(model, questions, processor, prompt)
    variants = choose(text_tokens)
    report = evaluate_answers(
        model,
        questions,
        processor,
        arms(model, variants, small),
        macs=macs_of(model, variants, text_tokens, small),
        batch_size=batch_size,
        max_new_tokens=32 if new_tokens is None else new_tokens,
        prompt=prompt,
        accelerator=accelerator,
        progress=progress,
        processors=small,
    )
    return report, variants


def processor_of(path: str, model: Any) -> Any:
    """What makes the inputs of a checkpoint: of images alone, or of images and texts."""
    if hasattr(model, "get_text_features") or hasattr(model, "generate"):
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(path)
    return load_processor(path)


def resizes(model: Any, processor: Any, ratios: Sequence[float]) -> Processors:
    """A run for each share of the image tokens."""
    shape = find_adapter(model).shape(model)
    patch = None if isinstance(shape, DecoderShape) else shape.patch_size
    return {f"resize@{ratio:g}": resized(processor, ratio, patch) for ratio in ratios}


def arms(model: Any, variants: Configs, small: Processors | None = None) -> dict[str, Any]:
    """The model pruned by each config, and with positions for resized images, as evaluations take it."""
    return {
        **{name: partial(pruned, model, config) for name, config in variants.items()},
        **{name: partial(interpolated_positions, model) for name in small or {}},
    }


def macs_of(
    model: Any, variants: Configs, text_tokens: int | None = None, small: Processors | None = None
) -> dict[str, float]:
    """Of the dense model, of every pruned one, and of resized runs for which they can be counted."""
    after = {name: float(cost(model, config, text_tokens=text_tokens).pruned.macs) for name, config in variants.items()}
    for name, processor in (small or {}).items():
        if (macs := _resized_macs(model, processor, text_tokens)) is not None:
            after[name] = float(macs)
    return {"dense": float(cost(model, text_tokens=text_tokens).dense.macs), **after}


def _resized_macs(model: Any, small: Any, text_tokens: int | None) -> int | None:
    """Of the image that the dense model is counted for; None where its processor makes something else of this."""
    shape = find_adapter(model).shape(model)
    if not isinstance(shape, DecoderShape):
        plan, (height, width) = small.plan(*shape.image_size), shape.patch_size
        in_a_row = (plan.kept * height, width)  # MACs are of the number of patches
        return cost(model, image_size=in_a_row).dense.macs if plan.usual == shape.num_patches else None
    if shape.tower_images > 1:  # tiles: how many depends on the picture
        return None
    plan, tower = small.plan(*shape.tower.image_size), shape.tower
    if plan.usual != shape.image_tokens:
        return None
    if plan.size != tower.image_size:
        return cost(model, image_size=plan.size, text_tokens=text_tokens).dense.macs
    if tower.num_patches != shape.image_tokens:  # a processor that sets the size knows patches, not what merges them
        return None
    tower = replace(tower, image_size=(plan.kept * tower.patch_size[0], tower.patch_size[1]))
    fewer = replace(shape, tower=tower, image_tokens=plan.kept, tower_tokens=plan.kept)
    return generation_cost(fewer, text_tokens=text_tokens or TEXT_TOKENS, element_size=model.dtype.itemsize).macs
