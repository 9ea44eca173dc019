"""Several methods on one model: in the vision tower or at its output, at the entrance of the decoder, inside it."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import PruneConfig
from ..errors import ConfigError
from ..registry import register_method
from ..signals import DecoderShape, Stage

PLACES = {
    "vision_tower": "in or at the vision tower",
    "entrance": "at the decoder's entrance",
    "after_block": "inside it",
}
MAX_STAGES = len(PLACES)


def visionzip_then_transprune() -> tuple[PruneConfig, ...]:
    """A combination of TransPrune's Table 4: 192 tokens from VisionZip, of which 24 stay in the end."""
    return (
        PruneConfig.for_method("visionzip", dominant=162, contextual=30),
        PruneConfig.for_method("transprune"),
    )


@register_method("stack")
@dataclass(frozen=True)
class StackConfig(PruneConfig):
    """Several methods at once, each in a place of its own. The default is VisionZip, then TransPrune.

    Args:
        stages: two or three configs, in any order: at most one method that prunes at the vision tower, one at the
            entrance of the decoder and one inside it. Instead of the first, one method for vision encoders alone, which
            prunes the blocks of the tower; its output gets its full length back. In a file: a list of their objects.
    """

    stages: tuple[PruneConfig, ...] = field(default_factory=visionzip_then_transprune)

    prunes: ClassVar[frozenset[str]] = frozenset({"decoder"})

    def __post_init__(self) -> None:
        # Before anything is converted: a file must not nest without end.
        given: Any = self.stages
        for part in given if isinstance(given, (list, tuple)) else ():
            name = part.get("method") if isinstance(part, dict) else getattr(part, "method", None)
            if name == self.method:
                raise ConfigError("stages of StackConfig: no stack inside a stack; list all methods side by side")
        super().__post_init__()

    def validate(self) -> None:
        self.check(2 <= len(self.stages) <= MAX_STAGES, "stages", f"two to {MAX_STAGES} prune configs")
        alone = all(config.recovery is None for config in self.stages)
        self.check(alone, "stages", "none with recovered values, which are trained with all of them")
        count = len(self.stages) - len(self.decoder_parts)
        self.check(count <= 1, "stages", f"at most one method that prunes vision encoders only, not {count}")
        exact = getattr(self.tower_part, "exact_last_block", False)
        self.check(not exact, "stages", "exact_last_block=False in the vision tower: image tokens are made of patches")
        newlines = {getattr(config, "newlines", "prune") for config in self.decoder_parts}
        self.check(len(newlines) == 1, "stages", "the same newlines ('prune' or 'protect') in all of them")

    @property
    def decoder_parts(self) -> tuple[PruneConfig, ...]:
        """All but ``tower_part``."""
        return tuple(config for config in self.stages if "decoder" in config.prunes)

    @property
    def tower_part(self) -> PruneConfig | None:
        return next((config for config in self.stages if "decoder" not in config.prunes), None)

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        parts = [config.stages_for(shape) for config in self.decoder_parts]
        if self.tower_part is not None:
            allowed = "no method for vision encoders: the image tokens of this model are made by no block of its tower"
            self.check(shape.encoder.depth > 0, "stages", allowed)
        count = Counter(where for part in parts for where in {stage.where for stage in part})
        count["vision_tower"] += self.tower_part is not None  # it prunes the blocks whose attention is read there
        for where, place in PLACES.items():
            self.check(count[where] <= 1, "stages", f"at most one method that prunes {place}, not {count[where]}")
        order = list(PLACES)
        return tuple(sorted((s for part in parts for s in part), key=lambda s: (order.index(s.where), s.layer)))

    def scaled(self, strength: float) -> "StackConfig":
        return dataclasses.replace(self, stages=tuple(config.scaled(strength) for config in self.stages))

    def by_rule(self, strength: float, shape: DecoderShape) -> "StackConfig":
        def part(config: PruneConfig) -> PruneConfig:
            return config.by_rule(strength, shape.encoder if config is self.tower_part else shape)

        return dataclasses.replace(self, stages=tuple(map(part, self.stages)))

    def prunable(self, shape: DecoderShape) -> int:
        return min(config.prunable(shape) for config in self.decoder_parts)

    def search_places(self, shape: DecoderShape) -> tuple[int, ...]:
        """Those of all parts; a part with a single stage leaves it where it is.

        Raises:
            ConfigError: a part prunes the blocks of the vision tower.
        """
        allowed = "no method for vision encoders here: a search chooses counts in the decoder. Search the other parts"
        self.check(self.tower_part is None, "stages", allowed)
        return tuple(sorted(place for config in self.stages for place in places(config, shape)))

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "StackConfig":
        protected = shape.num_prunable - self.prunable(shape)

        def part(config: PruneConfig) -> PruneConfig:
            own = places(config, shape)
            entering = [self.prunable(shape), *(left for place, left in counts.items() if place < own[0])][-1]
            left = {place: counts[place] for place in own if place in counts} or {own[0]: entering}
            return config.with_counts(dataclasses.replace(shape, image_tokens=entering + protected), left)

        return dataclasses.replace(self, stages=tuple(map(part, self.stages)))

    def fewest(self, num_tokens: int) -> int:
        return max(config.fewest(num_tokens) for config in self.stages)


def places(config: PruneConfig, shape: DecoderShape) -> tuple[int, ...]:
    """Where a search may let tokens of one part leave.

    Raises:
        ConfigError: nowhere, or its one stage does not fit the model.
    """
    found = config.search_places(shape)
    if config.one_stage and len(found) > 1:
        found = tuple(stage.place for stage in config.stages_for(shape))
    if not found:
        raise ConfigError(f"{config} leaves no layer of 0..{shape.depth - 2} to search on this model")
    return found
