"""Layers that are computed once more for the backward (gradient checkpointing): if their projections draw random
numbers (LoRA with dropout), the second time they must draw the same ones, although nothing is chosen then. And where
they are no longer pruned by then, that is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTForImageClassification

from hf_tokenprune import DivPruneConfig, PruneConfig, PruneStateError, ToMeConfig, UniformConfig, prune, pruned

from .decoder_families import ONCE, Case, Inputs, adapter_of, collate, is_image, sample, tiny_vlm
from .families import first_tensor, images, inputs_for, tiny_model
from .test_contract_decoders import ONE_IMAGE, id_of
from .test_contract_families import MECHANICS, name_of


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


# -- a backward that comes too late ----------------------------------------------------------------------------------


def check_refused_outside(model: PreTrainedModel, config: PruneConfig, batch: Inputs, reentrant: bool) -> None:
    """Where blocks are stock again; then the model goes on learning, pruned and dense."""

    def output() -> Tensor:
        return first_tensor(model(**batch)).sum()

    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with pruned(model, config):
        late = output()
    with pytest.raises(PruneStateError, match="call backward before that, inside the with block of pruned"):
        late.backward()
    with pruned(model, config):
        output().backward()
    output().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_behind_the_block_is_refused(reentrant: bool) -> None:
    encoder = tiny_model("vit", ViTForImageClassification)
    check_refused_outside(encoder, UniformConfig(layers=(2,), keep_ratios=0.5), {"pixel_values": images()}, reentrant)
    decoder = tiny_vlm("llava")
    check_refused_outside(decoder, DivPruneConfig(keep_ratio=0.5), sample(decoder, ONE_IMAGE), reentrant)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pair", ONCE, ids=id_of)
def test_of_decoders(pair: tuple[str, Case], reentrant: bool) -> None:
    family, case = pair
    model = tiny_vlm(family)
    check_refused_outside(model, case.config(model), sample(model, ONE_IMAGE), reentrant)


@pytest.mark.slow
@pytest.mark.parametrize("pair", MECHANICS, ids=name_of)
def test_of_encoders(pair: Any) -> None:
    (family, cls), config = pair
    model = tiny_model(family, cls)
    check_refused_outside(model, config, inputs_for(model, images()), False)


def test_a_backward_where_blocks_are_pruned_otherwise_is_refused() -> None:
    model = tiny_model("vit", ViTForImageClassification).train()
    model.gradient_checkpointing_enable()
    with pruned(model, UniformConfig(layers=(2,), keep_ratios=0.5)):
        late = model(pixel_values=images()).logits.sum()
    with pruned(model, UniformConfig(layers=(3,), keep_ratios=0.5)), pytest.raises(PruneStateError, match="otherwise"):
        late.backward()


@pytest.mark.slow
def test_compiled_blocks_that_run_again_get_the_mask_that_the_compiler_made() -> None:
    """It hides nothing, but by then its values are there, and none of a pruned model is refused for being one."""
    found = []
    for compiled in (False, True):
        model: Any = prune(tiny_model("vit", ViTForImageClassification, num_hidden_layers=2), ToMeConfig()).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.compiler.reset()
        called = torch.compile(model, backend="eager") if compiled else model
        called(images()).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0])
