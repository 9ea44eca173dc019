"""Wall-clock time, dense against pruned, interleaved; and what the decision costs."""

from .compiled import CompiledBenchmarkReport, CompiledRow
from .decoder import GenerationBenchmarkReport, GenerationRow
from .run import benchmark
from .vision import BenchmarkReport, BenchmarkRow

__all__ = [
    "BenchmarkReport",
    "BenchmarkRow",
    "CompiledBenchmarkReport",
    "CompiledRow",
    "GenerationBenchmarkReport",
    "GenerationRow",
    "benchmark",
]
