"""Wall-clock time of a model, dense and pruned, measured so that it can be believed.

The arms run in turn, round after round (a machine that slows down slows all of them), with the same weights and input.
Reported are medians over rounds of the ratio within a round. The dense model runs as it was given: SDPA by default.
A third arm drops the same number of tokens without looking at them; what pruning takes longer than it is the decision.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .cost import CostReport, cost
from .engine import ConfigLike, as_config, current_config, find_adapter, plan, prune, unprune
from .errors import ConfigError
from .signals import Reduction, Signals, Stage


@dataclass(frozen=True)
class BenchmarkRow:
    """One batch size. Seconds are medians for a whole batch; intervals are quartiles over rounds.

    Attributes:
        speedup: median of dense time over pruned time.
        speedup_quartiles: its lower and upper quartile.
        decision_share: median of (pruned - given) / dense, the cost of choosing the tokens as a fraction of the dense
            time, where "given" drops as many tokens without choosing.
        dense_peak_bytes, pruned_peak_bytes: most memory held at once by tensors of one forward (without the weights).
    """

    batch_size: int
    dense_seconds: float
    pruned_seconds: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    decision_share: float
    dense_peak_bytes: int
    pruned_peak_bytes: int

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
        """JSON values."""
        rows = [{**asdict(row), "of_ideal": row.speedup / self.macs.ideal_speedup} for row in self.rows]
        return {"rows": rows, "macs": self.macs.to_dict(), "rounds": self.rounds, "environment": self.environment}

    def summary(self) -> str:
        """A table with a row a batch size."""
        ideal = self.macs.ideal_speedup
        lines = [
            f"{'batch':>5}{'dense img/s':>13}{'pruned img/s':>14}{'speed-up':>10}{'[quartiles]':>14}{'ideal':>7}"
            f"{'of ideal':>10}{'decision':>10}{'peak memory MB':>17}"
        ]
        for row in self.rows:
            dense, pruned_ = row.images_per_second
            quartiles = "[{:.2f}, {:.2f}]".format(*row.speedup_quartiles)
            memory = f"{row.dense_peak_bytes / 1e6:.0f} -> {row.pruned_peak_bytes / 1e6:.0f}"
            lines.append(
                f"{row.batch_size:>5}{dense:>13.1f}{pruned_:>14.1f}{row.speedup:>9.2f}x{quartiles:>14}{ideal:>6.2f}x"
                f"{row.speedup / ideal:>10.2f}{row.decision_share:>10.1%}{memory:>17}"
            )
        setting = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        lines.append(f"{self.rounds} interleaved rounds; medians; {setting}")
        return "\n".join(lines)


@dataclass(frozen=True)
class GivenStage(Stage):
    """Drops as many tokens as another stage, but which ones costs nothing to know."""

    counted: Stage

    def num_kept(self, num_prunable: int) -> int:
        return self.counted.num_kept(num_prunable)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        keep = torch.arange(n_keep, device=signals.tokens.device)
        return Reduction(keep.expand(signals.tokens.shape[0], -1))


def benchmark(
    model: nn.Module,
    config: ConfigLike | None = None,
    batch_sizes: Sequence[int] = (1, 8, 32),
    rounds: int = 15,
    warmup: int = 2,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    image_size: tuple[int, int] | None = None,
    progress: bool = False,
) -> BenchmarkReport:
    """Time ``model`` dense and pruned on random images, on the device it is on.

    Args:
        model: a model with an adapter; left as it was.
        config: None: the config the model is pruned with.
        batch_sizes: images a forward.
        rounds: measured rounds a batch size, each one forward of every arm, after ``warmup`` unmeasured ones.
        threads: CPU threads, for the measurement only; None: as they are.
        dtype: None: the model's own; another one is measured on a copy.
        image_size: (height, width) in pixels; other than the checkpoint's own it needs ``interpolate_pos_encoding``.
        progress: show a progress bar.

    Raises:
        ConfigError: no config, or one that does not fit; counts below 1.
    """
    config = current_config(model) if config is None else as_config(config)
    if config is None:
        raise ConfigError("this model is not pruned: give benchmark a config")
    for name, counts in (("batch_sizes", batch_sizes), ("rounds", [rounds]), ("threads", [threads or 1])):
        if not counts or min(counts) < 1:
            raise ConfigError(f"{name}={counts}: expected numbers >= 1")
    if dtype is not None and dtype != next(model.parameters()).dtype:
        model = copy.deepcopy(model).to(dtype)
    macs = cost(model, config, image_size)
    with _settings(model, threads):
        rows = []
        with _dense(model):
            for batch_size in batch_sizes:
                rows.append(_measure(model, config, batch_size, rounds, warmup, image_size, progress))
            environment = _environment(model)
    return BenchmarkReport(tuple(rows), macs, rounds, environment)


def _measure(
    model: Any, config: Any, batch_size: int, rounds: int, warmup: int, image_size: Any, progress: bool
) -> BenchmarkRow:
    from tqdm.auto import trange

    adapter = find_adapter(model)
    shape = adapter.shape(model)
    stages = plan(config, shape)
    arms: dict[str, tuple[Stage, ...]] = {
        "dense": (),
        "pruned": stages,
        "given": tuple(GivenStage(stage.layer, stage.where, stage) for stage in stages),
    }
    parameter = next(model.parameters())
    size = image_size or shape.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, shape.num_channels, *size, generator=generator)
    inputs: dict[str, Any] = {"pixel_values": pixels.to(parameter.device, parameter.dtype)}
    if size != shape.image_size:
        inputs["interpolate_pos_encoding"] = True

    def forward(arm: str, timed: Any) -> Any:
        """Run one arm; attaching and detaching stay outside the measurement."""
        if arms[arm]:
            adapter.attach(model, arms[arm])
        try:
            return timed(lambda: model(**inputs))
        finally:
            adapter.detach(model)

    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in trange(warmup + rounds, desc=f"batch {batch_size}", disable=not progress, leave=False):
        order = list(arms) if turn % 2 else list(reversed(arms))
        for arm in order:
            elapsed = forward(arm, _seconds)
            if turn >= warmup:
                seconds[arm].append(elapsed)
    ratios = [d / p for d, p in zip(seconds["dense"], seconds["pruned"], strict=True)]
    shares = [(p - g) / d for d, p, g in zip(*seconds.values(), strict=True)]
    return BenchmarkRow(
        batch_size=batch_size,
        dense_seconds=statistics.median(seconds["dense"]),
        pruned_seconds=statistics.median(seconds["pruned"]),
        speedup=statistics.median(ratios),
        speedup_quartiles=_quartiles(ratios),
        decision_share=statistics.median(shares),
        dense_peak_bytes=forward("dense", _peak_bytes),
        pruned_peak_bytes=forward("pruned", _peak_bytes),
    )


def _seconds(run: Any) -> float:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_bytes(run: Any) -> int:
    """Most bytes that the tensors made in ``run`` held at once."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library logs its start and stop to the file descriptor, past ``sys.stderr``."""
    saved = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, upper


@contextmanager
def _settings(model: nn.Module, threads: int | None) -> Iterator[None]:
    training, before = model.training, torch.get_num_threads()
    model.eval()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
        model.train(training)


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """A model that is pruned becomes dense for the block."""
    former = current_config(model)
    if former is None:
        yield
        return
    unprune(model)
    try:
        yield
    finally:
        prune(model, former)


def _environment(model: Any) -> dict[str, Any]:
    import transformers

    parameter = next(model.parameters())
    device = parameter.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
