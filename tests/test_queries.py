"""Tokens that leave before the queries: what it saves, what it does not change, where it cannot be."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import ViTModel

from hf_tokenprune import (
    ATSConfig,
    ConfigError,
    EViTConfig,
    PruneConfig,
    RandomConfig,
    UnsupportedModelError,
    ZeroTPruneConfig,
    prune,
)
from hf_tokenprune.cost import cost
from hf_tokenprune.registry import get_adapter
from hf_tokenprune.signals import Reduction, Signals, Stage

from .families import first_tensor, fitting, images, inputs_for, supported_classes, tiny_model

FAMILIES = list({family: (family, cls) for family, cls in supported_classes()}.values())
DROPPING = [ATSConfig(), EViTConfig(fuse=False), RandomConfig()]


@pytest.mark.parametrize(
    ("family", "before"),
    fitting(FAMILIES, [replace(config, where="queries") for config in DROPPING]),  # type: ignore[call-arg]
    ids=lambda value: getattr(value, "method", value[0] if isinstance(value, tuple) else None),
)
def test_dropping_before_the_queries_is_dropping_behind_them(family: Any, before: PruneConfig) -> None:
    """A query of a token that is about to be dropped changes nothing that is left: less work, the same result."""
    behind = replace(before, where="mid_block")  # type: ignore[call-arg]
    models = [tiny_model(*family) for _ in range(2)]
    with torch.no_grad():
        found, expected = (
            first_tensor(prune(model, each)(**inputs_for(model, images())))
            for model, each in zip(models, (before, behind), strict=True)
        )
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert cost(models[0]).pruned.macs < cost(models[1]).pruned.macs


def test_page_rank_needs_all_queries() -> None:
    with pytest.raises(ConfigError, match=r"where='queries' .* expected 'after_block' or 'mid_block'"):
        ZeroTPruneConfig(where="queries")  # type: ignore[arg-type]


@dataclass(frozen=True)
class ReadsAttention(Stage):
    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"})

    def num_kept(self, num_prunable: int) -> int:
        return num_prunable // 2

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        raise AssertionError("never asked")


def test_a_stage_that_reads_what_is_not_there_yet_is_refused() -> None:
    model = tiny_model("vit", ViTModel)
    with pytest.raises(UnsupportedModelError, match="needs attention, but with where='queries'"):
        get_adapter("vit").check(model, (ReadsAttention(2, "queries"),))


def test_maps_of_attention_are_refused_as_long_as_they_are_asked_for() -> None:
    model = prune(tiny_model("vit", ViTModel, attention="eager"), RandomConfig(where="queries"))
    with torch.no_grad():
        with pytest.raises(UnsupportedModelError, match='prune with where="mid_block"'):
            model(images(), output_attentions=True)
        assert model(images()).last_hidden_state.shape[1] < 65


def test_attention_dropout_stays_in_training() -> None:
    model = tiny_model("vit", ViTModel, attention_probs_dropout_prob=0.5)
    prune(model, RandomConfig(where="queries")).train()
    with torch.no_grad():
        assert not torch.equal(model(images()).last_hidden_state, model(images()).last_hidden_state)
        model.eval()
        assert torch.equal(model(images()).last_hidden_state, model(images()).last_hidden_state)
