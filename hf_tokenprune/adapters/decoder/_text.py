"""What a stage of a decoder reads of the text beside its image tokens, sample by sample, aligned at the end."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...signals import Stage
from ...tokens import gather_tokens
from ._layout import Layout
from ._view import moved


@dataclass(frozen=True)
class Text:
    """Of each sample, R rows of text among its L tokens.

    Attributes:
        index: (B, R) int64, where they stand.
        mask: (B, R) bool, which of them are text that the stage names, not filling.
        attention: (B, H, R, L) float32, what they pay to every token; None: nobody asks.
        keys: (B, H', L, d) of every token; None: nobody asks.
    """

    index: Tensor
    mask: Tensor
    attention: Tensor | None = None
    keys: Tensor | None = None

    def on(self, device: torch.device) -> Text:
        return Text(*(moved(getattr(self, field.name), device) for field in fields(self)))

    def signals(self, stage: Stage, states: Tensor, rows: Tensor, index: Tensor) -> dict[str, Any]:
        """What ``stage`` needs of it, for a group of images.

        Args:
            states: (B, L, D) of all tokens.
            rows: (g,) int64, the sample of each image.
            index: (g, N) int64, where its tokens stand.
        """
        own = self.index[rows]
        found: dict[str, Any] = {"text_mask": self.mask[rows]}
        if "text" in stage.needs:
            found["text"] = gather_tokens(states[rows], own)
        if self.attention is not None:
            columns = index[:, None, None].expand(-1, *self.attention.shape[1:3], -1)
            found["text_attention"] = self.attention[rows].gather(3, columns)
        if self.keys is not None:
            for name, places in (("keys", index), ("text_keys", own)):
                where = places[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
                found[name] = self.keys[rows].gather(2, where)
        return found


def text_rows(
    which: str, layout: Layout, valid: Tensor | None, placeholders: Tensor, special: Tensor | None, proposed: int
) -> Text:
    """The rows that ``TextRows`` calls ``which``.

    Args:
        valid: (B, L) bool, False for padding; None: no padding. Samples end in the last column.
        placeholders: (B, L) bool, tokens of images; of newlines too, which a layout may count as text.
        special: (B, L) bool, tokens that are no words; None: nobody knows, or asks.
        proposed: candidates at the end, which are not part of the prompt.
    """
    length, device = placeholders.shape[1] - proposed, placeholders.device
    if which == "all":
        num_rows = max(1, max(layout.text) - proposed)
        words = ~placeholders[:, :length] if valid is None else valid[:, :length] & ~placeholders[:, :length]
        place = torch.where(words, torch.arange(length, device=device), -1)
        index = place.sort(dim=1).values[:, -num_rows:]
        return Text(index.clamp(min=0), index >= 0)
    least = 0 if which == "question" else 1
    behind = [max(tail - proposed, least) for tail in layout.tail]
    num_rows = 1 if which == "last" else max(1, *behind)
    distance = torch.arange(num_rows, 0, -1, device=device)
    mask = distance <= torch.tensor(behind, device=device)[:, None]
    index = (length - distance).expand(len(behind), -1)
    if which == "question" and special is not None:
        words = mask & ~special.gather(1, index)
        mask = torch.where(words.any(1, keepdim=True), words, mask)
    return Text(index, mask)
