"""What a family adds to some tokens between the first layers of its language model, for as long as they are there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._packed import Packed


@dataclass(frozen=True)
class SideInput:
    """Features that are added behind one decoder layer, such as those of Qwen3-VL's deepstack.

    Attributes:
        layer: the decoder layer behind whose output they are added.
        features: (N, D), one for each token that gets one.
        rows: (B, L) int64, the one of these that each token gets, -1 for tokens that get none.
    """

    layer: int
    features: Tensor
    rows: Tensor

    @classmethod
    def at(cls, layer: int, features: Tensor, places: Tensor) -> SideInput:
        """Features of the tokens at ``places`` (B, L) bool, sample by sample."""
        number = places.flatten().cumsum(0).view_as(places) - 1
        return cls(layer, features, torch.where(places, number, -1))

    def unpacked(self, packed: Packed) -> SideInput:
        """The same for samples that have a row each."""
        return replace(self, rows=torch.where(packed.valid, packed.unpack(self.rows), -1))

    def of(self, columns: Tensor) -> SideInput:
        """The same for the tokens at ``columns`` (B, n) alone."""
        return replace(self, rows=self.rows.to(columns.device).gather(1, columns))

    def added(self, states: Tensor) -> Tensor:
        """``states`` (B, L, D) with the features."""
        rows = self.rows.to(states.device)
        features = self.features.to(states.device, states.dtype)
        return torch.where((rows >= 0).unsqueeze(-1), states + features[rows.clamp(min=0)], states)
