"""Wall-clock time under ``torch.compile``: the dense model compiled against the pruned one compiled.

A graph is made for one state of a model, so each arm is a model of its own, which shares the weights, and keeps its
graph. Operations are not counted: the compiler fuses them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch

from ..config import PruneConfig
from ..cost import CostReport, GenerationCostReport
from ..engine import prune
from .decoder import checked_inputs
from .medians import Quartiles, cell, explained, over, shown
from .timing import Repeats, Timing, interleave, seconds
from .vision import image_forward

CompileMode = Literal["default", "reduce-overhead"]
"""Of ``torch.compile``. The second one replays CUDA graphs: on a CPU it is like the first."""


@dataclass(frozen=True)
class CompiledRow:
    """One batch size: forwards of an encoder, or prefills of a vision-language model. Seconds are for a whole batch.

    Attributes:
        speedup: median of dense time over pruned time; None where it cannot be told from noise, see `medians`.
        speedup_quartiles: its lower and upper quartile; None of too few rounds.
        dense_compile_seconds, pruned_compile_seconds: of the first forward, which compiles.
        dense_graphs, pruned_graphs: in how many the compiler cut the forward; of an encoder always one.
    """

    batch_size: int
    dense_seconds: float
    pruned_seconds: float
    speedup: float | None
    speedup_quartiles: Quartiles | None
    dense_compile_seconds: float
    pruned_compile_seconds: float
    dense_graphs: int
    pruned_graphs: int


@dataclass(frozen=True)
class CompiledBenchmarkReport:
    """All batch sizes, beside what the MACs promise."""

    rows: tuple[CompiledRow, ...]
    macs: CostReport | GenerationCostReport
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
            f"{'batch':>5}{'dense ms':>11}{'pruned ms':>11}{'speed-up':>21}{'ideal':>7}{'of ideal':>10}"
            f"{'compile s':>15}{'graphs':>12}"
        ]
        for row in self.rows:
            compiling = f"{row.dense_compile_seconds:.1f} -> {row.pruned_compile_seconds:.1f}"
            lines.append(
                f"{row.batch_size:>5}{row.dense_seconds * 1e3:>11.1f}{row.pruned_seconds * 1e3:>11.1f}"
                f"{cell(row.speedup, row.speedup_quartiles, '.2f'):>21}{ideal:>7.2f}"
                f"{shown(over(row.speedup, ideal), '.2f'):>10}{compiling:>15}"
                f"{f'{row.dense_graphs} -> {row.pruned_graphs}':>12}"
            )
        setting = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        what = f"{self.macs.prompt}, prefill; " if isinstance(self.macs, GenerationCostReport) else ""
        legend = explained("".join(lines), self.rounds)
        lines.append(f"{what}{self.rounds} interleaved rounds; medians; {legend}; {setting}")
        return "\n".join(lines)


def measure_compiled(
    model: Any,
    config: PruneConfig,
    batch_size: int,
    text_tokens: int | None,
    image_size: tuple[int, int] | None,
    repeats: Repeats,
    mode: CompileMode,
) -> CompiledRow:
    """One row; graphs that were compiled before, of any model, are forgotten.

    Args:
        text_tokens: of each prompt, besides those of its one image; None: ``model`` is an encoder.

    Raises:
        UnsupportedModelError: a vision-language model without a head.
    """
    from torch._dynamo.utils import counters  # which takes a second

    models = {"dense": twin(model), "pruned": prune(twin(model), config)}  # torch.compile leaves a mark on them
    if text_tokens is None:
        prepared = {arm: image_forward(each, batch_size, image_size) for arm, each in models.items()}
    else:
        inputs = checked_inputs(model, batch_size, text_tokens, image_size)
        prepared = {arm: (each, {**inputs, "use_cache": True, "logits_to_keep": 1}) for arm, each in models.items()}
    forwards: dict[str, Callable[[], None]] = {}
    compiling, graphs = {}, {}
    for arm, (run, given) in prepared.items():
        # Else a second batch size would be compiled for all of them, and arms would share what they have in common.
        torch.compiler.reset()
        forwards[arm] = partial(replay, torch.compile(run, fullgraph=text_tokens is None, mode=mode), given)
        before = counters["stats"]["unique_graphs"]
        compiling[arm] = seconds(forwards[arm])
        graphs[arm] = counters["stats"]["unique_graphs"] - before
    forwards["dense"]()  # its graphs are forgotten
    measured = interleave({arm: partial(seconds, f) for arm, f in forwards.items()}, repeats, f"batch {batch_size}")
    return CompiledRow(
        batch_size,
        **vars(Timing.of(measured["dense"], measured["pruned"])),
        dense_compile_seconds=compiling["dense"],
        pruned_compile_seconds=compiling["pruned"],
        dense_graphs=graphs["dense"],
        pruned_graphs=graphs["pruned"],
    )


def replay(run: Callable[..., Any], inputs: dict[str, Any]) -> None:
    """One forward whose outputs nobody keeps, so that CUDA graphs may write over those of the one before."""
    torch.compiler.cudagraph_mark_step_begin()
    run(**inputs)


def twin(model: Any) -> Any:
    """A copy of ``model`` that shares its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
