"""What configs share that prune the image tokens of a vision-language model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeVar

from ..config import PruneConfig
from ..signals import ENTRANCE, VISION_TOWER, DecoderShape, Stage

Positions = Literal["contiguous", "original"]
Newlines = Literal["prune", "protect"]
R = TypeVar("R", bound="RatioConfig")


@dataclass(frozen=True)
class DecoderConfig(PruneConfig):
    """Fields of every config for vision-language models, and the checks they share.

    Args:
        positions: of the tokens behind a pruning point. "contiguous": renumbered, so that they move together;
            "original": each keeps its own. None: as the method's official code does, and "original" in families that
            place image tokens in time, rows and columns, where renumbering is refused.
        newlines: newline tokens (LLaVA-NeXT) leave like image tokens ("prune") or always stay ("protect").
    """

    positions: Positions | None = field(default=None, kw_only=True)
    newlines: Newlines = field(default="prune", kw_only=True)

    prunes: ClassVar[frozenset[str]] = frozenset({"decoder"})
    usual_positions: ClassVar[Positions] = "contiguous"

    def shared(self, shape: DecoderShape) -> dict[str, str]:
        """The fields above as every stage takes them; raises where one would have no effect on this shape."""
        allowed = "'prune': this model has no newline tokens to protect"
        self.check(self.newlines == "prune" or shape.newline_tokens > 0, "newlines", allowed)
        return {"positions": positions_on(self, shape), "newlines": self.newlines}

    def prunable(self, shape: DecoderShape) -> int:
        return shape.num_prunable - (shape.newline_tokens if self.newlines == "protect" else 0)

    def ratios_of_original(self, shape: DecoderShape, counts: Mapping[int, int]) -> tuple[float, ...]:
        """The fractions of the original image tokens at which stages leave these counts."""
        return tuple(count / self.prunable(shape) for count in counts.values())

    def check_ratio(self, name: str) -> None:
        """The field holds the fraction of the tokens that stays."""
        self.check(0 < getattr(self, name) <= 1, name, "0 < ratio <= 1, the fraction kept")

    def check_ascending(self, name: str) -> None:
        """The field holds 0-based layers in their order."""
        layers: tuple[int, ...] = getattr(self, name)
        ascending = all(a < b for a, b in pairwise((-1, *layers)))
        self.check(ascending, name, "ascending layer numbers >= 0")

    def check_ratios_of_original(self, name: str) -> None:
        """The field holds one ratio a stage, each of the original tokens; so a later one cannot be larger."""
        ratios: tuple[float, ...] = getattr(self, name)
        falling = all(1 >= a >= b > 0 for a, b in pairwise((1.0, *ratios)))
        allowed = "0 < ratio <= 1, at least one, never increasing: fractions kept of the original image tokens"
        self.check(bool(ratios) and falling, name, allowed)

    def check_followed(self, name: str, layers: tuple[int, ...], shape: DecoderShape) -> None:
        """All ``layers``, which come from the field, exist and have a layer behind them."""
        self.check(
            max(layers) <= shape.depth - 2,
            name,
            f"layers of 0..{shape.depth - 2}, each with a layer behind it: this model has {shape.depth} layers. "
            f"Set {name} for it; on the command line with -s '{name}=...'",
        )


@dataclass(frozen=True)
class RatioConfig(DecoderConfig):
    """A config by which a fraction of the image tokens stays, chosen once in front of the decoder.

    Args:
        keep_ratio: fraction of the tokens kept, in (0, 1]; ``max(1, round(keep_ratio · N))`` stay. The default keeps 64
            of 576.
    """

    keep_ratio: float = 1 / 9

    one_stage: ClassVar[bool] = True

    @property
    def place(self) -> int:
        """Where tokens leave: ``ENTRANCE`` or ``VISION_TOWER``."""
        return ENTRANCE

    def validate(self) -> None:
        self.check_ratio("keep_ratio")

    def scaled(self: R, strength: float) -> R:
        return dataclasses.replace(self, keep_ratio=scaled_ratio(self.keep_ratio, strength))

    def search_places(self, shape: DecoderShape) -> tuple[int, ...]:
        return (self.place,)

    def with_counts(self: R, shape: DecoderShape, counts: Mapping[int, int]) -> R:
        kept, tokens = counts[self.place], self.prunable(shape)
        if self.place == VISION_TOWER:  # of every encoded image
            tokens = shape.tower_tokens
            kept = min(kept // shape.tower_images, tokens)
        return dataclasses.replace(self, keep_ratio=kept / tokens)


@dataclass(frozen=True)
class RatioStage(Stage):
    """One stage of a ``RatioConfig``."""

    keep_ratio: float

    def num_kept(self, num_prunable: int) -> int:
        return num_rounded(num_prunable, self.keep_ratio)


def positions_on(config: Any, shape: DecoderShape) -> Positions:
    """What ``config.positions`` means on a model of this shape; raises where it has no such positions."""
    several = shape.position_axes > 1
    allowed = f"'original' or None: positions have {shape.position_axes} axes here (time, row, column)"
    config.check(not several or config.positions != "contiguous", "positions", allowed)
    positions: Positions | None = "original" if several else config.positions
    usual: Positions = config.usual_positions
    return usual if positions is None else positions


def num_rounded(num_tokens: int, keep_ratio: float) -> int:
    """``max(1, round(num_tokens · keep_ratio))``, halves to the even number, and 0 of 0."""
    return max(1, round(num_tokens * keep_ratio)) if num_tokens else 0


def scaled_ratio(keep_ratio: float, strength: float) -> float:
    """The ratio with what it removes multiplied by ``strength``; at least 1 % stays."""
    return max(0.01, 1 - (1 - keep_ratio) * strength)
