"""Many benchmarks in one run: the important ones first, within a time, where none that fails ends the others."""

from __future__ import annotations

import gc
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..cost import GenerationCostReport
from ..evaluation.tables import markdown
from .compiled import CompiledBenchmarkReport
from .decoder import PARTS, GenerationBenchmarkReport
from .medians import Quartiles, cell, over, shown
from .timing import Timing
from .vision import BenchmarkReport

Report = BenchmarkReport | GenerationBenchmarkReport | CompiledBenchmarkReport


@dataclass(frozen=True)
class Case:
    """A benchmark that may be run, or left out where the time is spent."""

    name: str
    measure: Callable[[], Report]


@dataclass(frozen=True)
class Line:
    """One line of a table of cases: a part of one batch size, or why there is none.

    Attributes:
        part: "forward", or of a vision-language model "prefill", "decode a token", "end to end".
        speedup, speedup_quartiles: of a report's row.
        ideal: speed-up if time followed MACs.
        dense_peak_bytes, pruned_peak_bytes: of a report's row, where it has them.
        compile_seconds: dense and pruned.
        note: why nothing was measured.
    """

    case: str
    batch_size: int | None = None
    part: str = ""
    dense_seconds: float | None = None
    pruned_seconds: float | None = None
    speedup: float | None = None
    speedup_quartiles: Quartiles | None = None
    ideal: float | None = None
    dense_peak_bytes: int | None = None
    pruned_peak_bytes: int | None = None
    compile_seconds: tuple[float, float] | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """As strings, under `HEADER`."""
        times = [None if value is None else value * 1e3 for value in (self.dense_seconds, self.pruned_seconds)]
        speedup = cell(self.speedup, self.speedup_quartiles, ".2f") if self.part else "-"
        peak, compiling = "-", "-"
        if self.dense_peak_bytes is not None and self.pruned_peak_bytes is not None:
            peak = f"{self.dense_peak_bytes / 1e6:.0f} → {self.pruned_peak_bytes / 1e6:.0f}"
        if self.compile_seconds is not None:
            compiling = "{:.0f} → {:.0f}".format(*self.compile_seconds)
        batch = "-" if self.batch_size is None else str(self.batch_size)
        of_ideal = None if self.ideal is None else over(self.speedup, self.ideal)
        ratios = [speedup, shown(self.ideal, ".2f"), shown(of_ideal, ".2f")]
        return [self.case, batch, self.part, *(shown(t, ".2f") for t in times), *ratios, peak, compiling, self.note]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


HEADER = (
    *("case", "batch", "part", "dense ms", "pruned ms", "speed-up", "ideal", "of ideal"),
    *("peak memory MB", "compile s", "note"),
)


def run_cases(cases: Iterable[Case], seconds: float, progress: Callable[[str], None]) -> Iterator[Line]:
    """Lines of all cases, in order; no case begins after ``seconds``, and those left out say so.

    Args:
        progress: told the name of each case that begins.
    """
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > seconds:
            yield Line(case.name, note="left out: the time is spent")
            continue
        progress(case.name)
        try:
            yield from lines_of(case.name, case.measure())
        except torch.OutOfMemoryError:
            yield Line(case.name, note="out of memory")
        except Exception as error:  # whatever it is, the other cases are measured
            first = str(error).strip().partition("\n")[0]  # some errors say nothing
            yield Line(case.name, note=f"{type(error).__name__}: {first[:200]}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def lines_of(name: str, report: Report) -> Iterator[Line]:
    """The lines of one report."""
    if isinstance(report, CompiledBenchmarkReport):
        part = "prefill" if isinstance(report.macs, GenerationCostReport) else "forward"
        for compiled in report.rows:
            line = Line(name, compiled.batch_size)
            line = replace(line, compile_seconds=(compiled.dense_compile_seconds, compiled.pruned_compile_seconds))
            yield _timed(line, part, compiled, report.macs.ideal_speedup)
        return
    for row in report.rows:
        line = Line(name, row.batch_size)
        peaks = replace(line, dense_peak_bytes=row.dense_peak_bytes, pruned_peak_bytes=row.pruned_peak_bytes)
        if isinstance(report, BenchmarkReport):
            yield _timed(peaks, "forward", row, report.macs.ideal_speedup)
            continue
        for part, ideal in report.ideal.items():
            yield _timed(peaks, PARTS[part], getattr(row, part), ideal)
            peaks = line


def _timed(line: Line, part: str, timing: Any, ideal: float) -> Line:
    of = {name: getattr(timing, name) for name in Timing.__dataclass_fields__}
    return replace(line, part=part, ideal=ideal, **of)


def machine() -> dict[str, str]:
    """The card, its driver, and the versions that times depend on."""
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if not torch.cuda.is_available():
        return {"card": f"none, {platform.processor() or 'cpu'}", **found}
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or driver
    return {"card": torch.cuda.get_device_name(), "driver": driver, "cuda": str(torch.version.cuda), **found}


def write_report(out: Path, lines: Sequence[Line], notes: Mapping[str, str]) -> None:
    """Write a table as ``out`` with ``.md`` and all numbers as ``out`` with ``.json``, each with the machine's name.

    Args:
        notes: what stands beneath the table, by name.
    """
    where = machine()
    head = [f"# Pruning on: {where['card']}", ", ".join(f"{name} {value}" for name, value in where.items())]
    table = markdown(HEADER, [line.cells() for line in lines])
    legend = "Medians of interleaved rounds; [ ] quartiles; noise: they have 1 between them. Memory: without weights."
    below = [f"**{name}**: {text}" for name, text in notes.items()]
    out.with_suffix(".md").write_text("\n\n".join([*head, table, legend, *below]) + "\n", encoding="utf-8")
    data = {"machine": where, "lines": [line.to_dict() for line in lines], **notes}
    out.with_suffix(".json").write_text(json.dumps(data, indent=2), encoding="utf-8")
