"""What a recovery did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RecoveryReport:
    """How far the pruned model is from the dense one, before and behind each pass over the images.

    Attributes:
        measure: what ``held_out`` and ``trained`` are means of: "kl", in nats, of classes, similarities or the next
            token; "features", the squared distance over the squared length of the dense ones.
        held_out: on images that were not trained on: before the first pass, then behind each.
        best: the pass whose values were kept; 0: none was better than what it started from.
        images: that were trained on.
        images_held_out: that were not.
        parameters: numbers that were trained.
        seconds: that it took, without what an interrupted run did before.
    """

    measure: str
    held_out: tuple[float, ...]
    best: int
    images: int
    images_held_out: int
    parameters: int
    seconds: float

    @property
    def before(self) -> float:
        """On the images held out, as it was."""
        return self.held_out[0]

    @property
    def after(self) -> float:
        """On the images held out, as it is now."""
        return self.held_out[self.best]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {**asdict(self), "before": self.before, "after": self.after}

    def summary(self) -> str:
        """In a few lines."""
        name = {"kl": "KL to the dense model", "features": "distance to the dense model's features"}[self.measure]
        passes = len(self.held_out) - 1
        kept = f"pass {self.best} of {passes} was kept" if self.best else f"none of {passes} passes was better"
        return (
            f"{name}, on {self.images_held_out} images that were held out: {self.before:.4g} -> {self.after:.4g} "
            f"({kept})\n{self.parameters} parameters, trained on {self.images} images in {self.seconds:.0f} s"
        )
