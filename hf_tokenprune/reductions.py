"""What a method returns: which tokens stay (``Reduction``), and which are merged into them (``Merging``).

Axes: B batch, P protected tokens (always the first ones), N prunable tokens, D width, n kept, m merged.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Reduction:
    """Which tokens survive a pruning layer; the others leave.

    Attributes:
        keep: (B, n) int64, positions among the N prunable tokens that entered, in the order in which they go on:
            ascending.
        tokens: (B, n, D) new states of these tokens, in a decoder or its vision tower.
        importance: (B, N) float32 by which the method ranks tokens, higher = keep; for records. None: it has no such.
    """

    keep: Tensor
    tokens: Tensor | None = None
    importance: Tensor | None = None


@dataclass(frozen=True)
class Merging:
    """Which tokens survive a pruning layer of a vision encoder, and which of the others are merged into them.

    A survivor's new state is the mean of its own and of those that are merged into it, its size the sum of their sizes.

    Attributes:
        rows: (B, P + n + m) int64, ``Signals.rows`` of the protected tokens, of those that stay, in the order in which
            they go on, and of those that are merged. Tokens that are not named leave.
        into: (B, m) int64, the place in a row of ``rows`` of the survivor.
        first: (B, 1) int64, the rows of token 0.
        num_protected: P.
        weights: (B, P + N) float32, those in the mean, 1 for the protected tokens; None: the sizes.
        average: False: the new state is the weighted sum, and there are no sizes.
        importance: like that of a ``Reduction``.
    """

    rows: Tensor
    into: Tensor
    first: Tensor
    num_protected: int
    weights: Tensor | None = None
    average: bool = True
    importance: Tensor | None = None

    tokens: ClassVar[None] = None

    @property
    def num_staying(self) -> int:
        """P + n."""
        return self.rows.shape[1] - self.into.shape[1]

    @property
    def keep(self) -> Tensor:
        """(B, n) int64: like that of a ``Reduction``, but in any order."""
        return self.rows[:, self.num_protected : self.num_staying] - (self.first + self.num_protected)

    @property
    def merged(self) -> Tensor:
        """(B, m) int64: positions of the merged ones among the N prunable tokens."""
        return self.rows[:, self.num_staying :] - (self.first + self.num_protected)
