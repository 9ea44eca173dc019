"""Dense against pruned on the same images: the numbers, their intervals, and tables of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from hf_tokenprune.benchmark.medians import NOISE, ROUNDS, Quartiles, cell
from hf_tokenprune.errors import TokenPruneError
from hf_tokenprune.evaluation.loop import Logits
from hf_tokenprune.evaluation.scores import (
    agreement,
    as_labels,
    as_logits,
    kl_divergence,
    mean_interval,
    paired_interval,
    topk_correct,
)
from hf_tokenprune.evaluation.tables import aligned, filled, markdown, number, plain, with_interval
from hf_tokenprune.evaluation.turns import DENSE, Speed, check_names


@dataclass(frozen=True)
class Scored:
    """What the images of one run come to: ``(n,)`` each, kept in the place of ``(n, C)`` logits.

    Attributes:
        top1: bool, the label has the largest logit; see `scores.topk_correct`.
        top5: bool, it is among the five largest.
        same: bool, the class is that of the dense run.
        kl: float64, KL(softmax(dense) || softmax(this)) in nats.
    """

    top1: Tensor
    top5: Tensor
    same: Tensor
    kl: Tensor

    @classmethod
    def of(cls, logits: Tensor, dense_logits: Tensor, labels: Tensor) -> "Scored":
        """From ``(n, C)`` float32 logits and ``(n,)`` labels, negative where missing."""
        top1, top5 = (topk_correct(logits, labels, k) for k in (1, 5))
        return cls(top1, top5, agreement(dense_logits, logits), kl_divergence(dense_logits, logits))

    @classmethod
    def joined(cls, parts: Sequence["Scored"]) -> "Scored":
        """One behind the other."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass(frozen=True)
class PairedRow:
    """One run. What does not apply is None: accuracies without labels, comparisons of the dense run with itself.

    Attributes:
        name: of the run; the first row is ``"dense"``.
        n: number of images.
        images_per_second: of the forward passes; see `Speed.per_second`. None without timing.
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
        speed_up: median over batches of the dense run's time over this one's, taken in turn. None where it cannot be
            told from noise, without timing, and of fewer than three full batches.
        speed_up_quartiles: over batches.
        ideal_speed_up: MACs of the dense run over those of this one, if both were given: what the speed-up could be.
    """

    name: str
    n: int
    images_per_second: float | None = None
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
    speed_up_quartiles: Quartiles | None = None
    ideal_speed_up: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What a model card says of this run: those that apply, by name."""
        values = {name: getattr(self, name) for name in ("accuracy", "top5_accuracy", "agreement", "kl")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class PairedReport:
    """Rows of a dense and of pruned runs on the same images, the dense one first.

    Attributes:
        rows: the runs.
        labelled: on how many of the images the accuracies rest.
        classes: how the classes of the images became those of the model; None: by their numbers.
    """

    rows: tuple[PairedRow, ...]
    labelled: int
    classes: str | None = None

    @classmethod
    def from_logits(
        cls, dense: Logits, runs: Mapping[str, Logits], macs: Mapping[str, float] | None = None
    ) -> "PairedReport":
        """Compare ``runs`` with ``dense``, without their speed: they did not take turns.

        Args:
            macs: per image by name, ``"dense"`` included.

        Raises:
            TokenPruneError: runs of other images or classes, a run called "dense", MACs of a run that there is not.
        """
        check_names(runs, macs or {})
        for name, run in runs.items():
            if run.logits.shape != dense.logits.shape or not _same(run.labels, dense.labels):
                raise TokenPruneError(
                    f"run {name!r} has logits of shape {tuple(run.logits.shape)}, the dense run "
                    f"{tuple(dense.logits.shape)}, or they have other labels; both must see the same images in the "
                    "same order"
                )
        logits = {name: as_logits(run.logits, f"logits of {name!r}") for name, run in {DENSE: dense, **runs}.items()}
        labels = torch.full((dense.n,), -1) if dense.labels is None else as_labels(dense.labels, logits[DENSE])
        return cls.from_scores(
            {name: Scored.of(own, logits[DENSE], labels) for name, own in logits.items()}, labels >= 0, macs
        )

    @classmethod
    def from_scores(
        cls,
        runs: Mapping[str, Scored],
        known: Tensor,
        macs: Mapping[str, float] | None = None,
        speeds: Mapping[str, Speed] | None = None,
        classes: str | None = None,
    ) -> "PairedReport":
        """The report of runs by name, the dense one first.

        Args:
            known: ``(n,)`` bool, which images have a label.
        """
        speeds = speeds or {}
        rows = [
            _row(name, run, runs[DENSE], known, macs or {}, speeds.get(name, Speed())) for name, run in runs.items()
        ]
        return cls(tuple(rows), int(known.sum()), classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``images``, ``labelled`` and ``rows`` with the fields and units of `PairedRow`. A number
        that JSON cannot hold (a KL of infinity) is None."""
        about = {"images": self.rows[0].n, "labelled": self.labelled, "classes": self.classes}
        return {**about, "rows": [plain(asdict(row)) for row in self.rows]}

    def summary(self) -> str:
        """The table as plain text, columns aligned, with what it rests on above and below."""
        return f"{self._caption()}\n\n{aligned(*self._table())}\n\n{self._notes()}"

    def to_markdown(self) -> str:
        """The same as Markdown."""
        return f"{self._caption()}\n\n{markdown(*self._table())}\n\n{self._notes()}"

    def _caption(self) -> str:
        how = f", {self.classes}" if self.classes else ""
        return f"{self.rows[0].n} images ({self.labelled} labelled{how}), every run on the same ones."

    def _notes(self) -> str:
        accuracy = "differences in percentage points, Bonett-Price for paired proportions; " if self.labelled else ""
        return f"[ ]: 95 % intervals ({accuracy}KL: normal). KL(dense || run) in nats. {speed_notes(self.rows)}"

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
            "speed-up": lambda row: cell(row.speed_up, row.speed_up_quartiles, ".2f"),
            "ideal": lambda row: number(row.ideal_speed_up, ".2f"),
        }
        return filled({title: [cell(row) for row in self.rows] for title, cell in columns.items()})


def _row(name: str, run: Scored, dense: Scored, known: Tensor, macs: Mapping[str, float], speed: Speed) -> PairedRow:
    row = PairedRow(
        name=name,
        n=len(known),
        accuracy=float(run.top1[known].double().mean()) if known.any() else None,
        top5_accuracy=float(run.top5[known].double().mean()) if known.any() else None,
        macs=macs.get(name),
        images_per_second=speed.per_second,
        speed_up=speed.speed_up,
        speed_up_quartiles=speed.speed_up_quartiles,
    )
    if name == DENSE:
        return row
    top1: tuple[Any, Any] = (None, None)
    top5: tuple[Any, Any] = (None, None)
    if known.any():
        top1 = paired_difference(dense.top1[known], run.top1[known])
        top5 = paired_difference(dense.top5[known], run.top5[known])
    return replace(
        row,
        accuracy_difference=top1[0],
        accuracy_interval=top1[1],
        top5_difference=top5[0],
        top5_interval=top5[1],
        agreement=float(run.same.double().mean()),
        kl=float(run.kl.mean()),
        kl_interval=kl_interval(run.kl),
        ideal_speed_up=macs[DENSE] / macs[name] if {DENSE, name} <= set(macs) else None,
    )


def speed_notes(rows: Sequence[Any], what: str = "images/s: forward passes only") -> str:
    """What stands under a table with the columns of speed, or in their place.

    Args:
        rows: with ``speed_up`` and ``speed_up_quartiles``, the dense one first.
        what: the rate is, and of what.
    """
    if all(row.speed_up_quartiles is None for row in rows):
        return f"No speed-up: it takes turns on at least {ROUNDS} full batches, to the end; `bench` measures it."
    noise = any(row.speed_up_quartiles and row.speed_up is None for row in rows)
    told = f"; {NOISE}: not measurable here, quartiles on both sides of 1" if noise else ""
    return f"{what}, in turn on every batch; speed-up: median over batches [quartiles]{told}."


def paired_difference(dense_correct: Tensor, correct: Tensor) -> tuple[float, tuple[float, float]]:
    """Difference of two fractions measured on the same n images, and its interval, in percentage points.

    Args:
        dense_correct: ``(n,)`` bool.
        correct: ``(n,)`` bool; see `scores.paired_interval`.
    """
    low, high = paired_interval(dense_correct, correct)
    return 100 * (int(correct.sum()) - int(dense_correct.sum())) / len(correct), (100 * low, 100 * high)


def kl_interval(kl: Tensor) -> tuple[float, float] | None:
    """95 % interval of the mean of (n,) values of KL, cut at 0; None for a single one."""
    interval = mean_interval(kl)
    return interval and (max(interval[0], 0.0), interval[1])


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
