"""Layers that are computed once more for the backward (gradient checkpointing), whose projections draw random numbers
(LoRA with dropout): the second time they must draw the same ones, although nothing is chosen then."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_tokenprune import prune

from .decoder_families import ONCE, Case, adapter_of, collate, is_image, sample, tiny_vlm
from .test_contract_decoders import ONE_IMAGE, id_of


class WithDropout(nn.Module):
    """A projection as an adapter wraps it; with no ``weight``, as some quantised ones are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.dropout = base, nn.Dropout(0.3)

    def forward(self, states: Tensor) -> Tensor:
        projected: Tensor = self.base(self.dropout(states))
        return projected


def wrapped(model: PreTrainedModel) -> PreTrainedModel:
    for block in adapter_of(model).blocks(model):
        for part in [part for part in block.modules() if hasattr(part, "q_proj")]:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(part, name, WithDropout(getattr(part, name)))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pair", ONCE, ids=id_of)
def test_gradients_are_those_without_recomputing(pair: tuple[str, Case], reentrant: bool) -> None:
    """The vision tower's too, whose features may be added between layers (DeepStack)."""
    family, case = pair
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for recompute in (False, True):
        model = wrapped(tiny_vlm(family)).train()
        batch = collate([sample(model, ONE_IMAGE), sample(model, "..I..", 1)])
        prune(model, case.config(model))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        loss = model(**batch, labels=batch["input_ids"].masked_fill(is_image(batch), -100), use_cache=False).loss
        loss.backward()
        found.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (loss, again) = found
    assert torch.equal(loss, expected)
    rounding = 1e-6 if reentrant else 0  # parts of a gradient are then summed in another order
    torch.testing.assert_close(again, gradients, rtol=rounding, atol=rounding)
