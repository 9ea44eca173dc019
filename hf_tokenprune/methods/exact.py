"""The exact last block alone: nothing leaves, and what no head reads is not computed."""

from dataclasses import dataclass
from typing import ClassVar

from ..config import PruneConfig
from ..registry import register_method
from ..signals import ModelShape, Stage


@register_method("exact")
@dataclass(frozen=True)
class ExactConfig(PruneConfig):
    """The last block computes queries, output projection and MLP for the protected tokens only; logits stay the same.

    For heads that read nothing but protected tokens. Other configs for vision encoders have this as a field.
    """

    exact_last_block: ClassVar[bool] = True

    def stages_for(self, shape: ModelShape) -> tuple[Stage, ...]:
        return ()
