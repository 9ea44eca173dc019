"""A search on images, or questions about them: what ``hf-tokenprune search`` does between its options and printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..atomic import write_text
from ..config import PruneConfig
from ..engine import find_adapter
from ..errors import ConfigError
from ..evaluation import ImageDataset, load_images, load_processor, load_questions
from ..evaluation.classes import in_classes_of, names_of
from ..evaluation.preprocess import PreprocessedImages, collate
from ..evaluation.prompts import prompts
from ..evaluation.run import names_for_texts
from ..evaluation.zero_shot import in_classes_of_texts, similarity_to_classes
from . import SearchResult, one_budget, search
from .journal import JOURNAL, REPORT, check_same_search
from .objective import check_goal
from .strategies import check_strategy
from .synthetic import synthesize

Batches = list[dict[str, Tensor]]


def search_images(
    path: str,
    model: Any,
    images: str | None,
    config: PruneConfig,
    out: Path,
    budget: dict[str, Any],
    *,
    free: list[str] | None,
    fixed: Collection[str],
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    limit: int,
    batch_size: int,
    class_names: Path | None,
    questions: list[str] | None,
    prompt: str | None,
    progress: bool,
    strategy: str | None,
    goal: Any,
    **options: Any,
) -> tuple[dict[str, Any], str]:
    """Search, write ``prune_config.json``, ``search.json`` and the journal into ``out``; the report and its summary.

    Args:
        path: of the model's checkpoint, for its processor.
        images: what ``load_images`` takes; None: ``limit`` images are made from the model. Of a vision-language model
            what ``load_questions`` takes, or with ``questions`` what ``load_images`` does.
        budget: ``macs``, ``seconds`` and ``speedup``, of which one is not None.
        free, fixed: as for ``search``; ["none"] is no field, and what is free need not be fixed.
        image_column, label_column: of a dataset of images; None: "image", "label". Labels are read where they are used.
        class_names: for a model with a text tower: file with a class in each line; its answers are similarities.
        questions, prompt: vision-language models: what every image is asked, None: ``images`` says; and the text around
            a question, as for ``collect_answers``.
        strategy: as for ``search``; None: "rule" for images made from the model, which tell fields apart but not
            schedules, else "dynamic".
        options: other arguments of ``search``.

    Raises:
        ConfigError: ``out`` holds the result of another search, or a config that no search wrote; what ``search`` and
            the data raise.
    """
    asked = {
        **{"model": path, "images": images, "config": config.to_dict(), **budget, "free": free, "set": [*fixed]},
        **{"split": split, "limit": limit, "batch_size": batch_size, "strategy": strategy, "goal": goal, **options},
        **{"class_names": class_names and str(class_names), "questions": questions, "prompt": prompt},
    }
    one_budget(**budget)  # as much as can be told before images are read or made
    check_same_search(out, asked)
    strategy = strategy or ("rule" if images is None else "dynamic")
    check_strategy(strategy, options["trials"])
    if goal is not None:
        check_goal(goal)
    run: Any = None
    labels: Tensor | None = None
    batches: Batches | Callable[[], Batches]
    if find_adapter(model).shape(model).kind == "decoder":
        if goal == "accuracy":
            raise ConfigError("--goal accuracy is about classes; use another one, or give tokens of answers in Python")
        assert images is not None
        batches = _asked(path, model, images, split, limit, batch_size, questions, prompt)
        options["text_tokens"] = _mean_text_tokens(model, batches)
    elif images is None:
        if goal == "accuracy" or class_names:
            raise ConfigError("without images there are no labels and no class names: use another --goal")
        batches = partial(_synthetic, model, limit, batch_size, options["seed"], progress)
    else:
        # Labels are read where they are used: for this goal, and for the names of classes of a model with a text tower.
        needed = goal == "accuracy" or (hasattr(model, "get_text_features") and class_names is None)
        if label_column and not needed:
            raise ConfigError(f"--label-column {label_column} has no effect: labels are for --goal accuracy")
        dataset = load_images(
            images, limit, split, image_column or "image", (label_column or "label") if needed else None
        )
        run, batches, labels = _real(path, model, dataset, batch_size, class_names)
    bar = tqdm(disable=True)

    def start(evaluations: int, inputs: int, seconds: float) -> None:
        nonlocal bar
        time = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
        noun = "prompts" if "text_tokens" in options else "images"
        tqdm.write(f"{evaluations} evaluations on {inputs} {noun}, at most about {time}", sys.stderr)
        bar = tqdm(total=evaluations, desc=f"search {config.method}", unit="evaluation")

    try:
        result = search(
            model,
            config,
            batches,
            **budget,
            strategy=strategy,
            goal=goal,
            labels=labels if goal == "accuracy" else None,
            run=run,
            journal=out / JOURNAL,
            free=() if free == ["none"] else free,
            fixed=fixed if free is None else (),
            on_start=start if progress else lambda *_: None,
            on_trial=lambda trial: bar.update(),
            **options,
        )
    finally:
        bar.close()
    report = {**result.to_dict(), "asked": asked}
    result.config.save_pretrained(out)
    write_text(out / REPORT, json.dumps(report, indent=2) + "\n")
    return report, summary(result, out)


def _real(
    path: str, model: Any, dataset: ImageDataset, batch_size: int, class_names: Path | None
) -> tuple[Any, Batches, Tensor | None]:
    """What maps inputs to logits (None: the model does), inputs on the model's device, and labels if all are known."""
    run, processor = None, None
    if hasattr(model, "get_text_features"):
        from transformers import AutoProcessor

        names = names_for_texts(class_names, dataset)
        processor = AutoProcessor.from_pretrained(path)
        run = similarity_to_classes(model, processor, names)
        dataset, _ = in_classes_of_texts(dataset, names)
    elif class_names:
        raise ConfigError("--class-names has no effect: this model has a classifier of its own")
    else:
        dataset, _ = in_classes_of(dataset, names_of(model))
    prepared = PreprocessedImages(dataset, processor or load_processor(path))
    examples = list(DataLoader(prepared, batch_size=batch_size, collate_fn=collate))
    labels = torch.cat([batch["labels"] for batch in examples])
    batches = [_placed(model, batch["inputs"]) for batch in examples]
    return run, batches, None if bool((labels < 0).any()) else labels


def _asked(
    path: str,
    model: Any,
    source: str,
    split: str | None,
    limit: int,
    batch_size: int,
    questions: list[str] | None,
    prompt: str | None,
) -> Batches:
    """Left-padded prompts: the questions of a data set, or each of ``questions`` about every image."""
    from transformers import AutoProcessor

    images: ImageDataset
    if questions:
        images = load_images(source, limit=limit, split=split, label_column=None)
        asked = [(i, question) for i in range(len(images)) for question in questions]
    else:
        dataset = load_questions(source, limit=limit, split=split)
        images, asked = dataset.images, list(enumerate(dataset.questions))
    processor = AutoProcessor.from_pretrained(path)
    prompt_of, batches = prompts(processor, prompt), []
    for start in range(0, len(asked), batch_size):
        rows = asked[start : start + batch_size]
        inputs = processor(
            images=[images[i]["image"] for i, _ in rows],
            text=[prompt_of(question) for _, question in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        batches.append(_placed(model, inputs))
    return batches


def _mean_text_tokens(model: Any, batches: Batches) -> int:
    """Of a prompt, besides those of its image; rounded."""
    image = getattr(model.config, find_adapter(model).placeholders["image"])
    text = [batch["attention_mask"].bool() & (batch["input_ids"] != image) for batch in batches]
    return round(sum(int(each.sum()) for each in text) / sum(map(len, text)))


def _placed(model: Any, inputs: Any) -> dict[str, Tensor]:
    """Inputs on the model's device and of its dtype."""
    parameter = next(model.parameters())
    return {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _synthetic(model: Any, count: int, batch_size: int, seed: int, progress: bool) -> Batches:
    with tqdm(desc="make images", unit="step", disable=not progress) as bar:
        return synthesize(model, count, batch_size=batch_size, seed=seed, on_step=bar.update)


def summary(result: SearchResult, out: Path) -> str:
    """What was found, beside the method's rule at the same budget."""
    scale, unit = (1e-9, "GMACs") if result.budget > 1e5 else (1e3, "ms")
    goal = result.settings["goal"]
    lines = [
        f"{result.config}",
        f"{goal} {result.distortion:.5g} at {result.cost * scale:.3f} {unit} (budget {result.budget * scale:.3f})",
    ]
    if result.rule is not None:
        lines.append(f"the rule of {result.config.method} at this budget: {goal} {result.rule[1]:.5g}")
    if result.additivity and "spearman" in result.additivity:
        lines.append("sum over layers against measured: rank correlation {spearman:.2f}".format(**result.additivity))
    noun = "prompts" if "new_tokens" in result.settings else "images"
    lines.append(f"{result.measured} evaluations, {result.settings['inputs']} {noun}; {out}")
    return "\n".join(lines)
