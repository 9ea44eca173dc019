"""DART: keep the image tokens that are least like a few pivot tokens, by turns.

Follows Zichen Wen, Yifeng Gao, Shaobo Wang, Junyuan Zhang, Qintong Zhang, Weijia Li, Conghui He, Linfeng Zhang, "Stop
Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025 (arXiv 2502.11494).
Counts are exact here, which those of the official code are not.

Axes: B batch, N image tokens, R rows of text, D width, d head width, p pivots, k kept.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PruneConfig
from ..errors import TokenPruneError
from ..registry import register_method
from ..signals import ENTRANCE, DecoderShape, Reduction, Signals, Stage, TextRows
from ..tokens import gather_tokens, stable_order
from .decoderwise import Positions, RatioConfig, RatioStage


@register_method("dart")
@dataclass(frozen=True)
class DARTConfig(RatioConfig):
    """DART. The defaults are the paper's K = 2 and 128 of 576 tokens, by 4 + 4 pivots.

    Args:
        layer: 0-based decoder layer whose keys and states decide and behind which tokens leave; the paper's K − 1.
            None: in front of the first layer, by the embeddings.
        keep_ratio: fraction of the image tokens kept, in (0, 1]; ``max(1, round(keep_ratio · N))`` stay.
        image_pivots: image tokens with the largest keys; they stay, and others are compared with them.
        text_pivots: tokens of the text behind the last image that image tokens are compared with too. 0: the text has
            no say.
    """

    keep_ratio: float = 2 / 9
    layer: int | None = 1
    image_pivots: int = 4
    text_pivots: int = 4

    usual_positions: ClassVar[Positions] = "original"

    @property
    def place(self) -> int:
        return ENTRANCE if self.layer is None else self.layer

    def validate(self) -> None:
        super().validate()
        self.check(self.layer is None or self.layer >= 0, "layer", "a layer number >= 0, or None for the entrance")
        self.check(self.image_pivots >= 1, "image_pivots", "a count >= 1")
        self.check(self.text_pivots >= 0, "text_pivots", "a count >= 0")

    def stages_for(self, shape: DecoderShape) -> tuple[Stage, ...]:
        where, budget = "entrance", "image"
        if self.layer is not None:
            self.check_followed("layer", (self.layer,), shape)
            where, budget = "after_block", "sample"
        shared = self.shared(shape)
        stage = DARTStage(
            self.place, where, self.keep_ratio, self.image_pivots, self.text_pivots, budget=budget, **shared
        )
        return (stage,)

    def search_places(self, shape: DecoderShape) -> tuple[int, ...]:
        return (ENTRANCE,) if self.layer is None else PruneConfig.search_places(self, shape)

    def with_counts(self, shape: DecoderShape, counts: Mapping[int, int]) -> "DARTConfig":
        ((place, count),) = counts.items()
        layer = None if place == ENTRANCE else place
        return dataclasses.replace(self, layer=layer, keep_ratio=count / self.prunable(shape))


@dataclass(frozen=True)
class DARTStage(RatioStage):
    image_pivots: int
    text_pivots: int

    text_rows: ClassVar[TextRows] = TextRows("text", "own")

    @property
    def needs(self) -> frozenset[str]:
        keys = {"keys"} if self.layer >= 0 else set()
        text = {"text", *(f"text_{name}" for name in keys)} if self.text_pivots else set()
        return frozenset(keys | text)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        tokens = signals.tokens[:, signals.num_protected :]
        norms = key_norms(signals.need("keys")) if self.layer >= 0 else tokens.float().norm(1, -1)
        text, text_norms = tokens[:, :0], norms[:, :0]
        if self.text_pivots:
            text = signals.need("text")
            text_norms = key_norms(signals.need("text_keys")) if self.layer >= 0 else text.float().norm(1, -1)
            text_norms = text_norms.masked_fill(~signals.need("text_mask"), -math.inf)
        keep = dart(tokens, norms, text, text_norms, n_keep, self.image_pivots, self.text_pivots)
        return Reduction(keep.sort(dim=1).values)


def key_norms(keys: Tensor) -> Tensor:
    """(B, T) float32: the L1 norm of every token's keys (B, H, T, d), of all heads together."""
    return keys.float().abs().sum((1, 3))


def dart(
    tokens: Tensor,
    norms: Tensor,
    text: Tensor,
    text_norms: Tensor,
    n_keep: int,
    image_pivots: int = 4,
    text_pivots: int = 4,
) -> Tensor:
    """The image pivots, and by turns for every pivot the token that is least like it of those that are left.

    Pivots are the image tokens and the rows of text with the largest norms, in that order of norms, images first where
    two are equal. Likeness is the cosine. A pivot of the text takes part in the turns and is no image token.

    Args:
        tokens: (B, N, D) states of the image tokens; scores are float32 whatever their dtype. A zero vector has cosine
            0 with every token.
        norms: (B, N) float32 of their keys.
        text: (B, R, D) states of the text; R may be 0.
        text_norms: (B, R) float32 of its keys; −inf: filling. A sample whose text has fewer rows than ``text_pivots``
            has fewer pivots.
        n_keep: 1 <= k <= N. Below ``image_pivots`` so many image pivots are all that stays.

    Returns:
        (B, k) int64 positions in the order of their choice. Ties: lower position first.

    Raises:
        TokenPruneError: ``n_keep`` is out of range.
    """
    batch, num_tokens, _ = tokens.shape
    if not 1 <= n_keep <= num_tokens:
        raise TokenPruneError(f"n_keep={n_keep}: expected 1 <= n_keep <= {num_tokens}, the number of tokens")
    of_image = stable_order(norms, descending=True)[:, : min(image_pivots, n_keep)]
    of_text = stable_order(text_norms, descending=True)[:, :text_pivots]
    pivot_norms = torch.cat([norms.gather(1, of_image), text_norms.gather(1, of_text)], 1)  # (B, p)
    order = stable_order(pivot_norms, descending=True)  # what fills comes last
    pivots = torch.cat([gather_tokens(tokens, of_image), gather_tokens(text, of_text)], 1)
    unit = F.normalize(gather_tokens(pivots, order).float(), dim=-1)
    likeness = unit @ F.normalize(tokens.float(), dim=-1).mT  # (B, p, N)
    likeness.scatter_(2, of_image.unsqueeze(1).expand(-1, order.shape[1], -1), math.inf)  # chosen already
    rows, num_pivots = torch.arange(batch, device=tokens.device), (pivot_norms != -math.inf).sum(1)
    chosen = [of_image]
    for turn in range(n_keep - of_image.shape[1]):
        token = likeness[rows, turn % num_pivots].argmin(1)
        likeness[rows, :, token] = math.inf
        chosen.append(token.unsqueeze(1))
    return torch.cat(chosen, dim=1)
