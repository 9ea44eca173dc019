"""Methods side by side at equal work: what each loses, and how fast it really is."""

from __future__ import annotations

import csv
import io
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..benchmark import BenchmarkReport
from ..benchmark.medians import cell, explained, over, shown
from ..config import PruneConfig
from ..cost import config_for_macs
from ..engine import find_adapter, options, plan
from ..errors import ConfigError, TokenPruneError
from ..registry import get_method, list_methods
from . import PairedReport
from .tables import filled, markdown, number, with_interval


@dataclass(frozen=True)
class Comparison:
    """Accuracy of every run on the same images, and its interleaved timing.

    Attributes:
        accuracy: the dense run first.
        timing: by run, one batch size each.
        configs: by run; names are "method" or "method@budget".
    """

    accuracy: PairedReport
    timing: Mapping[str, BenchmarkReport]
    configs: Mapping[str, PruneConfig]

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary a run, the dense one first: fractions, percentage points, nats, GMACs and images a second.

        ``images_per_second`` is the dense model's median over all runs, times the run's speed-up: a machine that slows
        down between runs does not change their order. What cannot be told from noise is None, beside its quartiles.
        """
        found = []
        dense_rate = statistics.median(each.rows[0].images_per_second[0] for each in self.timing.values())
        for paired in self.accuracy.rows:
            report = self.timing.get(paired.name)
            low, high = paired.accuracy_interval or (None, None)
            row: dict[str, Any] = {
                "run": paired.name,
                "method": paired.name.partition("@")[0],
                "n": paired.n,
                "gmacs": None if paired.macs is None else paired.macs / 1e9,
                "top1": paired.accuracy,
                "top1_difference_points": paired.accuracy_difference,
                "top1_difference_low": low,
                "top1_difference_high": high,
                "agreement": paired.agreement,
                "kl_nats": paired.kl,
            }
            if report is None:
                row |= {"images_per_second": dense_rate, "speedup": 1.0, "ideal_speedup": 1.0}
            else:
                (measured,), ideal = report.rows, report.macs.ideal_speedup
                fast, slow = measured.speedup_quartiles, measured.decision_quartiles
                row |= {
                    "images_per_second": None if measured.speedup is None else dense_rate * measured.speedup,
                    "speedup": measured.speedup,
                    "speedup_low": fast and fast[0],
                    "speedup_high": fast and fast[1],
                    "ideal_speedup": ideal,
                    "of_ideal": over(measured.speedup, ideal),
                    "decision_share": measured.decision_share,
                    "decision_low": slow and slow[0],
                    "decision_high": slow and slow[1],
                }
            found.append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values: the rows, the configs, and what the numbers depend on."""
        configs = {name: config.to_dict() for name, config in self.configs.items()}
        return {"rows": self.rows(), "configs": configs, "setting": self.setting()}

    def to_csv(self) -> str:
        """The rows, unrounded."""
        text, rows = io.StringIO(), self.rows()
        writer = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table, and the setting under it."""
        rows = self.rows()

        def column(form: str, name: str, scale: float = 1.0) -> list[str]:
            return [number(row.get(name), form, scale) for row in rows]

        def measured(form: str, name: str, ends: str) -> list[str]:
            return [
                cell(row[name], (row[f"{ends}_low"], row[f"{ends}_high"]), form)
                if row.get(f"{ends}_low") is not None
                else shown(row.get(name), form)
                for row in rows
            ]

        intervals = [(row["top1_difference_low"], row["top1_difference_high"]) for row in rows]
        table = filled(
            {
                "run": [row["run"] for row in rows],
                "GMACs": column(".3f", "gmacs"),
                "top-1 vs dense, points": [
                    with_interval(row["top1_difference_points"], None if low is None else (low, high), "+.1f")
                    for row, (low, high) in zip(rows, intervals, strict=True)
                ],
                "agreement %": column(".1f", "agreement", 100),
                "KL, nats": column(".4f", "kl_nats"),
                "images/s": column(".1f", "images_per_second"),
                "speed-up": measured(".2f", "speedup", "speedup"),
                "ideal": column(".2f", "ideal_speedup"),
                "of ideal": column(".2f", "of_ideal"),
                "decision": measured(".1%", "decision_share", "decision"),
            }
        )
        setting = ", ".join(f"{key} {value}" for key, value in self.setting().items())
        text, rounds = markdown(*table), self.setting()["interleaved rounds"]
        labelled = "[ ] beside top-1: 95 % intervals, Bonett-Price for paired proportions; beside speed: "
        return f"{text}\n\n{setting}. {labelled if self.accuracy.labelled else ''}{explained(text, rounds)}."

    def setting(self) -> dict[str, Any]:
        """What the numbers depend on besides model and configs."""
        first = next(iter(self.timing.values()))
        timed = {"batch size": first.rows[0].batch_size, "interleaved rounds": first.rounds}
        return {"images": self.accuracy.rows[0].n, **timed, **first.environment}

    def timed(self) -> Comparison:
        """Of the runs that have been timed so far, and the dense one."""
        names = {self.accuracy.rows[0].name, *self.timing}
        rows = tuple(row for row in self.accuracy.rows if row.name in names)
        configs = {name: config for name, config in self.configs.items() if name in names}
        return Comparison(replace(self.accuracy, rows=rows), self.timing, configs)

    def save(self, folder: Path, command: str) -> list[Path]:
        """Write the tables of accuracy and, as far as they are timed, of all runs, and configs; returns where.

        Args:
            command: goes under the tables.
        """
        configs, files = folder / "configs", {"accuracy.md": self.accuracy.to_markdown()}
        if self.timing:
            timed = self.timed()
            files |= {"comparison.md": timed.to_markdown(), "comparison.csv": timed.to_csv()}
        configs.mkdir(parents=True, exist_ok=True)
        for name, config in self.configs.items():
            config.save_pretrained(configs / name)
        for name, text in files.items():
            below = f"\n\n```bash\n{command}\n```\n" if name.endswith(".md") else ""
            write_text(folder / name, text + below)
        return [*(folder / name for name in files), configs]

    def draw(self, folder: Path) -> Path:
        """The picture of all runs, in ``folder``; returns where.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from ..pictures.reports import curves

        figure, picture = curves(self.to_dict()), folder / "comparison.png"
        figure.suptitle(f"{self.accuracy.rows[0].n} images, every run on the same ones")
        figure.savefig(picture)
        return picture


def every_method(model: Any, budgets: Sequence[float]) -> dict[str, PruneConfig]:
    """All methods for vision encoders that fit the model, scaled to each budget (GMACs an image), as "method@budget".

    Methods without a schedule come once, as they are. What does not fit is left out with a warning that says why.

    Raises:
        ConfigError: nothing fits.
    """
    adapter, found = find_adapter(model), {}
    shape = adapter.shape(model)
    for name in list_methods("vision"):
        config: PruneConfig = get_method(name)()
        scalable = type(config).scaled is not PruneConfig.scaled
        for budget in budgets if scalable else [None]:
            label = name if budget is None else f"{name}@{budget:g}"
            try:
                chosen = config if budget is None else config_for_macs(model, config, budget * 1e9)
                adapter.check(model, plan(chosen, shape), **options(chosen, shape))
            except TokenPruneError as error:
                warnings.warn(f"{label} is left out: {error}", stacklevel=2)
            else:
                found[label] = chosen
    if not found:
        raise ConfigError("no method fits this model and these budgets; the warnings above say why")
    return found
