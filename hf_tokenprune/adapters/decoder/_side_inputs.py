"""What a family adds to some tokens between the first layers of its language model, for as long as they are there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._packed import Packed


@dataclass(frozen=True)
class SideInputs:
    """Features that are added behind some decoder layers to the same tokens, such as those of Qwen3-VL's deepstack.

    Attributes:
        features: (N, D) by the decoder layer behind whose output they are added, one for each token that gets one.
        rows: (B, L) int64, the one of these that each token gets, -1 for tokens that get none.
    """

    features: dict[int, Tensor]
    rows: Tensor

    @classmethod
    def at(cls, places: Tensor, features: dict[int, Tensor]) -> SideInputs:
        """Features of the tokens at ``places`` (B, L) bool, sample by sample."""
        number = places.flatten().cumsum(0).view_as(places) - 1
        return cls(features, torch.where(places, number, -1))

    def unpacked(self, packed: Packed) -> SideInputs:
        """The same for samples that have a row each."""
        return replace(self, rows=torch.where(packed.valid, packed.unpack(self.rows), -1))

    def of(self, columns: Tensor) -> SideInputs:
        """The same for the tokens at ``columns`` (B, n) alone."""
        return replace(self, rows=self.rows.to(columns.device).gather(1, columns))

    def added(self, layer: int, states: Tensor) -> Tensor:
        """``states`` (B, L, D), the output of this layer, with its features."""
        features = F.pad(self.features[layer].to(states.device, states.dtype), (0, 0, 0, 1))  # a 0 for row -1
        return states + features[self.rows.to(states.device)]
