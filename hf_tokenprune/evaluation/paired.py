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
from hf_tokenprune.evaluation.turns import DENSE, Speed, Variants, check_names


class InterruptedEvaluation(KeyboardInterrupt):
    """Ctrl-C while images were being scored.

    Attributes:
        report: of the batches that every run was scored on until then, without speeds.
    """

    def __init__(self, report: PairedReport) -> None:
        super().__init__()
        self.report = report


def evaluate_paired(
    model: nn.Module,
    images: ImageDataset,
    processor: Callable[..., Mapping[str, Any]],
    variants: Variants,
    macs: Mapping[str, float] | None = None,
    batch_size: int = 32,
    accelerator: Any = None,
    progress: bool = True,
    processors: Mapping[str, Callable[..., Mapping[str, Any]]] | None = None,
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
        processors: by name of a variant, what makes its inputs in place of ``processor``; see `resized`.

    Raises:
        DataError: a class of the images is none of the model's.
        TokenPruneError: see `PairedReport.from_logits`; names are checked before anything runs. And what
            `collect_logits` raises.
        InterruptedEvaluation: ctrl-C, behind the first batch; it has the report of what is scored.
    """
    check_names(variants, macs or {}, processors or {})
    accelerator = accelerator or require("accelerate").Accelerator()
    images, mapping = in_classes_of(images, names_of(model))
    scored: list[tuple[dict[str, Scored], Tensor]] = []  # a batch at once: an interrupt cuts none in two

    def score(said: dict[str, Tensor], labels: Tensor) -> None:
        checked = {name: as_logits(logits, f"logits of {name!r}") for name, logits in said.items()}
        found = {name: Scored.of(logits, checked[DENSE], labels) for name, logits in checked.items()}
        scored.append((found, labels >= 0))

    def report(speeds: Mapping[str, Speed] | None = None) -> PairedReport:
        runs = {name: Scored.joined([found[name] for found, _ in scored]) for name in (DENSE, *variants)}
        return PairedReport.from_scores(runs, torch.cat([known for _, known in scored]), macs, speeds, mapping)

    prepared = PreprocessedImages(images, processor, processors)
    try:
        turns, counts = run_in_turn(model, prepared, variants, score, batch_size, accelerator, progress)
    except KeyboardInterrupt as interrupt:
        if not scored:
            raise
        # Without speeds: processes gather these, and each may be at another batch.
        raise InterruptedEvaluation(report()) from interrupt
    return report(turns.speeds(counts))
