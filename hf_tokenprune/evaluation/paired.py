"""Classifiers, dense and pruned, on the same images in turn: accuracy, agreement and speed in one pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_tokenprune.evaluation.classes import in_classes_of, names_of
from hf_tokenprune.evaluation.images import ImageDataset
from hf_tokenprune.evaluation.loop import run_in_turn
from hf_tokenprune.evaluation.optional import require
from hf_tokenprune.evaluation.preprocess import PreprocessedImages
from hf_tokenprune.evaluation.report import PairedReport, Scored
from hf_tokenprune.evaluation.scores import as_logits
from hf_tokenprune.evaluation.turns import DENSE, Variants, check_names


def evaluate_paired(
    model: nn.Module,
    images: ImageDataset,
    processor: Callable[..., Mapping[str, Any]],
    variants: Variants,
    macs: Mapping[str, float] | None = None,
    batch_size: int = 32,
    accelerator: Any = None,
    progress: bool = True,
) -> PairedReport:
    """Run a model as it is and within each variant on the same images, in turn on every batch.

    So a machine that slows down slows all of them, images are processed once, and of the logits only what they come to
    is kept. A compiled model would compile anew with every change: compare those with `collect_logits`.

    Args:
        model: a classifier; see `collect_logits`, also for the arguments not listed here.
        images: what `load_images` returns. Names of classes are found among those of the model, see
            `classes.in_classes_of`; the report says so.
        processor: image processor of the model.
        variants: name -> function that makes a context manager, in which ``model`` is changed: for example
            ``{"ToMe r=8": lambda: pruned(model, config)}``. It is entered anew for every batch.
        macs: multiply-adds per image of ``"dense"`` and of the variants; any may be left out.

    Raises:
        DataError: a class of the images is none of the model's.
        TokenPruneError: see `PairedReport.from_logits`; names are checked before anything runs. And what
            `collect_logits` raises.
    """
    check_names(variants, macs or {})
    accelerator = accelerator or require("accelerate").Accelerator()
    names = names_of(model)
    mapping = "classes by their place" if images.classes is not None else None
    if names is not None:
        images, mapping = in_classes_of(images, names)
    parts: dict[str, list[Scored]] = {name: [] for name in (DENSE, *variants)}
    known: list[Tensor] = []

    def score(said: dict[str, Tensor], labels: Tensor) -> None:
        checked = {name: as_logits(logits, f"logits of {name!r}") for name, logits in said.items()}
        for name, logits in checked.items():
            parts[name].append(Scored.of(logits, checked[DENSE], labels))
        known.append(labels >= 0)

    prepared = PreprocessedImages(images, processor)
    turns, counts = run_in_turn(model, prepared, variants, score, batch_size, accelerator, progress)
    scores = {name: Scored.joined(own) for name, own in parts.items()}
    return PairedReport.from_scores(scores, torch.cat(known), macs, turns.speeds(counts), mapping)
