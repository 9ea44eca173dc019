"""Wall-clock time, dense against pruned, interleaved; and what the decision costs."""

from .decoder import GenerationBenchmarkReport, GenerationRow
from .run import benchmark
from .vision import BenchmarkReport, BenchmarkRow

__all__ = ["BenchmarkReport", "BenchmarkRow", "GenerationBenchmarkReport", "GenerationRow", "benchmark"]
