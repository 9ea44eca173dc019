"""Dropping tokens is masking them: a pruned model's logits are those of the dense stock model whose dropped tokens are
masked in all later layers, positions untouched; and it generates the tokens of a loop of that model."""

import dataclasses

import pytest
import torch
from torch import Tensor

from hf_tokenprune import prune, record

from .decoder_families import (
    FAMILIES,
    SUPPORTED,
    Case,
    attached,
    built,
    is_recurrent,
    run,
    stages_of,
    tiny_vlm,
)
from .decoder_prompts import sample
from .decoder_visuals import family_of
from .reference_decoder import Masked, reference
from .test_contract_decoders import ONE_IMAGE

WITH_MASKS = [pair for pair in SUPPORTED if not is_recurrent(built(pair[0]))]


def parts_for(family: str) -> list[str]:
    """One image, two of different sizes, a video where the family has them."""
    kinds = family_of(built(family)).kinds
    return [parts for parts in (ONE_IMAGE, "..I..i...", "..V...") if set(parts) <= {".", *kinds}]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("pair", "parts"), [(pair, parts) for pair in WITH_MASKS for parts in parts_for(pair[0])])
def test_dropping_is_masking(pair: tuple[str, Case], parts: str) -> None:
    """At the entrance and between layers: one image, two of different sizes, a video."""
    family, case = pair
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, parts, seed=12)
    stages = tuple(dataclasses.replace(s, positions="original") for s in stages_of(dense, case.config(dense)))
    with attached(model, *stages), record(model) as rec:
        logits = run(model, inputs).logits[0]
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        told = Masked(**vars(reference(dense, inputs, stages, rec, pruned=model)))
    expected = told.forward()
    assert len(expected.survivors) < len(logits)
    close(logits[expected.survivors], expected.logits[expected.survivors])
    tokens, steps = told.generate(4)
    assert output.sequences[0, -4:].tolist() == tokens
    close(torch.cat(output.logits), steps)


OFFSETS = [
    (family, parts) for family in FAMILIES if hasattr(built(family).model, "rope_deltas") for parts in parts_for(family)
]


@pytest.mark.parametrize(("family", "parts"), OFFSETS)
def test_the_offset_of_later_positions_is_the_dense_one(family, parts) -> None:
    """Which stock models keep for what is generated: no token takes the place of one that left."""
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, parts)
    prune(model, Case("divprune").config(dense))
    run(dense, inputs), run(model, inputs)
    assert model.model.rope_deltas.equal(dense.model.rope_deltas)
    for vlm in (dense, model):
        vlm.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert model.model.rope_deltas.equal(dense.model.rope_deltas)
