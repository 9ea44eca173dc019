"""An evaluation from the options of a command: what ``hf-tokenprune eval`` and ``compare`` do before they print."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..config import PruneConfig
from ..cost import cost
from ..engine import pruned
from ..errors import ConfigError
from . import (
    AnswersReport,
    ImageDataset,
    PairedReport,
    QuestionDataset,
    evaluate_answers,
    evaluate_paired,
    evaluate_zero_shot,
    load_processor,
    mean_text_tokens,
)
from .zero_shot import TEMPLATES

Configs = dict[str, PruneConfig]


def evaluate_model(
    path: str,
    model: Any,
    data: ImageDataset | QuestionDataset,
    choose: Callable[..., Configs],
    *,
    class_names: Path | None,
    templates: list[str] | None,
    prompt: str | None,
    new_tokens: int | None,
    batch_size: int,
    accelerator: Any,
    progress: bool,
) -> tuple[PairedReport | AnswersReport, Configs]:
    """The report that fits the data, and the configs in it.

    Args:
        path: of the model's checkpoint, for its processor.
        choose: makes the configs; for questions, of the number of text tokens in a prompt.
        class_names, templates: see `paired_report`.
        prompt, new_tokens: see `answers_report`.
    """
    settings: dict[str, Any] = {"batch_size": batch_size, "accelerator": accelerator, "progress": progress}
    if isinstance(data, QuestionDataset):
        return answers_report(path, model, data, choose, prompt=prompt, new_tokens=new_tokens, **settings)
    variants = choose()
    texts: dict[str, Any] = {"class_names": class_names, "templates": templates}
    return paired_report(path, model, data, variants, **texts, **settings), variants


def paired_report(
    path: str,
    model: Any,
    images: Any,
    variants: Configs,
    *,
    class_names: Path | None,
    templates: list[str] | None = None,
    batch_size: int,
    accelerator: Any,
    progress: bool,
) -> PairedReport:
    """The model as it is, and pruned by each of ``variants``, on the same images; zero-shot if it has a text tower.

    Args:
        path: of the model's checkpoint, for its processor.
        class_names: for a model with a text tower: file with a class in each line; None: the images say.
        templates: for a model with a text tower; None: "a photo of a {}.".
    """
    settings: dict[str, Any] = {
        "variants": arms(model, variants),
        "macs": macs_of(model, variants),
        "batch_size": batch_size,
        "accelerator": accelerator,
        "progress": progress,
    }
    if hasattr(model, "get_text_features"):
        from transformers import AutoProcessor

        names = names_for_texts(class_names, images)
        processor = AutoProcessor.from_pretrained(path)
        return evaluate_zero_shot(model, images, processor, names, templates=templates or TEMPLATES, **settings)
    for option, value in (("--class-names", class_names), ("--template", templates)):
        if value:
            raise ConfigError(f"{option} has no effect: this model has a classifier of its own")
    return evaluate_paired(model, images, load_processor(path), **settings)


def names_for_texts(class_names: Path | None, images: ImageDataset) -> Sequence[str]:
    """What to call the classes in texts: the lines of a file, or what the images call them.

    Raises:
        ConfigError: neither says it, or the file cannot be read.
    """
    if class_names is None:
        if images.classes is None:
            raise ConfigError("the images have labels without names: give --class-names FILE, a line a class")
        return images.classes
    try:
        return class_names.read_text(encoding="utf-8-sig").splitlines()  # editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--class-names {class_names}: not a text file in UTF-8 ({error}); save it again as such, a line a class"
        ) from error


def answers_report(
    path: str,
    model: Any,
    questions: Any,
    choose: Callable[[int], Configs],
    *,
    prompt: str | None,
    new_tokens: int | None,
    batch_size: int,
    accelerator: Any,
    progress: bool,
) -> tuple[AnswersReport, Configs]:
    """A vision-language model as it is, and pruned by several configs, on the same questions; and these configs.

    Args:
        path: of the model's checkpoint, for its processor.
        choose: makes the configs for prompts of so many text tokens.
        prompt: as for ``collect_answers``.
        new_tokens: of an answer, at most; None: 32.
    """
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    text_tokens = mean_text_tokens(model, questions, processor, prompt)
    variants = choose(text_tokens)
    report = evaluate_answers(
        model,
        questions,
        processor,
        arms(model, variants),
        macs=macs_of(model, variants, text_tokens),
        batch_size=batch_size,
        max_new_tokens=32 if new_tokens is None else new_tokens,
        prompt=prompt,
        accelerator=accelerator,
        progress=progress,
    )
    return report, variants


def arms(model: Any, variants: Configs) -> dict[str, Any]:
    """The model pruned by each config, as evaluations take it."""
    return {name: partial(pruned, model, config) for name, config in variants.items()}


def macs_of(model: Any, variants: Configs, text_tokens: int | None = None) -> dict[str, float]:
    """Of the dense model and of every pruned one."""
    after = {name: float(cost(model, config, text_tokens=text_tokens).pruned.macs) for name, config in variants.items()}
    return {"dense": float(cost(model, text_tokens=text_tokens).dense.macs), **after}
