"""Decoders in mixed precision: methods choose in float32, from what the layers themselves work with."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_tokenprune import prune, record
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.errors import PruneStateError

from .decoder_families import CASES, ONCE, Case, Inputs, collate, image_features, lengths, places, run, sample, tiny_vlm
from .test_contract_decoders import ONE_IMAGE, id_of

IN_DECODER = [case for case in CASES if "vision_tower" not in places(case)]


def encoded(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """The inputs with features instead of pixels, which then have no rounding of a tower in them. They differ little
    beside what they share, as those of real images do."""
    features = image_features(model, inputs["pixel_values"])
    output = BaseModelOutputWithPooling(pooler_output=(features * 0.02 + features[:1],))
    words = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    return {**words, "mm_encoder_outputs": {"image": output}}


@pytest.mark.parametrize("case", [case for case in IN_DECODER if places(case) == {"entrance"}], ids=str)
def test_autocast_does_not_change_what_is_kept_of_the_same_features(case: Case) -> None:
    model = tiny_vlm("llava")
    inputs = encoded(model, sample(model, ONE_IMAGE))
    prune(model, case.config(model))
    kept = []
    for enabled in (False, True):
        with record(model) as rec, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run(model, inputs)
        kept.append(rec.kept["entrance"].tolist())
    assert kept[0] == kept[1]


def with_an_overflow(model: PreTrainedModel) -> tuple[list[Inputs], Inputs]:
    """Two prompts, and a batch of them in which the first image is NaN."""
    prompts = [sample(model, ONE_IMAGE, 1), sample(model, "..I....", 2)]
    overflown = {**prompts[0], "pixel_values": torch.full_like(prompts[0]["pixel_values"], torch.nan)}
    return prompts, collate([overflown, prompts[1]])


@pytest.mark.parametrize("case", IN_DECODER, ids=str)
def test_a_sample_that_overflowed_leaves_the_others_alone(case: Case) -> None:
    model = tiny_vlm("llava")
    prompts, batch = with_an_overflow(model)
    prune(model, case.config(model))
    expected = run(model, collate(prompts)).logits[1]
    assert torch.equal(run(model, batch).logits[1], expected)


@pytest.mark.parametrize("case", [case for case in CASES if "vision_tower" in places(case)], ids=str)
def test_features_that_overflowed_are_no_tokens_that_left(case: Case) -> None:
    """Both are NaN. A dense model says so by its logits; one that lost the whole image would answer without it."""
    model = tiny_vlm("llava")
    _, batch = with_an_overflow(model)
    prune(model, case.config(model))
    with pytest.raises(PruneStateError, match=r"no token left .* NaN"):
        run(model, batch)


@pytest.mark.parametrize("pair", ONCE, ids=id_of)
def test_norms_in_float32_beside_weights_in_bfloat16(pair: tuple[str, Case]) -> None:
    """As scripts for LoRA leave a model. A dense one runs so under autocast, and so does a pruned one."""
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    model.bfloat16()
    for name, module in model.named_modules():
        if "norm" in name or "embed" in name:
            module.float()
    with torch.autocast("cpu", torch.bfloat16):
        try:
            run(model, inputs)
        except RuntimeError as error:  # SmolVLM of 5.17 cannot put features among embeddings of another type
            assert "dtypes match" in str(error)
            model.get_input_embeddings().bfloat16()
            run(model, inputs)
        prune(model, case.config(model))
        output = run(model, inputs, use_cache=True)
    assert output.logits.isfinite().all()
    assert lengths(output[CACHE_NAME])[-1] < inputs["input_ids"].shape[1]
