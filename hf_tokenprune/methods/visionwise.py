"""What methods for vision encoders share.

Axes: B batch, N prunable tokens.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ..config import PruneConfig
from ..signals import Signals


@dataclass(frozen=True)
class VisionConfig(PruneConfig):
    """Fields of every config for vision encoders.

    Args:
        exact_last_block: the last block computes queries, output projection and MLP for the protected tokens only, and
            keys and values for all. Logits stay the same up to rounding; works for heads that read nothing else. No
            token leaves in the last block then.
        restore: the last hidden state, and others that a call asks for, get their full length back: a patch that was
            merged has the state of the token it is part of, one that was dropped its own last one. Not with
            ``exact_last_block``.
    """

    exact_last_block: bool = field(default=False, kw_only=True)
    restore: bool = field(default=False, kw_only=True)

    def validate(self) -> None:
        allowed = "False with exact_last_block=True, which leaves no patch to restore"
        self.check(not (self.exact_last_block and self.restore), "restore", allowed)


def significance(signals: Signals) -> Tensor:
    """(B, N) float32: the attention that CLS pays to a token times the norm of its value, summed over heads.

    That is what a token adds to the states that CLS gathers (Fayyaz et al., "Adaptive Token Sampling For Efficient
    Vision Transformers", eq. 3 without the denominator).
    """
    attention, values = signals.need("cls_attention"), signals.need("values")
    return (attention * values.float().norm(dim=-1)).sum(1)[:, signals.num_protected :]
