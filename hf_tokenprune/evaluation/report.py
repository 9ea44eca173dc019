"""Dense against pruned on the same images: the numbers, their intervals, and tables of them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_tokenprune.errors import TokenPruneError
from hf_tokenprune.evaluation.images import ImageDataset
from hf_tokenprune.evaluation.loop import Logits, collect_logits
from hf_tokenprune.evaluation.preprocess import PreprocessedImages
from hf_tokenprune.evaluation.scores import kl_divergence, mean_interval, paired_interval, summarize, topk_correct
from hf_tokenprune.evaluation.tables import aligned, filled, markdown, number, plain, with_interval

DENSE = "dense"


@dataclass(frozen=True)
class PairedRow:
    """One run. What does not apply is None: accuracies without labels, comparisons of the dense run with itself.

    Attributes:
        name: of the run; the first row is ``"dense"``.
        n: number of images.
        images_per_second: of the forward passes; one pass over the images, so expect some percent of noise.
        accuracy: top-1, fraction of the labelled images.
        accuracy_difference: to the dense run on the same images, in percentage points; negative is a loss.
        accuracy_interval: 95 % interval of that difference, in percentage points; see `scores.paired_interval`. It is
            centred a little nearer to 0 than the difference itself.
        top5_accuracy: fraction of the labelled images.
        top5_difference: as accuracy_difference; not in the tables.
        top5_interval: as accuracy_interval; not in the tables.
        agreement: fraction of images given the same class as by the dense run.
        kl: mean KL(softmax(dense) || softmax(this)) in nats.
        kl_interval: its 95 % interval, mean +- 1.96 sd / sqrt(n), cut at 0; None for a single image.
        macs: multiply-adds per image, as given by the caller.
        speed_up: images_per_second over those of the dense run.
        ideal_speed_up: MACs of the dense run over those of this one, if both were given: what the speed-up could be.
    """

    name: str
    n: int
    images_per_second: float
    accuracy: float | None = None
    accuracy_difference: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    top5_accuracy: float | None = None
    top5_difference: float | None = None
    top5_interval: tuple[float, float] | None = None
    agreement: float | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    macs: float | None = None
    speed_up: float | None = None
    ideal_speed_up: float | None = None


@dataclass(frozen=True)
class PairedReport:
    """Rows of a dense and of pruned runs on the same images, the dense one first.

    Attributes:
        rows: the runs.
        labelled: on how many of the images the accuracies rest.
    """

    rows: tuple[PairedRow, ...]
    labelled: int

    @classmethod
    def from_logits(
        cls, dense: Logits, runs: Mapping[str, Logits], macs: Mapping[str, float] | None = None
    ) -> "PairedReport":
        """Compare ``runs`` with ``dense``; ``macs`` per image by name, ``"dense"`` included.

        Raises:
            TokenPruneError: runs of other images or classes, a run called "dense", MACs of a run that there is not.
        """
        macs = macs or {}
        check_names(runs, macs)
        rows = [_dense_row(dense, macs), *(_row(name, run, dense, macs) for name, run in runs.items())]
        return cls(tuple(rows), 0 if dense.labels is None else int((dense.labels >= 0).sum()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``images``, ``labelled`` and ``rows`` with the fields and units of `PairedRow`. A number
        that JSON cannot hold (a KL of infinity) is None."""
        return {"images": self.rows[0].n, "labelled": self.labelled, "rows": [plain(asdict(row)) for row in self.rows]}

    def summary(self) -> str:
        """The table as plain text, columns aligned, with what it rests on above and below."""
        return f"{self._caption()}\n\n{aligned(*self._table())}\n\n{self._notes()}"

    def to_markdown(self) -> str:
        """The same as Markdown."""
        return f"{self._caption()}\n\n{markdown(*self._table())}\n\n{self._notes()}"

    def _caption(self) -> str:
        return f"{self.rows[0].n} images ({self.labelled} labelled), every run on the same ones."

    def _notes(self) -> str:
        accuracy = "differences in percentage points, Bonett-Price for paired proportions; " if self.labelled else ""
        return (
            f"[ ]: 95 % intervals ({accuracy}KL: normal). KL(dense || run) in nats. "
            "images/s: forward passes only, one pass."
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Header and cells; columns that are empty in all rows are left out."""
        columns: dict[str, Callable[[PairedRow], str]] = {
            "run": lambda row: row.name,
            "top-1 %": lambda row: number(row.accuracy, ".2f", 100),
            "vs dense": lambda row: with_interval(row.accuracy_difference, row.accuracy_interval, "+.2f"),
            "top-5 %": lambda row: number(row.top5_accuracy, ".2f", 100),
            "agreement %": lambda row: number(row.agreement, ".2f", 100),
            "KL": lambda row: with_interval(row.kl, row.kl_interval, ".3g"),
            "GMACs": lambda row: number(row.macs, ".3f", 1e-9),
            "images/s": lambda row: number(row.images_per_second, ".1f"),
            "speed-up": lambda row: number(row.speed_up, ".2f"),
            "ideal": lambda row: number(row.ideal_speed_up, ".2f"),
        }
        return filled({title: [cell(row) for row in self.rows] for title, cell in columns.items()})


def evaluate_paired(
    model: nn.Module,
    images: ImageDataset,
    processor: Callable[..., Mapping[str, Any]],
    variants: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    macs: Mapping[str, float] | None = None,
    batch_size: int = 32,
    accelerator: Any = None,
    progress: bool = True,
    cache_bytes: int = 2 * 10**9,
) -> PairedReport:
    """Run a model as it is, then within each variant, on the same images.

    Args:
        model: a classifier; see `collect_logits`, also for the arguments not listed here.
        images: what `load_images` returns.
        processor: image processor of the model.
        variants: name -> function that makes a context manager, in which ``model`` is changed: for example
            ``{"ToMe r=8": lambda: pruned(model, config)}``.
        macs: multiply-adds per image of ``"dense"`` and of the variants; any may be left out.
        cache_bytes: images are processed once, if what becomes of them fits into this many bytes, else for every run.

    Raises:
        TokenPruneError: see `PairedReport.from_logits`; names are checked before anything runs. And what
            `collect_logits` raises.
    """
    check_names(variants, macs or {})
    prepared = PreprocessedImages(images, processor, cache_bytes)
    dense, runs = collect_runs(model, prepared, variants, batch_size, accelerator, progress)
    return PairedReport.from_logits(dense, runs, macs)


def collect_runs(
    model: nn.Module,
    images: PreprocessedImages,
    variants: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    batch_size: int,
    accelerator: Any,
    progress: bool,
) -> tuple[Logits, dict[str, Logits]]:
    """What a model says as it is, and within each variant by its name; see `evaluate_paired` and `collect_logits`."""

    def run(name: str) -> Logits:
        return collect_logits(
            model, images, batch_size=batch_size, accelerator=accelerator, progress=progress, desc=name
        )

    dense = run(DENSE)
    runs = {}
    for name, variant in variants.items():
        with variant():
            runs[name] = run(name)
    return dense, runs


def check_names(runs: Mapping[str, Any], macs: Mapping[str, float]) -> None:
    """Names of runs, and of those whose MACs are known.

    Raises:
        TokenPruneError: a run called "dense", MACs of a run that there is not.
    """
    if DENSE in runs:
        raise TokenPruneError(f"a run is called {DENSE!r}, which names the model as it is; call it otherwise")
    if unknown := sorted(set(macs) - {DENSE, *runs}):
        raise TokenPruneError(f"macs of {', '.join(map(repr, unknown))}, but the runs are {[DENSE, *runs]}")


def _dense_row(dense: Logits, macs: Mapping[str, float]) -> PairedRow:
    scores = summarize(dense.logits, dense.labels)
    return PairedRow(
        name=DENSE,
        n=dense.n,
        accuracy=scores.get("accuracy"),
        top5_accuracy=scores.get("top5_accuracy"),
        macs=macs.get(DENSE),
        images_per_second=dense.images_per_second,
    )


def _row(name: str, run: Logits, dense: Logits, macs: Mapping[str, float]) -> PairedRow:
    if run.logits.shape != dense.logits.shape or not _same(run.labels, dense.labels):
        raise TokenPruneError(
            f"run {name!r} has logits of shape {tuple(run.logits.shape)}, the dense run {tuple(dense.logits.shape)}, "
            "or they have other labels; both must see the same images in the same order"
        )
    scores = summarize(run.logits, dense.labels, dense.logits)
    top1: tuple[Any, Any] = (None, None)
    top5: tuple[Any, Any] = (None, None)
    if dense.labels is not None:
        known = dense.labels >= 0
        top1, top5 = (
            paired_difference(*(topk_correct(logits, dense.labels, k)[known] for logits in (dense.logits, run.logits)))
            for k in (1, 5)
        )
    kl_interval = mean_interval(kl_divergence(dense.logits, run.logits))
    return PairedRow(
        name=name,
        n=run.n,
        accuracy=scores.get("accuracy"),
        accuracy_difference=top1[0],
        accuracy_interval=top1[1],
        top5_accuracy=scores.get("top5_accuracy"),
        top5_difference=top5[0],
        top5_interval=top5[1],
        agreement=scores["agreement"],
        kl=scores["kl"],
        kl_interval=kl_interval and (max(kl_interval[0], 0.0), kl_interval[1]),
        macs=macs.get(name),
        images_per_second=run.images_per_second,
        speed_up=run.images_per_second / dense.images_per_second,
        ideal_speed_up=macs[DENSE] / macs[name] if DENSE in macs and name in macs else None,
    )


def paired_difference(dense_correct: Tensor, correct: Tensor) -> tuple[float, tuple[float, float]]:
    """Difference of two fractions measured on the same n images, and its interval, in percentage points.

    Args:
        dense_correct: ``(n,)`` bool.
        correct: ``(n,)`` bool; see `scores.paired_interval`.
    """
    low, high = paired_interval(dense_correct, correct)
    return 100 * (int(correct.sum()) - int(dense_correct.sum())) / len(correct), (100 * low, 100 * high)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
