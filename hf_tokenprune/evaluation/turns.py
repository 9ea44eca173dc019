"""A model as it is and its variants, in turn on every batch: what each says, and how long it takes for it."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from hf_tokenprune.benchmark.medians import Quartiles, quartiles, speed_up
from hf_tokenprune.errors import TokenPruneError

DENSE = "dense"
T = TypeVar("T")
Variants = Mapping[str, Callable[[], AbstractContextManager[Any]]]


def check_names(
    runs: Mapping[str, Any], macs: Mapping[str, float], processors: Mapping[str, Any] | None = None
) -> None:
    """Names of runs, of those whose MACs are known, and of those that have a processor of their own.

    Raises:
        TokenPruneError: a run called "dense", MACs or a processor of a run that there is not.
    """
    if DENSE in runs:
        raise TokenPruneError(f"a run is called {DENSE!r}, which names the model as it is; call it otherwise")
    if unknown := sorted(set(macs) - {DENSE, *runs}):
        raise TokenPruneError(f"macs of {', '.join(map(repr, unknown))}, but the runs are {[DENSE, *runs]}")
    if unknown := sorted(set(processors or {}) - set(runs)):
        raise TokenPruneError(f"processors of {', '.join(map(repr, unknown))}, but the variants are {[*runs]}")


@dataclass(frozen=True)
class Speed:
    """How fast a run is beside the dense one. None: too few batches, or not to be told from noise.

    Attributes:
        per_second: what goes in: of the dense run in its median batch, of another that times its speed-up.
        speed_up: median over batches of the dense run's time over this one's; None for the dense run.
        speed_up_quartiles: over batches; None for the dense run, and of too few batches.
    """

    per_second: float | None = None
    speed_up: float | None = None
    speed_up_quartiles: Quartiles | None = None


class Turns:
    """Runs the arms, ``"dense"`` and the variants, one after the other on every batch, and back on the next one.

    A machine that slows down slows all of them, and none is always first. Each arm runs in eval mode, without gradients
    and under the accelerator's autocast; entering and leaving a variant is not timed.

    Args:
        model: what the variants change.
        variants: name -> function that makes a context manager, in which ``model`` is changed; entered anew for every
            batch.
        accelerator: an ``accelerate.Accelerator``.

    Attributes:
        seconds: by arm, of every batch on this process.
    """

    def __init__(self, model: nn.Module, variants: Variants, accelerator: Any) -> None:
        self.model = model
        self.accelerator = accelerator
        self.arms: Variants = {DENSE: nullcontext, **variants}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.arms}

    def warm_up(self, call: Callable[[str], T]) -> T:
        """Every arm once, untimed: whichever goes first would else pay for loading kernels. What the dense one says."""
        return {name: self.run(name, call) for name in self.arms}[DENSE]

    def take(self, call: Callable[[str], T]) -> dict[str, T]:
        """What ``call(its name)`` returns in every arm, in the order of the arms; one timed turn."""
        backwards = len(self.seconds[DENSE]) % 2
        found = {}
        for name in reversed(list(self.arms)) if backwards else self.arms:
            found[name] = self.run(name, call, self.seconds[name])
        return {name: found[name] for name in self.arms}

    def slowest(self) -> dict[str, list[float]]:
        """By arm, the seconds of every batch on the process that took longest for it. Every process calls this."""
        own = torch.tensor(list(self.seconds.values()), device=self.accelerator.device)
        every = self.accelerator.gather(own).unflatten(0, (-1, len(own)))
        return dict(zip(self.arms, every.amax(0).tolist(), strict=True))

    def speeds(self, counts: list[int]) -> dict[str, Speed]:
        """By arm; ``counts`` are what was in every batch, all processes together. Only full batches count."""
        full = [i for i, count in enumerate(counts) if count == max(counts)]
        times = {name: [each[i] for i in full] for name, each in self.slowest().items()}
        dense = times.pop(DENSE)
        rate = max(counts) / statistics.median(dense) if quartiles(dense) else None
        found = {DENSE: Speed(rate)}
        for name, own in times.items():
            ratio, spread = speed_up(dense, own)
            found[name] = Speed(rate * ratio if rate and ratio else None, ratio, spread)
        return found

    def run(self, name: str, call: Callable[[str], T], times: list[float] | None = None) -> T:
        """What ``call(name)`` returns in one arm; with ``times``, how long it took is added there."""
        device = self.accelerator.device
        with self.arms[name](), eval_mode(self.model), torch.inference_mode(), self.accelerator.autocast():
            synchronize(device)
            start = time.perf_counter()
            value = call(name)
            synchronize(device)
            if times is not None:
                times.append(time.perf_counter() - start)
            return value


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own flag back: ``model.train()`` would also wake those that were frozen in eval."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def synchronize(device: torch.device) -> None:
    """Wait for a device, so that a clock sees what it did."""
    if device.type != "cpu":  # kernels run behind the clock's back
        torch.accelerator.synchronize(device)
