"""Salience-weighted merging: merge tokens that are alike or do not matter, and let those that matter dominate.

A method of this package. The matching is that of Bolya et al., "Token Merging: Your ViT But Faster" (ToMe, ICLR 2023,
arXiv 2210.09461), the salience that of Fayyaz et al., "Adaptive Token Sampling For Efficient Vision Transformers" (ATS,
ECCV 2022, arXiv 2111.15667). Fusing by several criteria is the idea of Lee et al., "Multi-criteria Token Fusion with
One-step-ahead Attention for Efficient Vision Transformers" (MCTF, CVPR 2024, arXiv 2403.10030).

Axes: B batch, N prunable tokens.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..registry import register_method
from ..signals import Merging, ModelShape, Reduction, Signals, Stage
from ..tokens import stable_order
from .layerwise import at_depth
from .merging import (
    MergeStage,
    MergingConfig,
    Spread,
    everything,
    keys_by_head,
    match_alternate,
    mean_keys,
    merge_first,
)
from .similarity import shortened
from .visionwise import significance

Similarity = Literal["per_head", "mean_key"]
Salience = Literal["cls", "contrast"]


@register_method("salience_merge")
@dataclass(frozen=True)
class SalienceMergeConfig(MergingConfig):
    """Salience-weighted merging in later blocks. By default 70 % of patches are merged in blocks 3 to 10 of 0 to 11.

    Args:
        salience: "cls": what a token adds to CLS, attention times the norm of its value. "contrast", for families
            without CLS: how much it stands out, see ``contrast``.
        similarity: of two tokens: "per_head", the cosine of their keys, averaged over heads; or "mean_key", the cosine
            of their keys averaged over heads, as in ToMe.
        layers: 0-based blocks, ascending. None: with a fraction ``r``, those of ``spread``; with counts or an even
            spread, from block 3 of 0 to 11 to the last but one.
        exact_last_block: as everywhere, but on by default. For a head that reads patches set it to False.
    """

    r: int | float | tuple[int, ...] = 0.7
    spread: Spread = "proportional"
    where: Literal["mid_block", "queries"] = "queries"
    similarity: Similarity = "per_head"
    salience: Salience = "cls"
    exact_last_block: bool = field(default=True, kw_only=True)

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(at_depth((4,), depth)[0], max(depth - 1, 1)))

    def stages_for(self, shape: ModelShape) -> tuple[Stage, ...]:
        fields = (self.proportional_attention, self.similarity, self.salience)
        return tuple(SalienceMergeStage(layer, self.where, r, *fields) for layer, r in self.counts(shape))


@dataclass(frozen=True)
class SalienceMergeStage(MergeStage):
    similarity: Similarity = "per_head"
    salience: Salience = "cls"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys", "values"} | ({"cls_attention"} if self.salience == "cls" else set()))

    def reduce(self, signals: Signals, n_keep: int) -> Reduction | Merging:
        if n_keep == signals.num_prunable:
            return everything(signals)
        salience = significance(signals) if self.salience == "cls" else contrast(signals)
        weights = F.pad(salience, (signals.num_protected, 0), value=1.0)
        if self.similarity == "per_head":
            matching = match_alternate(keys_by_head(signals), signals.num_protected, signals.need("keys").shape[1])
        else:
            matching = match_alternate(shortened(mean_keys(signals)), signals.num_protected)
        own = weights[:, matching.looking]
        cost = torch.addcmul(own, own, matching.similarity, value=-1)  # salience · (1 - similarity)
        weights = weights.clamp_min(1e-12)  # tokens that nothing speaks for are averaged evenly
        return replace(merge_first(signals, matching, stable_order(cost), n_keep, weights), importance=salience)


def contrast(signals: Signals) -> Tensor:
    """(B, N) float32: how much a token's keys stand out, times the norms of its values and its size.

    A head's part is the attention of a query that is the negative of the mean key: background, which is most of the
    image and alike, is near the mean. A token that many were merged into counts for all of them; the attention of CLS
    has that in it already, where attention is proportional.
    """
    keys, values = (signals.need(name)[:, :, signals.num_protected :].float() for name in ("keys", "values"))
    query = -keys.mean(dim=2, keepdim=True)
    attention = ((query @ keys.mT).squeeze(2) * keys.shape[-1] ** -0.5).softmax(dim=-1)
    salience = (attention * values.norm(dim=-1)).sum(1)
    return salience if signals.sizes is None else salience * signals.sizes[:, signals.num_protected :]
