"""ToMe: merge the tokens that are most alike.

Follows the published description of Daniel Bolya, Cheng-Yang Fu, Xiaoliang Dai, Peizhao Zhang, Christoph Feichtenhofer,
Judy Hoffman, "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv 2210.09461). Written from the paper; the official
code has a non-commercial licence and no line of it was used.

Axes: B batch, N prunable tokens.
"""

from dataclasses import dataclass

from ..registry import register_method
from ..signals import Merging, ModelShape, Reduction, Signals, Stage
from ..tokens import stable_order
from .merging import MergeStage, MergingConfig, everything, match_alternate, mean_keys, merge_first
from .similarity import shortened


@register_method("tome")
@dataclass(frozen=True)
class ToMeConfig(MergingConfig):
    """ToMe in every block. The default is the paper's 13 of 196 patches in each of 12 blocks; 40 tokens are left."""

    r: int | float | tuple[int, ...] = 12 * 13 / 196

    def stages_for(self, shape: ModelShape) -> tuple[Stage, ...]:
        proportional = self.proportional_attention
        return tuple(ToMeStage(layer, self.where, r, proportional) for layer, r in self.counts(shape))


@dataclass(frozen=True)
class ToMeStage(MergeStage):
    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"keys"})

    def reduce(self, signals: Signals, n_keep: int) -> Reduction | Merging:
        if n_keep == signals.num_prunable:
            return everything(signals)
        matching = match_alternate(shortened(mean_keys(signals)), signals.num_protected)
        return merge_first(signals, matching, stable_order(matching.similarity, descending=True), n_keep)
