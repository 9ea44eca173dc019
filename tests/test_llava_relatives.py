"""LLaVA's odd relatives: a Pixtral tower, towers at other image sizes, features of several layers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_tokenprune import prune, record
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.benchmark import benchmark
from hf_tokenprune.benchmark.decoder import random_inputs
from hf_tokenprune.cost import cost
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import CASES, Case, Inputs, collate, is_image, lengths, places, run, sample, stages_of, tiny_vlm
from .reference_decoder import reference
from .test_contract_decoders import close
from .test_generate import STEPS, greedy
from .test_images_in_prompts import as_features, encode, grids, pixtral, takes_features, words

IN_TOWER = [case for case in CASES if "vision_tower" in places(case)]
IN_DECODER = [case for case in CASES if case not in IN_TOWER]
in_decoder = pytest.mark.parametrize("case", IN_DECODER, ids=str)
in_tower = pytest.mark.parametrize("case", [case for case in IN_TOWER if case.method != "cls_attention"], ids=str)


def is_the_reference(dense: PreTrainedModel, model: PreTrainedModel, case: Case, inputs: Inputs) -> None:
    """Prefill and greedy decoding of ``model``, which gets pruned, are what the dense layers compute one by one."""
    config = case.config(dense)
    prune(model, config)
    with record(model) as rec:
        output = run(model, inputs)
    told = reference(dense, inputs, stages_of(dense, config), rec, pruned=model)
    expected = told.forward()
    assert list(rec.tokens.values()) == expected.entering
    assert expected.entering[-1] < inputs["input_ids"].shape[1]
    close(output.logits[0], expected.logits)
    steps = greedy(model, inputs)
    tokens, logits = told.generate(STEPS)
    assert steps.sequences[0, -STEPS:].tolist() == tokens
    close(torch.cat(steps.logits), logits)
    assert lengths(steps[CACHE_NAME]) == [n + STEPS - 1 for n in expected.entering]


# -- Pixtral ---------------------------------------------------------------------------------------------------------


def on_canvas(pixels: Tensor) -> Tensor:
    """As large as the largest image of a batch, the way its processor pads."""
    return F.pad(pixels, (0, 64 - pixels.shape[-1], 0, 64 - pixels.shape[-2]))


def of_shapes(*shapes: tuple[int, int], seed: int = 0) -> Inputs:
    inputs = grids(*shapes, seed=seed)
    return inputs | {"pixel_values": on_canvas(inputs["pixel_values"])}


def several() -> list[Inputs]:
    """Prompts with one image, three of other sizes, and none."""
    text = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    return [of_shapes((6, 8)), of_shapes((2, 3), (7, 1), (4, 10), seed=1), text]


@pytest.mark.parametrize("shapes", [[(6, 8)], [(4, 10), (6, 8)]], ids=str)
@in_decoder
def test_rows_of_patches_with_breaks_are_the_reference(case, shapes) -> None:
    """Break and end tokens are text: they stay, with the positions of text."""
    is_the_reference(pixtral(), pixtral(), case, grids(*shapes))


@pytest.mark.parametrize("side", ["left", "right"])
@in_decoder
def test_images_of_several_sizes_in_a_batch(case, side) -> None:
    model = pixtral()
    alone = several()
    prune(model, case.config(model))
    batch = collate(alone, side)
    logits = run(model, batch).logits
    for row, inputs in enumerate(alone):
        close(logits[row][batch["attention_mask"][row].bool()], run(model, inputs).logits[0])


@in_decoder
def test_images_of_several_sizes_in_generate(case) -> None:
    model = pixtral()
    prune(model, case.config(model))
    one_each = [of_shapes((6, 8)), of_shapes((4, 10), seed=1)]  # old versions cannot repeat several images for beams
    for alone, more in ((several(), {}), (one_each, {"num_beams": 3, "num_return_sequences": 2})):
        together = greedy(model, collate(alone), 4, **more).sequences[:, -4:].tolist()
        assert together == [
            answer for inputs in alone for answer in greedy(model, inputs, 4, **more).sequences[:, -4:].tolist()
        ]


@in_tower
def test_a_pixtral_tower_does_not_choose(case) -> None:
    model = pixtral()
    with pytest.raises(UnsupportedModelError, match=r"the vision tower is a 'pixtral'.*works in the decoder"):
        prune(model, case.config(model))


@pytest.mark.parametrize("size", [None, (24, 32)])
def test_random_prompts_for_a_tower_that_takes_any_size(size) -> None:
    """``benchmark`` and ``search`` give the tower what its processor would."""
    model = pixtral()
    inputs = random_inputs(model, 2, 6, size)
    assert inputs["image_sizes"].tolist() == [list(size or (64, 64))] * 2
    config = Case("divprune").config(model)
    report = benchmark(model, config, batch_sizes=[2], rounds=1, warmup=0, text_tokens=6, new_tokens=2, image_size=size)
    prune(model, config)
    with record(model) as rec:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert rec.tokens[0] == report.macs.pruned.layers[0].tokens_in
    assert cost(model, text_tokens=6, image_size=size).pruned.layers[0].tokens_in == rec.tokens[0]


@takes_features
def test_images_encoded_without_their_sizes_are_refused() -> None:
    """They come as one, so two of them would share what stays."""
    model = pixtral()
    inputs = grids((4, 4), (4, 4))
    prune(model, Case("divprune").config(model))
    del inputs["image_sizes"]
    with pytest.raises(UnsupportedModelError, match="Pass image_sizes with pixel_values"):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)


@takes_features
@pytest.mark.parametrize("shapes", [[(6, 8)], [(4, 10), (6, 8)]], ids=str)
def test_features_of_the_caller(shapes) -> None:
    model = pixtral()
    inputs = grids(*shapes)
    prune(model, Case("divprune").config(model))
    encoded = encode(model, inputs)
    logits = run(model, inputs).logits
    for made in (list, tuple):
        close(run(model, words(inputs), mm_encoder_outputs=as_features(encoded, made)).logits, logits)
    expected = greedy(model, inputs)
    found = greedy(model, words(inputs), mm_encoder_outputs=as_features(encoded))
    close(torch.cat(found.logits), torch.cat(expected.logits))
    assert lengths(found[CACHE_NAME]) == lengths(expected[CACHE_NAME])


# -- other towers ----------------------------------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "more patches": {"vision_config": {"image_size": 28}},
    "pixels left over": {"vision_config": {"image_size": 15}},
    "CLS kept": {"vision_config": {"image_size": 12}, "vision_feature_select_strategy": "full"},
    "siglip": {
        "vision_config": {"image_size": 28, "model_type": "siglip_vision_model"},
        "vision_feature_select_strategy": "full",
    },
}
SEVERAL: dict[str, dict[str, Any]] = {
    "two": {"vision_feature_layer": [-2, -1]},
    "three, CLS kept": {"vision_feature_layer": [1, 2, 3], "vision_feature_select_strategy": "full"},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [case for case in CASES if case.method != "cls_attention"], ids=str)
def test_towers_at_another_size_are_the_reference(case, size) -> None:
    dense, model = tiny_vlm("llava", **SIZES[size]), tiny_vlm("llava", **SIZES[size])
    inputs = sample(dense, "..I..I...", seed=6)
    assert cost(dense, text_tokens=7).dense.layers[0].tokens_in == 7 + int(is_image(inputs).sum()) / 2
    is_the_reference(dense, model, case, inputs)


@pytest.mark.parametrize("layers", SEVERAL)
@in_decoder
def test_features_of_several_layers_are_the_reference(case, layers) -> None:
    dense, model = tiny_vlm("llava", **SEVERAL[layers]), tiny_vlm("llava", **SEVERAL[layers])
    is_the_reference(dense, model, case, sample(dense, "..I..I...", seed=7))


@pytest.mark.parametrize("layers", SEVERAL)
@in_tower
def test_no_choice_in_a_tower_that_gives_several_layers(case, layers) -> None:
    model = tiny_vlm("llava", **SEVERAL[layers])
    with pytest.raises(UnsupportedModelError, match=r"vision_feature_layer=\[.*need one block's output"):
        prune(model, case.config(model))
