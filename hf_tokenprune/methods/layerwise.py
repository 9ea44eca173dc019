"""What configs share that keep a ratio of the tokens at each of several layers."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

from ..config import Where
from ..signals import ENTRANCE, DecoderShape, Shape
from .decoderwise import Positions, positions_on, scaled_ratio
from .visionwise import VisionConfig

B = TypeVar("B", bound="BaselineConfig")
C = TypeVar("C", bound="LayerwiseConfig")


def at_depth(blocks_of_12: tuple[int, ...], depth: int) -> list[int]:
    """0-based layers of a model of ``depth`` blocks that lie where ``blocks_of_12`` (1-based) lie among 12."""
    rounded = [int(depth * block / 12 + 0.5) for block in blocks_of_12]
    return [min(max(block, 1), max(depth - 1, 1)) - 1 for block in rounded]


@dataclass(frozen=True)
class LayerwiseConfig(VisionConfig):
    """Fields of every config that prunes at several layers.

    Args:
        layers: 0-based blocks, ascending. None: the default for the model's depth.
        keep_ratios: fraction of the prunable tokens kept at each layer, in (0, 1]; a number holds for all layers.
            None: the method's default (only where ``layers`` is None too).
        where: "after_block"; "mid_block": between attention and MLP, whose work then shrinks too; or "queries": the
            block still reads keys and values of all tokens, but computes queries, output projection and MLP only for
            those that stay. For tokens that are dropped this gives what "mid_block" gives, for less work.
    """

    layers: tuple[int, ...] | None = None
    keep_ratios: float | tuple[float, ...] | None = None
    where: Where = "after_block"

    search_fields: ClassVar[tuple[str, ...]] = ("exact_last_block", "where")
    default_blocks: ClassVar[tuple[int, ...]] = ()
    """1-based blocks of 12 after which the method prunes by default."""
    default_keep_ratios: ClassVar[float | tuple[float, ...]] = ()

    def validate(self) -> None:
        super().validate()
        if self.layers is not None:
            ascending = all(a < b for a, b in pairwise(self.layers))
            self.check(
                bool(self.layers) and self.layers[0] >= 0 and ascending, "layers", "ascending block numbers >= 0"
            )
            self.check(self.keep_ratios is not None, "keep_ratios", "one ratio a layer where layers is given")
            if isinstance(self.keep_ratios, tuple):
                allowed = f"{len(self.layers)} values, one for each of layers={self.layers}"
                self.check(len(self.keep_ratios) == len(self.layers), "keep_ratios", allowed)
        ratios = self.keep_ratios if isinstance(self.keep_ratios, tuple) else (self.keep_ratios,)
        self.check(all(r is None or 0 < r <= 1 for r in ratios), "keep_ratios", "0 < ratio <= 1, the fraction kept")

    def default_layers(self, depth: int) -> list[int]:
        """Where the method prunes in a model of ``depth`` blocks."""
        return at_depth(self.default_blocks, depth)

    def plan(self, shape: Shape) -> list[tuple[int, float]]:
        """The (layer, keep ratio) pairs for a model of this shape; fields that do not fit it raise ConfigError."""
        if self.layers is None:
            layers = self.default_layers(shape.depth)
            ratios = self._ratios(len(layers), self.default_keep_ratios)
            merged: dict[int, float] = {}
            for layer, ratio in zip(layers, ratios, strict=True):  # in a shallow model several may meet in one block
                merged[layer] = merged.get(layer, 1.0) * ratio
            return list(merged.items())
        beyond = [layer for layer in self.layers if layer >= shape.depth]
        self.check(
            not beyond,
            "layers",
            f"blocks 0..{shape.depth - 1}: block {', '.join(map(str, beyond))} does not exist, "
            f"this model has {shape.depth} blocks",
        )
        return list(zip(self.layers, self._ratios(len(self.layers), ()), strict=True))

    def _ratios(self, count: int, default: float | tuple[float, ...]) -> tuple[float, ...]:
        ratios = default if self.keep_ratios is None else self.keep_ratios
        if isinstance(ratios, float):
            return (ratios,) * count
        allowed = f"{count} values, one for each default layer (or give layers too)"
        self.check(len(ratios) == count, "keep_ratios", allowed)
        return ratios

    def scaled(self: C, strength: float) -> C:
        """Every removed fraction multiplied by ``strength``, which may exceed 1; at least 1 % stays at each layer."""
        ratios = self.default_keep_ratios if self.keep_ratios is None else self.keep_ratios
        if isinstance(ratios, float):
            return dataclasses.replace(self, keep_ratios=scaled_ratio(ratios, strength))
        return dataclasses.replace(self, keep_ratios=tuple(scaled_ratio(ratio, strength) for ratio in ratios))

    def with_counts(self: C, shape: Any, counts: Mapping[int, int]) -> C:
        ratios, entering = [], shape.num_prunable
        for n_keep in counts.values():
            ratios.append(self.ratio_for(entering, n_keep))
            entering = n_keep
        return dataclasses.replace(self, layers=tuple(counts), keep_ratios=tuple(ratios))

    def ratio_for(self, entering: int, n_keep: int) -> float:
        """The ratio at which a stage leaves ``n_keep`` of ``entering`` tokens."""
        return n_keep / entering


@dataclass(frozen=True)
class BaselineConfig(LayerwiseConfig):
    """A layerwise config that prunes decoders too: once at the entrance, or after the layers that ``layers`` names.

    At the entrance ``keep_ratios`` is of every image, 0.098 by default; several ratios, which meet there, are
    multiplied. ``where`` has no other place than "after_block".

    Args:
        positions: decoders: of the tokens behind a pruning point, "contiguous" (renumbered) or "original" (each keeps
            its own), to compare with methods that do the same. None: renumbered, where a family can.
    """

    positions: Positions | None = field(default=None, kw_only=True)

    usual_positions: ClassVar[Positions] = "contiguous"
    prunes: ClassVar[frozenset[str]] = frozenset({"vision", "decoder"})
    default_entrance_ratio: ClassVar[float] = 0.098

    def places(self, shape: Shape) -> list[tuple[int, str, float, dict[str, str]]]:
        """(layer, where, keep ratio, other fields) of each stage; raises where a field does not fit the shape."""
        if not isinstance(shape, DecoderShape):
            allowed = "None: it is about decoders, and this is a vision encoder"
            self.check(self.positions != "original", "positions", allowed)
            return [(layer, self.where, ratio, {}) for layer, ratio in self.plan(shape)]
        self.check(self.where == "after_block", "where", "'after_block': in a decoder tokens leave behind a layer")
        for name in ("exact_last_block", "restore"):
            self.check(not getattr(self, name), name, "False: it is about vision encoders, and this is a decoder")
        shared: dict[str, str] = {"positions": positions_on(self, shape)}
        if self.layers is not None:
            return [(layer, "after_block", ratio, shared) for layer, ratio in self.plan(shape)]
        ratios = self.default_entrance_ratio if self.keep_ratios is None else self.keep_ratios
        ratio = math.prod(ratios) if isinstance(ratios, tuple) else ratios
        return [(-1, "entrance", ratio, {**shared, "budget": "image"})]

    def search_places(self, shape: Shape) -> tuple[int, ...]:
        at_entrance = isinstance(shape, DecoderShape) and self.layers is None
        return (ENTRANCE,) if at_entrance else super().search_places(shape)

    def with_counts(self: B, shape: Any, counts: Mapping[int, int]) -> B:
        if ENTRANCE in counts:
            return dataclasses.replace(self, keep_ratios=self.ratio_for(shape.num_prunable, counts[ENTRANCE]))
        return super().with_counts(shape, counts)
