"""The loop of a recovery: what the dense model says, then passes over the images, each judged on those held out."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..config import PruneConfig
from ..engine import current_config, find_adapter, prune, unprune, unwrapped
from ..errors import ConfigError, DataError, PruneStateError, UnsupportedModelError, shown
from ..evaluation.loop import batches, place
from ..evaluation.optional import require
from ..evaluation.turns import eval_mode
from ..weights import Recovery, values_in
from .report import RecoveryReport
from .targets import Target, target_of
from .trained import Trained, Values, alone

TEMPERATURE = 3.0
"""Of the softmax that is learned (Hinton et al., arXiv 1503.02531): at 1 a few images whose class is in doubt make
nearly all of the gradients, and of each a few classes."""
PATIENCE = 3
"""Passes without a better one on the images held out, behind which it ends."""
WARM_UP = 0.1
"""Part of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Settings:
    """The numbers of ``recover``.

    Raises:
        ConfigError: one is out of range.
    """

    passes: int
    learning_rate: float
    batch_size: int
    held_out: float
    seed: int

    def __post_init__(self) -> None:
        for name, right, words in (
            ("passes", self.passes >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a number above 0"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("held_out", 0 < self.held_out < 1, "a part of the images, above 0 and below 1"),
            ("seed", 0 <= self.seed < 2**32, "0 or more, below 2**32"),
        ):
            if not right:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: expected {words}")


def train(
    model: nn.Module,
    images: Any,
    processor: Any,
    settings: Settings,
    texts: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None,
    accelerator: Any,
    progress: bool,
) -> RecoveryReport:
    """See ``recover``; ``texts`` are the arguments of ``target_of``."""
    config, stock = current_config(model), unwrapped(model)
    if config is None:
        raise PruneStateError("this model is not pruned; call prune(model, config) first, then recover it")
    if any(getattr(state, "short", False) for state in find_adapter(stock).states(stock)):
        raise UnsupportedModelError("this model takes short prompts, which it has none of when dense: prune it anew")
    accelerator = accelerator or require("accelerate").Accelerator()
    if accelerator.mixed_precision == "fp16":
        raise ConfigError("float16 has no room for small gradients; use bf16 or no mixed precision")
    place(model, accelerator)
    of_peft = stock is not model
    now = {} if of_peft else {name: value.clone() for name, value in values_in(stock).items()}
    found: Values = {}
    unprune(model)
    try:
        with eval_mode(model):
            target = target_of(model, images, processor, **texts)
            trained = Trained(model, now, settings.learning_rate)
            # The values of a PeftModel's adapters are its own; others are put in and taken out here.
            plain = config if of_peft else config.with_recovery(None)
            about = {**asdict(settings), **texts, "config": plain.to_dict()}
            run = _Run(model, plain, target, trained, settings, about, accelerator, progress)
            report, found = run.passes(None if checkpoint is None else Path(checkpoint))
    finally:
        if current_config(model) is not None:
            unprune(model)
        kept = config
        if found and not of_peft and report.best:
            kept = config.with_recovery(Recovery.of(found))
        prune(model, kept)
    if of_peft:
        trained.show(found)
    return report


class _Run:
    """One recovery of a model that is dense; ``about`` has the arguments that a state has to be of."""

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig,
        target: Target,
        trained: Trained,
        settings: Settings,
        about: Mapping[str, Any],
        accelerator: Any,
        progress: bool,
    ) -> None:
        self.about = about
        self.model, self.config, self.target, self.trained = model, config, target, trained
        self.settings, self.accelerator = settings, accelerator
        self.progress = progress and accelerator.is_main_process
        self.learn, self.judge = split(target.names, settings.held_out)
        per_step = settings.batch_size * accelerator.num_processes
        self.steps_a_pass = math.ceil(len(self.learn) / per_step)
        self.said: dict[int, Tensor] = {}

    def passes(self, checkpoint: Path | None) -> tuple[RecoveryReport, Values]:
        """All of them; the report, and the values that were best."""
        start = time.perf_counter()
        self.ask_dense()
        self.model = prune(self.model, self.config)
        trained, settings = self.trained, self.settings
        try:
            with alone(self.model, trained.parameters):
                about = {**self.about, "steps_a_pass": self.steps_a_pass}
                if checkpoint is not None and checkpoint.exists():
                    best, done = trained.load(checkpoint)
                    check_same(done["of"], about, checkpoint)
                    held_out = done["held_out"]
                else:
                    best, held_out = _copied(trained.average), [self.judged()]
                while len(held_out) <= settings.passes and len(held_out) - 1 - best_of(held_out) < PATIENCE:
                    self.one_pass(len(held_out) - 1, held_out[-1])
                    held_out.append(self.judged())
                    if best_of(held_out) == len(held_out) - 1:
                        best = _copied(trained.average)
                    if checkpoint is not None and self.accelerator.is_main_process:
                        trained.save(checkpoint, best, {"of": about, "held_out": held_out})
        finally:
            trained.show(trained.dense)
            unprune(self.model)
        report = RecoveryReport(
            measure=self.target.measure,
            held_out=tuple(held_out),
            best=best_of(held_out),
            images=len(self.learn),
            images_held_out=len(self.judge),
            parameters=sum(parameter.numel() for parameter in trained.parameters.values()),
            seconds=time.perf_counter() - start,
        )
        return report, {name: best[name] for name in trained.parameters}

    def ask_dense(self) -> None:
        """What the dense model says of every image, on every process."""
        with torch.no_grad():
            for indices, batch in self.loader([*self.learn, *self.judge], "ask the dense model"):
                self.said.update(self.gathered(list(zip(indices, self.target.dense(batch), strict=True))))

    def one_pass(self, number: int, last: float) -> None:
        """All images once, in an order of this pass; ``last``: the distance on those held out."""
        generator = torch.Generator().manual_seed(self.settings.seed + number * 2**32)
        order = [self.learn[i] for i in torch.randperm(len(self.learn), generator=generator).tolist()]
        self.trained.show(self.trained.values)
        for step, (indices, batch) in enumerate(
            self.loader(order, f"pass {number + 1}, held out {last:.4g}"), number * self.steps_a_pass
        ):
            with self.accelerator.autocast():  # here alone: what the dense model says, and what is kept, is not rounded
                distances = self.distance(indices, batch, TEMPERATURE)
            distances.mean().backward()
            self.trained.step(self.rate(step), self.accelerator)

    def judged(self) -> float:
        """The mean distance on the images held out, of the moving average."""
        found: dict[int, float] = {}
        self.trained.show(self.trained.average)
        with torch.no_grad():
            for indices, batch in self.loader(self.judge, "held out"):
                pairs = zip(indices, self.distance(indices, batch).tolist(), strict=True)
                found.update(self.gathered(list(pairs)))
        return sum(found[i] for i in self.judge) / len(self.judge)

    def distance(self, indices: Sequence[int], batch: Any, temperature: float = 1.0) -> Tensor:
        """(B,) of a batch."""
        return self.target.distance(batch, [self.said[i] for i in indices], self.as_dense, temperature)

    def rate(self, step: int) -> float:
        """The learning rate of a step: it rises, then falls as a cosine to nothing."""
        steps = self.steps_a_pass * self.settings.passes
        rising = max(1, round(WARM_UP * steps))
        if step < rising:
            return self.settings.learning_rate * (step + 1) / rising
        return self.settings.learning_rate * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2

    def loader(self, indices: Sequence[int], desc: str) -> Iterator[tuple[list[int], Any]]:
        """Batches of this process, with the places of their samples in the data."""
        data = _Numbered(self.target.data, indices)
        size = min(self.settings.batch_size, math.ceil(len(indices) / self.accelerator.num_processes))
        found = batches(data, size, lambda items: _with_places(items, self.target.collate), self.accelerator)
        for batch in tqdm(found, desc=desc, disable=not self.progress, leave=False):
            yield batch["places"].tolist(), batch["inputs"]

    def gathered(self, pairs: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
        """Those of all processes; what is there twice is the same."""
        if self.accelerator.num_processes == 1:
            return pairs
        every: list[tuple[int, Any]] = require("accelerate").utils.gather_object(pairs)
        return every

    @contextmanager
    def as_dense(self) -> Iterator[None]:
        """Inside, the model is the dense one."""
        shown = self.trained.shown
        unprune(self.model)
        self.trained.show(self.trained.dense)
        try:
            yield
        finally:
            self.trained.show(shown)
            prune(self.model, self.config)


class _Numbered(Dataset[tuple[int, Any]]):
    """Some samples of a data set, with their places in it."""

    def __init__(self, data: Any, indices: Sequence[int]) -> None:
        self.data, self.indices = data, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return self.indices[index], self.data[self.indices[index]]


def _with_places(items: Sequence[tuple[int, Any]], collate: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
    places, samples = zip(*items, strict=True)
    return {"places": torch.tensor(places), "inputs": collate(samples)}


def _copied(values: Mapping[str, Tensor]) -> Values:
    return {name: value.clone() for name, value in values.items()}


def split(names: Sequence[str], held_out: float) -> tuple[list[int], list[int]]:
    """Places of the samples to learn from, and of those held out: evenly spread, all of one image on one side.

    Raises:
        DataError: there are fewer than two images.
    """
    images = list(dict.fromkeys(names))
    if len(images) < 2:
        raise DataError(f"{len(images)} image: one to learn from and one to hold out are needed at least")
    count = min(max(1, round(held_out * len(images))), len(images) - 1)
    judges = {images[(2 * i + 1) * len(images) // (2 * count)] for i in range(count)}
    places = range(len(names))
    return [i for i in places if names[i] not in judges], [i for i in places if names[i] in judges]


def best_of(held_out: Sequence[float]) -> int:
    """The first of the least."""
    return min(range(len(held_out)), key=lambda i: held_out[i])


def check_same(then: Any, now: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError where a state is of a run with other arguments."""
    now = json.loads(json.dumps(now))
    if other := [name for name in now if not isinstance(then, dict) or then.get(name) != now[name]]:
        name = other[0]
        was = then.get(name) if isinstance(then, dict) else then
        raise ConfigError(
            f"{path} is of a recovery with {name}={shown(was)}, this one has {shown(now[name])}: delete the file, or "
            "give the same arguments"
        )
