"""A vision tower whose own blocks prune: what the adapter for vision encoders of its kind does, inside a larger model.

Its hidden states get their full length back, so that everything behind the tower stays as it is.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...registry import get_adapter, list_adapters
from ...signals import Stage
from ._tower import HAS_CLS


def encoder_adapter(tower: PreTrainedModel) -> Any:
    """The adapter for vision encoders that prunes this tower.

    Raises:
        UnsupportedModelError: there is none.
    """
    kind, known = tower.config.model_type, sorted(HAS_CLS.keys() & {*list_adapters()})
    if kind not in known:
        raise UnsupportedModelError(
            f"the vision tower is a {kind!r}; methods for vision encoders prune the blocks of {', '.join(known)}. "
            "Leave their config out of the stack"
        )
    return get_adapter(kind)


def check_encoder(tower: PreTrainedModel, stages: tuple[Stage, ...]) -> None:
    """Raise UnsupportedModelError where the blocks of a vision tower cannot prune like this; changes nothing."""
    adapter = encoder_adapter(tower)
    if adapter.states(tower):
        raise UnsupportedModelError(
            "the vision tower is pruned itself already; call unprune on it first, or leave methods for vision encoders "
            "out of the stack"
        )
    adapter.check(tower, stages, restore=True)
