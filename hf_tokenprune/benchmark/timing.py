"""Measuring a dense model beside its pruned arms so that it can be believed: what the benchmarks share.

The arms run in turn, round after round (a machine that slows down slows all of them), with the same weights and input.
Reported are medians over rounds of the ratio within a round. The dense model runs as it was given: SDPA by default.
A third arm drops the same number of tokens without looking at them; what pruning takes longer than it is the decision.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ..config import PruneConfig
from ..engine import current_config, find_adapter, options, plan, prune, unprune
from ..signals import Reduction, Signals, Stage
from .medians import Quartiles, speed_up

T = TypeVar("T")


@dataclass(frozen=True)
class GivenStage(Stage):
    """Drops as many tokens as another stage, but which ones costs nothing to know."""

    counted: Stage

    @classmethod
    def like(cls, stage: Stage) -> GivenStage:
        """The stage in the place of another one."""
        return cls(
            stage.layer,
            stage.where,
            stage,
            positions=stage.positions,
            newlines=stage.newlines,
            budget=stage.budget,
        )

    @property
    def counts_from(self) -> Any:  # type: ignore[override]
        return self.counted.counts_from

    def num_kept(self, num_prunable: int) -> int:
        return self.counted.num_kept(num_prunable)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        keep = torch.arange(n_keep, device=signals.tokens.device)
        return Reduction(keep.expand(signals.tokens.shape[0], -1))


def given(stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """Stages that drop as many tokens in the same places without choosing."""
    return tuple(map(GivenStage.like, stages))


@dataclass(frozen=True)
class Timing:
    """One duration, dense beside pruned. Seconds and the speed-up are medians over rounds.

    Attributes:
        speedup: median of dense time over pruned time; None where it cannot be told from noise, see `medians`.
        speedup_quartiles: its lower and upper quartile; None of too few rounds.
    """

    dense_seconds: float
    pruned_seconds: float
    speedup: float | None
    speedup_quartiles: Quartiles | None

    @classmethod
    def of(cls, dense: list[float], pruned: list[float]) -> Timing:
        """From the seconds of every round."""
        return cls(statistics.median(dense), statistics.median(pruned), *speed_up(dense, pruned))


@dataclass(frozen=True)
class Repeats:
    """``rounds`` measured rounds after ``warmup`` unmeasured ones, with a progress bar if asked."""

    rounds: int
    warmup: int
    progress: bool


class Arms:
    """The dense model, the pruned one, and the one whose decision costs nothing."""

    def __init__(self, model: Any, config: PruneConfig) -> None:
        self.model, self.adapter = model, find_adapter(model)
        shape = self.adapter.shape(model)
        stages, asked = plan(config, shape), options(config, shape)
        self.adapter.check(model, stages, **asked)
        self.stages = {"dense": (), "pruned": stages, "given": given(stages)}
        self.options = {
            "pruned": asked,
            "given": asked | {"tower": given(asked["tower"])} if "tower" in asked else asked,
        }

    def run(self, arm: str, measure: Callable[[], T]) -> T:
        """``measure()`` with one arm; attaching and detaching stay outside the measurement."""
        if arm != "dense":
            self.adapter.attach(self.model, self.stages[arm], **self.options[arm])
        try:
            return measure()
        finally:
            self.adapter.detach(self.model)

    def interleave(self, measure: Callable[[], T], repeats: Repeats, label: str) -> dict[str, list[T]]:
        """By arm, what ``measure()`` returned in each measured round."""
        return interleave({arm: partial(self.run, arm, measure) for arm in self.stages}, repeats, label)


def interleave(measures: Mapping[str, Callable[[], T]], repeats: Repeats, label: str) -> dict[str, list[T]]:
    """By arm, what its measure returned in each measured round; the arms take turns in changing order."""
    from tqdm.auto import trange

    measured: dict[str, list[T]] = {arm: [] for arm in measures}
    for turn in trange(repeats.warmup + repeats.rounds, desc=label, disable=not repeats.progress, leave=False):
        for arm in measured if turn % 2 else reversed(measured):
            value = measures[arm]()
            if turn >= repeats.warmup:
                measured[arm].append(value)
    return measured


def seconds(run: Callable[[], Any]) -> float:
    """Wall-clock time of ``run()``, with what it started on a GPU."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if one is used."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any]) -> int:
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


@contextmanager
def settings(model: nn.Module, threads: int | None) -> Iterator[None]:
    """Evaluation mode, no gradients and so many CPU threads, for the block."""
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
def dense(model: nn.Module) -> Iterator[None]:
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


def environment(model: Any) -> dict[str, Any]:
    """What the numbers depend on besides the model."""
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
