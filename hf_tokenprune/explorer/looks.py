"""What the page shows of one image: who stays, what the model says, what it costs. Nothing of the page itself."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..benchmark.timing import seconds
from ..config import PruneConfig
from ..engine import pruned
from ..evaluation.images import to_rgb
from ..evaluation.turns import DENSE
from ..pictures import Trace
from ..pictures.tracing import saying, trace_inputs
from .fields import controls, value_of
from .models import Loaded

TIMED = 0.2
"""Seconds that timing a look may take, after one round."""
ROUNDS = 9


@dataclass(frozen=True)
class Choice:
    """A method as it was chosen on the page.

    Attributes:
        fields: what was given for those that are not as at the start (``Loaded.start``).
        budget: share of the dense multiply-adds, at most; 1: the fields say how much.
    """

    method: str
    fields: Mapping[str, Any]
    budget: float

    def config_for(self, loaded: Loaded) -> PruneConfig:
        """The config.

        Raises:
            ConfigError: a field is none that there may be, or the budget is out of reach.
        """
        start = loaded.start(self.method)
        given = {c.name: value_of(c, self.fields[c.name]) for c in controls(start) if c.name in self.fields}
        config = PruneConfig.from_dict({**start.to_dict(), **given})
        return config if self.budget >= 1 else config.for_budget(loaded.model, speedup=1 / self.budget)


@dataclass(frozen=True)
class Look:
    """A trace and how long each of its runs takes.

    Attributes:
        milliseconds: of a forward (of a vision-language model, the prefill) of this image, by run: medians over
            rounds in which the runs take turns.
    """

    trace: Trace
    milliseconds: dict[str, float]


def look(
    loaded: Loaded, image: Image.Image, choices: list[Choice], question: str | None, class_names: list[str]
) -> Look:
    """Run the model on ``image``, dense and by each choice.

    Raises:
        TokenPruneError: a choice does not fit the model, or there is no question for one that has to be asked.
    """
    with loaded.lock:
        model, processor = loaded.model, loaded.processor
        configs = {name: c.config_for(loaded) for name, c in zip(labels(choices), choices, strict=True)}
        texts: dict[str, Any] = {"question": question if loaded.kind == "decoder" else None}
        if loaded.reads_names and class_names:
            texts |= {"class_names": class_names, "templates": ("{}",)}
        image = to_rgb(image)
        said = saying(model, image, processor, **texts)
        found = trace_inputs(model, image, configs, said, processor)
        found = dataclasses.replace(found, question=texts["question"])
        return Look(found, milliseconds(model, said.forward, configs))


def labels(choices: list[Choice]) -> list[str]:
    """A name for each choice: the method, and where both are of one, which of them."""
    names = [choice.method for choice in choices]
    return [name if names.count(name) == 1 else f"{name} {'AB'[i]}" for i, name in enumerate(names)]


def milliseconds(model: nn.Module, forward: Callable[[], None], configs: Mapping[str, PruneConfig]) -> dict[str, float]:
    """Medians of rounds in which the dense model and each config take turns."""
    arms: dict[str, PruneConfig | None] = {DENSE: None, **configs}
    times: dict[str, list[float]] = {name: [] for name in arms}
    end = time.perf_counter() + TIMED
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for name, config in arms.items():
                with nullcontext() if config is None else pruned(model, config):
                    times[name].append(1000 * seconds(forward))
            if time.perf_counter() > end:
                break
    return {name: statistics.median(values) for name, values in times.items()}


def call_of(model: Any, path: str, config: PruneConfig) -> str:
    """A config as Python, with the fields that are not as by default."""
    fields = ", ".join(f"{name}={value!r}" for name, value in changed(config).items())
    name, kind = type(config).__name__, type(model).__name__
    return (
        f"from transformers import {kind}\n\nfrom hf_tokenprune import {name}, prune\n\n"
        f"model = {kind}.from_pretrained({path!r})\nprune(model, {name}({fields}))"
    )


def command_for(model: str, config: PruneConfig, question: str | None, class_names: list[str]) -> str:
    """The command that draws what the page shows; in it, names of classes are lines of a file that bash makes."""
    own = {name: config.to_dict()[name] for name in changed(config)}
    words = ["hf-tokenprune", "viz", model, "IMAGE", "-m", config.method]
    for name, value in own.items():
        words += ["-s", f"{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"]
    words += [] if question is None else ["--question", question]
    command = shlex.join([*words, "--out", "picture.png"])
    if class_names:
        lines = shlex.join(["printf", r"%s\n", *class_names])
        command += f" --template {{}} --class-names <({lines})"
    return command


def changed(config: PruneConfig) -> dict[str, Any]:
    """Fields that are not as by default."""
    defaults = type(config)()
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != getattr(defaults, name)}
