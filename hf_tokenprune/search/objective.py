"""How far a pruned model is from the dense one on some inputs, without running what pruning cannot have changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..config import PruneConfig
from ..engine import find_adapter, plan, pruned
from ..errors import ConfigError
from ..evaluation.scores import agreement, kl_divergence, topk_correct

Goal = Literal["geometric_kl", "kl", "agreement", "accuracy"]
FLOOR = 1e-6
"""Added to each KL before its logarithm is taken: an input that pruning does not touch has none."""


def check_goal(goal: str) -> None:
    """Raise ConfigError unless there is this goal."""
    if goal not in get_args(Goal):
        raise ConfigError(f"goal={goal!r}: expected one of {', '.join(get_args(Goal))}")


def mean(goal: Goal, values: Sequence[float]) -> float:
    """Of the distortions of inputs, as the goal takes it.

    The plain mean of KL hangs on the few inputs whose class is in doubt. In the geometric mean every input weighs the
    same, so what is least on a few hundred inputs is more often least on others, in plain mean too: see
    docs/measurements_search.md.
    """
    if goal != "geometric_kl":
        return sum(values) / len(values)
    return math.exp(sum(math.log(value + FLOOR) for value in values) / len(values)) - FLOOR


class Objective:
    """Mean distortion over inputs, 0 for the dense model.

    Args:
        model: dense, in eval mode; its blocks are run by themselves from where a candidate changes something.
        batches: inputs of ``run``.
        goal: "geometric_kl" or "kl", geometric or plain mean of KL(dense || pruned) in nats; "agreement", the fraction
            of inputs given another class; or "accuracy", the fraction of labelled inputs given a wrong one, which is
            not 0 for the dense model.
        labels: (n,) int64, for "accuracy".
        run: what maps a batch to (B, C) logits; None: the model's ``logits``.
        cache_bytes: of the dense states in front of blocks that are kept; where all do not fit, only every second,
            third, ... block has them.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Mapping[str, Tensor]],
        goal: Goal = "geometric_kl",
        labels: Tensor | None = None,
        run: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
        cache_bytes: int = 4 * 10**9,
    ) -> None:
        if goal == "accuracy" and labels is None:
            raise ConfigError("goal='accuracy' needs labels; without them use 'geometric_kl', 'kl' or 'agreement'")
        self.model, self.batches, self.goal, self.labels = model, batches, goal, labels
        self.adapter = find_adapter(model)
        self.run = run or (lambda batch: model(**batch).logits)
        self.sizes = [len(next(iter(batch.values()))) for batch in batches]
        shape = self.adapter.shape(model)
        tokens = sum(self.sizes) * (shape.num_patches + shape.num_protected)
        all_bytes = shape.depth * tokens * shape.width * next(model.parameters()).element_size()
        self.stride = max(1, -(-all_bytes // cache_bytes))
        start = time.perf_counter()
        self.states: list[dict[int, Tensor]] = []  # of each batch, what enters every stride-th block
        dense = []
        with torch.inference_mode():
            for batch in batches:
                with self._keeping() as kept:
                    dense.append(self.run(batch).float().cpu())
                self.states.append(kept)
        self.dense = torch.cat(dense)
        self.seconds = time.perf_counter() - start
        """Time of the dense model on all inputs."""

    @property
    def n(self) -> int:
        """Number of inputs."""
        return sum(self.sizes)

    def part_run(self, layer: int) -> float:
        """The part of a forward that is run for a candidate whose first stage is in this layer."""
        return 1 - layer / len(self.adapter.blocks(self.model))

    def values(self, config: PruneConfig) -> Iterator[Tensor]:
        """Batch by batch, the distortion of each input. The model is dense again when the iterator is closed."""
        first = plan(config, self.adapter.shape(self.model))[0].layer
        start = 0
        with pruned(self.model, config):
            for batch, states, size in zip(self.batches, self.states, self.sizes, strict=True):
                with torch.inference_mode(), self._from(first, states):
                    logits = self.run(batch).float().cpu()
                yield self._distortion(logits, slice(start, start + size))
                start += size

    def _distortion(self, logits: Tensor, rows: slice) -> Tensor:
        if self.goal in ("geometric_kl", "kl"):
            return kl_divergence(self.dense[rows], logits)
        if self.goal == "agreement":
            return 1.0 - agreement(self.dense[rows], logits).double()
        assert self.labels is not None
        return 1.0 - topk_correct(logits, self.labels[rows]).double()

    @contextmanager
    def _keeping(self) -> Iterator[dict[int, Tensor]]:
        """Keep what enters the blocks in the forwards inside."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            return lambda module, args: kept.update({layer: args[0]})

        with ExitStack() as undo:
            for layer, block in enumerate(self.adapter.blocks(self.model)):
                if layer % self.stride == 0:
                    undo.callback(block.register_forward_pre_hook(keep(layer)).remove)
            yield kept

    @contextmanager
    def _from(self, layer: int, states: dict[int, Tensor]) -> Iterator[None]:
        """Inside, a forward starts at the last block up to ``layer`` whose dense input was kept."""
        first = layer - layer % self.stride
        with skipped(list(self.adapter.blocks(self.model))[:first], lambda entering: states[first]):
            yield


@contextmanager
def skipped(blocks: Sequence[nn.Module], leave: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, these blocks do nothing but say what leaves them, given what enters."""
    own = [block.__dict__.get("forward") for block in blocks]  # what accelerate puts there
    for block in blocks:  # an attribute of the instance goes before the forward of its class
        block.__dict__["forward"] = lambda hidden_states, *args, **kwargs: leave(hidden_states)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward
