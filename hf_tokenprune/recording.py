"""``record``: which tokens stayed where, while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .engine import find_adapter, unwrapped
from .errors import PruneStateError

NOTHING = (
    "nothing recorded yet: call the model inside the with block, in the same thread; or start the other thread in the "
    "context of this one, Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)"
)
_RECORDING: ContextVar[frozenset[object]] = ContextVar("hf_tokenprune_recording", default=frozenset())
"""Keys of the records whose ``with`` blocks this thread, or asyncio task, is in."""


class LayerDict(Mapping[str, Any]):
    """Values by stage, in the order tokens pass them. Keys are strings: "vision_tower", "entrance", "3"; looking up an
    int works too."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: values[name] for name in sorted(values, key=_order)}

    def __getitem__(self, name: str | int) -> Any:
        if str(name) in self._values:
            return self._values[str(name)]
        raise KeyError(f"{name!r}: expected one of {', '.join(self)}" if self else NOTHING)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"LayerDict({self._values!r})"


def _order(name: str) -> int:
    return int(name) if name.isdigit() else {"vision_tower": -2, "entrance": -1}[name]


class Record:
    """What happened in the last forward inside ``record`` (of a decoder: the last one with an image in it).

    Attributes:
        depth: number of blocks, or of decoder layers.
        tower: of a vision-language model whose tower is pruned too, the same of the blocks there: a sample is what the
            tower encodes as one image.
    """

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.tower: Record | None = None
        self._key = object()
        self._local: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._original: dict[str, Tensor] = {}
        self._importance: dict[str, Tensor] = {}
        self._averaging: set[str] = set()
        self._lengths: dict[str, int] = {}

    def of_tower(self, depth: int) -> Record:
        """A new record for a vision tower of so many blocks."""
        self.tower = Record(depth)
        self.tower._key = self._key
        return self.tower

    def _hears(self) -> bool:
        """Whether what runs now is called from inside the ``with`` block."""
        # A compiler cannot read the variable: a compiled model tells every thread's forwards.
        return torch.compiler.is_compiling() or self._key in _RECORDING.get()

    def on_start(self) -> None:
        if self._hears():
            self._local.clear()
            self._original.clear()
            self._lengths.clear()
            # What the vision tower says, it says before the decoder starts.
            self._importance = {name: told for name, told in self._importance.items() if name == "vision_tower"}
            self._averaging &= {"vision_tower"}

    def on_reduction(self, name: str, keep: Tensor, owner: Tensor, importance: Tensor | None) -> None:
        """What a stage did to the N prunable tokens that entered it: ``keep`` (B, n) positions among them, ``owner``
        (B, N) of each the place in ``keep`` of the one that stands for it, -1: none; ``importance`` (B, N)."""
        if self._hears():
            self._local[name] = keep, owner, importance

    def on_kept(self, name: str, kept: Tensor) -> None:
        """``kept``: (B, n) positions among the original prunable tokens, -1 behind the last one of a sample."""
        if self._hears():
            self._original[name] = kept

    def on_importance(self, name: str, importance: Tensor) -> None:
        """``importance``: (B, M) of the original prunable tokens, NaN for those that did not enter the stage."""
        if self._hears():
            self._importance[name] = importance

    def on_average(self, name: str) -> None:
        if self._hears():
            self._averaging.add(name)

    def on_block(self, layer: int, num_tokens: int) -> None:
        if self._hears():
            self._lengths[str(layer)] = num_tokens

    @property
    def kept(self) -> LayerDict:
        """By stage: (B, n) int64, ascending positions among the ORIGINAL prunable tokens of each sample.

        Where samples keep different numbers (decoders with ragged batches), shorter rows end in -1.
        """
        kept = {name: after.sort(dim=1).values for name, _, after, _ in self._followed()}
        return LayerDict({**self._original, **kept})

    @property
    def owners(self) -> LayerDict:
        """By stage of a vision encoder: (B, M) int64, of each original prunable token the position of the one that
        stands for it behind the stage: its own, or that of the one it was merged into; -1: it has left."""
        return LayerDict({name: owner for name, _, _, owner in self._followed()})

    @property
    def importance(self) -> LayerDict:
        """By stage, where its method ranks tokens: (B, M) float32 of each original prunable token, higher = keep; NaN
        for those that did not enter. Of a stage in a vision tower a row is an image, crop or frame."""
        found = dict(self._importance)
        for name, before, _, owner in self._followed():
            if (importance := self._local[name][2]) is not None:
                nothing = torch.full(owner.shape, torch.nan, device=before.device)
                found[name] = nothing.scatter(1, before, importance.float().to(before.device))
        return LayerDict(found)

    @property
    def averaging(self) -> frozenset[str]:
        """Stages in a decoder or at its vision tower that average tokens which leave into some that stay; which ones
        into which is not recorded."""
        return frozenset(self._averaging)

    def _followed(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """(stage, original positions (B, N) of what enters it, (B, n) of what leaves it, owners (B, M)), in order."""
        before: Tensor | None = None
        # Not when they come in: gradient checkpointing runs the blocks once more, last one first.
        for name in sorted(self._local, key=_order):
            keep, owner, _ = self._local[name]
            if before is None:
                before = torch.arange(owner.shape[1], device=keep.device).expand(len(keep), -1)
                stands = before  # place of each original token among those that enter
            keep, owner = keep.to(before.device), owner.to(before.device)
            stands = torch.where(stands >= 0, owner.gather(1, stands.clamp(min=0)), -1)
            after = before.gather(1, keep)
            yield name, before, after, torch.where(stands >= 0, after.gather(1, stands.clamp(min=0)), -1)
            before = after

    @property
    def tokens(self) -> LayerDict:
        """By block: number of tokens that entered it, protected ones (and padding) included."""
        return LayerDict(self._lengths)

    def summary(self) -> str:
        """A table with a row a block: tokens that entered, and prunable tokens that its pruning layer kept."""
        if not self._lengths:
            return NOTHING
        kept = self.kept
        before = [name for name in kept if not name.isdigit()]
        width = max(5, *(len(name) for name in before)) if before else 5
        rows = [f"{'block':>{width}}  {'tokens in':>9}  {'kept':>5}"]
        for name in [*before, *map(str, range(self.depth))]:
            rows.append(f"{name:>{width}}  {self._lengths.get(name, '-'):>9}  {_count(kept.get(name)):>5}")
        table = "\n".join(rows)
        return table if self.tower is None else f"vision tower\n{self.tower.summary()}\ndecoder\n{table}"


def _count(kept: Tensor | None) -> str:
    """Tokens a sample: one number, or the range of a ragged batch."""
    if kept is None:
        return ""
    numbers = (kept >= 0).sum(1)
    lowest, highest = int(numbers.min()), int(numbers.max())
    return str(lowest) if lowest == highest else f"{lowest}-{highest}"


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Record which tokens stay at every pruned layer, for the forwards inside a ``with`` block (the last one counts).

    Forwards of the thread, or asyncio task, that the block is in, and of threads that are started in its context
    (``contextvars.copy_context().run``); others may have blocks of their own. Of a compiled model those of all threads.

    Raises:
        PruneStateError: the model is not pruned.
    """
    model = unwrapped(model)
    adapter = find_adapter(model)
    if not adapter.states(model):
        raise PruneStateError(
            "this model is not pruned, so there is nothing to record; call prune(model, config) first"
        )
    rec = Record(len(adapter.blocks(model)))
    token = _RECORDING.set(_RECORDING.get() | {rec._key})
    try:
        with adapter.recording(model, rec):
            yield rec
    finally:
        _RECORDING.reset(token)
