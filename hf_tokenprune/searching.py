"""A search on a folder of images: what ``hf-tokenprune search`` does between reading its options and printing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .config import PruneConfig
from .errors import ConfigError
from .evaluation import ImageDataset, load_images, load_processor
from .evaluation.preprocess import PreprocessedImages, collate
from .evaluation.zero_shot import similarity_to_classes
from .search import SearchResult, search
from .search.synthetic import synthesize

JOURNAL = "journal.jsonl"
REPORT = "search.json"


def search_images(
    path: str,
    model: Any,
    images: str | None,
    config: PruneConfig,
    out: Path,
    budget: dict[str, Any],
    *,
    split: str | None,
    limit: int,
    batch_size: int,
    class_names: Path | None,
    progress: bool,
    goal: Any,
    **options: Any,
) -> tuple[SearchResult, str]:
    """Search, write ``prune_config.json``, ``search.json`` and the journal into ``out``; the result and its summary.

    Args:
        path: of the model's checkpoint, for its processor.
        images: what ``load_images`` takes; None: ``limit`` images are made from the model.
        budget: ``macs``, ``seconds`` and ``speedup``, of which one is not None.
        class_names: for a model with a text tower: file with a class in each line; its answers are similarities.
        options: other arguments of ``search``.
    """
    run: Any = None
    labels: Tensor | None = None
    if images is None:
        if goal == "accuracy" or class_names:
            raise ConfigError("without images there are no labels and no class names: use --goal kl or agreement")
        batches = _synthetic(model, limit, batch_size, options["seed"], progress)
    else:
        run, batches, labels = _real(
            path, model, load_images(images, limit=limit, split=split), batch_size, class_names
        )
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    bar = tqdm(desc=f"search {config.method}", unit="evaluation", disable=not progress)

    def start(evaluations: int, seconds: float) -> None:
        bar.reset(total=evaluations)
        time = f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
        bar.write(f"{evaluations} evaluations on {count} images, about {time}")

    with bar:
        result = search(
            model,
            config,
            batches,
            **budget,
            goal=goal,
            labels=labels if goal == "accuracy" else None,
            run=run,
            journal=out / JOURNAL,
            on_start=start if progress else lambda *_: None,
            on_trial=lambda trial: bar.update(),
            **options,
        )
    result.config.save_pretrained(out)
    (out / REPORT).write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    return result, summary(result, out)


Batches = list[dict[str, Tensor]]


def _real(
    path: str, model: Any, dataset: ImageDataset, batch_size: int, class_names: Path | None
) -> tuple[Any, Batches, Tensor | None]:
    """What maps inputs to logits (None: the model does), inputs on the model's device, and labels if all are known."""
    run, processor = None, None
    if hasattr(model, "get_text_features"):
        from transformers import AutoProcessor

        names = class_names.read_text(encoding="utf-8").splitlines() if class_names else dataset.classes
        if names is None:
            raise ConfigError("the images have labels without names: give --class-names FILE, a line a class")
        processor = AutoProcessor.from_pretrained(path)
        run = similarity_to_classes(model, processor, names)
    elif class_names:
        raise ConfigError("--class-names has no effect: this model has a classifier of its own")
    prepared = PreprocessedImages(dataset, processor or load_processor(path))
    examples = list(DataLoader(prepared, batch_size=batch_size, collate_fn=collate))
    labels = torch.cat([batch["labels"] for batch in examples])
    parameter = next(model.parameters())

    def placed(value: Tensor) -> Tensor:
        return value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)

    batches = [{name: placed(value) for name, value in batch["inputs"].items()} for batch in examples]
    return run, batches, None if bool((labels < 0).any()) else labels


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
    lines.append(f"{result.measured} evaluations, {result.settings['inputs']} images; {out}")
    return "\n".join(lines)
