"""What methods share that prune the frames of a video, and leave images alone."""

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from ..signals import DecoderShape, Stage
from .decoderwise import DecoderConfig, Positions


@dataclass(frozen=True)
class VideoConfig(DecoderConfig):
    """A config by which a fraction of the tokens of every video stays, chosen once at the entrance of the decoder.

    Images stay whole, and so do the newline tokens of a video, whatever ``newlines`` says.

    Args:
        keep_ratio: fraction of the tokens of a video that stays, in (0, 1]; newline tokens are not counted.
    """

    keep_ratio: float = 0.25

    one_stage: ClassVar[bool] = True
    usual_positions: ClassVar[Positions] = "original"

    def validate(self) -> None:
        self.check_ratio("keep_ratio")

    def scaled(self, strength: float) -> NoReturn:
        raise NotImplementedError(f"{self.method} prunes videos, and budgets are of a prompt with one image")

    def with_counts(self, shape: DecoderShape, counts: Any) -> NoReturn:
        raise NotImplementedError(f"{self.method} prunes videos, and schedules are of a prompt with one image")


@dataclass(frozen=True)
class VideoStage(Stage):
    """The stage of a ``VideoConfig``; a subclass tells ``num_kept_of``."""

    keep_ratio: float

    videos_only: ClassVar[bool] = True

    def num_kept(self, num_prunable: int) -> int:
        return self.num_kept_of(num_prunable, 1)
