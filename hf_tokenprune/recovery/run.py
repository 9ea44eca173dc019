"""A recovery from the arguments of ``hf-tokenprune recover``: what it reads, and the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..config import PruneConfig
from ..engine import current_config, find_adapter, prune
from ..errors import ConfigError
from ..evaluation import ImageDataset, QuestionDataset, load_images, load_processor, load_questions
from . import RecoveryReport, recover

REPORT, CHECKPOINT = "recovery.json", "recovery-state.safetensors"
"""In the folder that is written to, beside the config and its values: the report, and what goes on after an
interruption."""


def recover_checkpoint(
    path: str,
    model: Any,
    source: str,
    config: PruneConfig,
    out: Path,
    *,
    split: str | None,
    limit: int | None,
    image_column: str,
    class_names: Sequence[str] | None,
    questions: Sequence[str] | None,
    accelerator: Any,
    **settings: Any,
) -> RecoveryReport:
    """Prune a dense model, recover it, and write config, values and report into a folder.

    Args:
        path: of its checkpoint, for the processor.
        questions: for vision-language models: asked of every image; None: the data has its own.
        settings: for ``recover``.
    """
    from transformers import AutoProcessor

    decoder = find_adapter(model).shape(model).kind == "decoder"
    images: ImageDataset | QuestionDataset
    if decoder and not questions:
        images = load_questions(source, limit=limit, split=split)
    else:
        images = load_images(source, limit=limit, split=split, image_column=image_column, label_column=None)
        images = asked_of_all(images, questions) if questions else images
    processor = AutoProcessor.from_pretrained(path) if decoder or class_names else load_processor(path)
    report = recover(
        prune(model, config), images, processor, class_names=class_names, checkpoint=out / CHECKPOINT,
        accelerator=accelerator, **settings,
    )  # fmt: skip
    if accelerator.is_main_process:
        recovered = current_config(model)
        assert recovered is not None
        recovered.save_pretrained(out)
        write_text(out / REPORT, json.dumps(report.to_dict(), indent=2) + "\n")
        (out / CHECKPOINT).unlink(missing_ok=True)
    return report


def asked_of_all(images: ImageDataset, questions: Sequence[str]) -> QuestionDataset:
    """Each question about every image; what the right answers are is not asked for."""
    if not all(question.strip() for question in questions):
        raise ConfigError("--question is empty; give a text")
    every = [i for i in range(len(images)) for _ in questions]
    shown = ImageDataset(
        [images.sources[i] for i in every], [images.names[i] for i in every], [None] * len(every), None
    )
    texts = [*questions] * len(images)
    return QuestionDataset(shown, texts, [()] * len(every), [None] * len(every))
