"""Several samples in one row, as padding-free collators make them: a row each while tokens leave, then packed again.

Transformers keeps such samples apart by a mask, or by kernels that are told where samples end. Both are of one row that
all layers share; samples of which tokens leave have their own lengths, so they get rows of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedModelError

ENDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments that tell attention kernels where samples begin and end."""


@dataclass(frozen=True)
class Packed:
    """S samples of at most L tokens that came in B rows of T.

    Attributes:
        take: (S, L) int64, where each token stood among the B · T; padding in front: any token of the sample.
        valid: (S, L) bool, False for padding.
        back: (B, T) int64, where each token stands among the S · L.
    """

    take: Tensor
    valid: Tensor
    back: Tensor

    def unpack(self, rows: Tensor) -> Tensor:
        """(B, T, ...) as (S, L, ...)."""
        return rows.flatten(0, 1)[self.take]

    def pack(self, samples: Tensor) -> Tensor:
        """(S, L, ...) as (B, T, ...), where the samples are: the last layer may be on another device than the first."""
        return samples.flatten(0, 1)[self.back.to(samples.device)]


def read_packed(kwargs: dict[str, Any], cache: Any, use_cache: bool, like: Tensor) -> Packed | None:
    """How samples are packed in the input of a language model, ``like`` (B, T, D); None: each has its own row.

    As Transformers has it: no mask, and either the ends of samples are given, or positions start anew; without a cache
    wherever they do not just count up. Asks the device, so it is for forwards with an image only.

    Raises:
        UnsupportedModelError: they are, and ``cache`` is to keep what they were.
    """
    positions, ends = kwargs.get("position_ids"), kwargs.get(ENDS[0])
    if kwargs.get("attention_mask") is not None:
        return None
    batch, length = like.shape[:2]
    if ends is not None:
        starts = {*ends.tolist(), *range(0, batch * length, length)} - {batch * length}
    elif (positions := text_row(positions)) is None:
        return None
    else:
        positions = positions.expand(batch, -1)
        steps = torch.diff(positions, prepend=positions[:, :1])  # 0 at the beginning of a row
        begins = steps < 1 if use_cache else steps != 1
        starts = set(begins.flatten().nonzero().flatten().tolist())
    if len(starts) == batch:
        return None
    if cache is not None:
        raise UnsupportedModelError(
            f"position_ids start anew inside a row: {len(starts)} samples in {batch} row{'s' * (batch > 1)}, which a "
            f"{type(cache).__name__} cannot keep apart. Leave the cache out, with use_cache=False, or give each sample "
            "a row of its own"
        )
    return packed_at(sorted(starts), batch, length, like.device)


def text_row(positions: Tensor | None) -> Tensor | None:
    """The row of ``positions``, of (B, T) or of four axes (4, B, T), that counts tokens; None: none does.

    Three axes tell where an image's tokens are in it, and start anew inside.
    """
    if positions is None or positions.dim() == 2:
        return positions
    return positions[0] if len(positions) == 4 else None


def packed_at(starts: list[int], batch: int, length: int, device: torch.device) -> Packed:
    """Samples that begin at ``starts``, ascending, among the tokens of (batch, length)."""
    begin = torch.tensor(starts, device=device).unsqueeze(1)
    end = torch.tensor([*starts[1:], batch * length], device=device).unsqueeze(1)
    longest = max(b - a for a, b in pairwise([*starts, batch * length]))
    take = end - longest + torch.arange(longest, device=device)
    valid = take >= begin
    back = take.new_empty(batch * length)
    back[take[valid]] = valid.flatten().nonzero().flatten()
    return Packed(torch.where(valid, take, begin), valid, back.unflatten(0, (batch, length)))


def unpacked_arguments(packed: Packed | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a language model for samples that have a row each."""
    kwargs = {name: value for name, value in kwargs.items() if name not in ENDS}
    if packed is None:
        return kwargs
    positions = kwargs.get("position_ids")
    if positions is not None:
        positions = positions.expand(*positions.shape[:-2], packed.back.shape[0], -1)
        positions = packed.unpack(positions.movedim((-2, -1), (0, 1))).movedim((0, 1), (-2, -1))
    return {**kwargs, "attention_mask": packed.valid, "position_ids": positions, "use_cache": False}
