"""Wall-clock time of a model, dense and pruned, beside what the MACs promise. How it is measured: ``timing``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..cost import CostReport
from ..engine import find_adapter
from .medians import Quartiles, cell, decision_share, explained, over, shown
from .operations import count_operations
from .timing import Arms, Repeats, Timing, peak_bytes, seconds


@dataclass(frozen=True)
class BenchmarkRow:
    """One batch size. Seconds are medians for a whole batch; intervals are quartiles over rounds.

    Attributes:
        speedup: median of dense time over pruned time; None where it cannot be told from noise, see `medians`.
        speedup_quartiles: its lower and upper quartile; None of too few rounds.
        decision_share: median of (pruned - given) / dense, the cost of choosing the tokens as a fraction of the dense
            time, where "given" drops as many tokens without choosing; None where it cannot be told from noise.
        decision_quartiles: its lower and upper quartile; None of too few rounds.
        dense_peak_bytes, pruned_peak_bytes: most memory held at once by tensors of one forward (without the weights);
            None in another engine than PyTorch.
        dense_operations, pruned_operations: what one forward dispatches, views not counted, see `operations`; None in
            another engine than PyTorch.
    """

    batch_size: int
    dense_seconds: float
    pruned_seconds: float
    speedup: float | None
    speedup_quartiles: Quartiles | None
    decision_share: float | None
    decision_quartiles: Quartiles | None
    dense_peak_bytes: int | None = None
    pruned_peak_bytes: int | None = None
    dense_operations: int | None = None
    pruned_operations: int | None = None

    @classmethod
    def of(cls, batch_size: int, measured: dict[str, list[float]], **more: Any) -> BenchmarkRow:
        """From the seconds of every round of the three arms."""
        share, spread = decision_share(**measured)
        timing = Timing.of(measured["dense"], measured["pruned"])
        return cls(batch_size, **vars(timing), decision_share=share, decision_quartiles=spread, **more)

    @property
    def images_per_second(self) -> tuple[float, float]:
        """Dense and pruned."""
        return self.batch_size / self.dense_seconds, self.batch_size / self.pruned_seconds


@dataclass(frozen=True)
class BenchmarkReport:
    """All batch sizes, beside what the MACs promise."""

    rows: tuple[BenchmarkRow, ...]
    macs: CostReport
    rounds: int
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None for what cannot be told from noise."""
        rows = [{**asdict(row), "of_ideal": over(row.speedup, self.macs.ideal_speedup)} for row in self.rows]
        return {"rows": rows, "macs": self.macs.to_dict(), "rounds": self.rounds, "environment": self.environment}

    def summary(self) -> str:
        """A table with a row a batch size."""
        ideal = self.macs.ideal_speedup
        lines = [
            f"{'batch':>5}{'dense img/s':>13}{'pruned img/s':>14}{'speed-up':>21}{'ideal':>7}"
            f"{'of ideal':>10}{'decision':>24}{'peak memory MB':>17}{'operations':>15}"
        ]
        for row in self.rows:
            dense_rate, pruned_rate = row.images_per_second
            memory = operations = "-"
            if row.dense_peak_bytes is not None and row.pruned_peak_bytes is not None:
                memory = f"{row.dense_peak_bytes / 1e6:.0f} -> {row.pruned_peak_bytes / 1e6:.0f}"
                operations = f"{row.dense_operations} -> {row.pruned_operations}"
            lines.append(
                f"{row.batch_size:>5}{dense_rate:>13.1f}{pruned_rate:>14.1f}"
                f"{cell(row.speedup, row.speedup_quartiles, '.2f'):>21}{ideal:>7.2f}"
                f"{shown(over(row.speedup, ideal), '.2f'):>10}"
                f"{cell(row.decision_share, row.decision_quartiles, '.1%'):>24}{memory:>17}{operations:>15}"
            )
        setting = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        lines.append(f"{self.rounds} interleaved rounds; medians; {explained(''.join(lines), self.rounds)}; {setting}")
        return "\n".join(lines)


def image_forward(
    model: Any, batch_size: int, image_size: tuple[int, int] | None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(what images pass of ``model``, the arguments that it takes random ones in)."""
    adapter = find_adapter(model)
    shape = adapter.shape(model)
    parameter = next(model.parameters())
    size = image_size or shape.image_size
    pixels = torch.randn(batch_size, shape.num_channels, *size, generator=torch.Generator().manual_seed(0))
    run = getattr(model, "get_image_features", model)  # of a model with a text tower
    return run, adapter.image_inputs(model, pixels.to(parameter.device, parameter.dtype))


def measure_images(arms: Arms, batch_size: int, image_size: tuple[int, int] | None, repeats: Repeats) -> BenchmarkRow:
    run, inputs = image_forward(arms.model, batch_size, image_size)

    def forward() -> None:
        run(**inputs)

    measured = arms.interleave(lambda: seconds(forward), repeats, f"batch {batch_size}")
    return BenchmarkRow.of(
        batch_size,
        measured,
        dense_peak_bytes=arms.run("dense", lambda: peak_bytes(forward)),
        pruned_peak_bytes=arms.run("pruned", lambda: peak_bytes(forward)),
        dense_operations=arms.run("dense", lambda: count_operations(run, inputs)),
        pruned_operations=arms.run("pruned", lambda: count_operations(run, inputs)),
    )
