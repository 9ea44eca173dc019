"""Image features that the caller has computed are as good as pixels; pieces of a prompt, which look the same, are not.

What is right is the same model with pixels, or the same ``generate`` without prefill_chunk_size.
"""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_tokenprune import prune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.adapters.decoder.llava import LlavaAdapter
from hf_tokenprune.adapters.decoder.llava_next import LlavaNextAdapter
from hf_tokenprune.errors import UnsupportedModelError
from hf_tokenprune.registry import get_adapter

from .decoder_families import (
    FAMILIES,
    ONCE,
    SUPPORTED,
    Case,
    Inputs,
    built,
    lengths,
    run,
    sample,
    tiny_vlm,
)
from .test_contract_decoders import close, id_of
from .test_generate import greedy
from .test_images_in_prompts import (
    ALONE,
    encode,
    grids,
    pixtral,
    prompt,
    takes_features,
    video_features,
    words,
)

pytestmark = takes_features

ALIKE = [family for family in FAMILIES if isinstance(get_adapter(family), (LlavaAdapter, LlavaNextAdapter))]
"""LLaVA and its kind, whose features are a sequence of images; what all families take is in test_images_in_prompts."""
PAIRS = [pair for pair in dict.fromkeys([*ONCE, *((name, Case("divprune")) for name in ALIKE)]) if pair[0] in ALIKE]
WITH_VIDEOS = [family for family in ALIKE if hasattr(built(family).config, "video_token_id")]
LOOKS_AROUND = [pair for pair in SUPPORTED if pair not in ALONE]
"""Methods of which what stays of an image depends on other images, or on text."""
HINT = r"leave prefill_chunk_size out.*pooler_output as a tuple"


def as_output(features: Any) -> dict[str, Any]:
    return {"image": BaseModelOutputWithPooling(pooler_output=features)}


def same(model: PreTrainedModel, given: Inputs, features: Any, inputs: Inputs) -> None:
    """``generate`` with features gives what it gives with pixels, and the cache is as short."""
    expected = greedy(model, inputs, 2)
    found = greedy(model, given, 2, mm_encoder_outputs=features)
    assert torch.equal(found.sequences, expected.sequences)
    close(torch.cat(found.logits), torch.cat(expected.logits))
    assert lengths(found[CACHE_NAME]) == lengths(expected[CACHE_NAME])
    assert lengths(found[CACHE_NAME])[-1] <= inputs["input_ids"].shape[1]


@pytest.mark.parametrize("made", [list, tuple])
@pytest.mark.parametrize("parts", ["..I...", "..Ii..I..."])
@pytest.mark.parametrize("pair", PAIRS, ids=id_of)
def test_generate_takes_features_like_pixels(pair, parts, made) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, parts)
    prune(model, case.config(model))
    features = made(encode(model, inputs).pooler_output)
    if pair in LOOKS_AROUND and made is list and len(features) == 1:
        with pytest.raises(UnsupportedModelError, match=HINT):
            greedy(model, words(inputs), 3, mm_encoder_outputs=as_output(features))
        return
    same(model, words(inputs), as_output(features), inputs)


@pytest.mark.parametrize("size", [(18, 18), (5, 20), (20, 7), (9, 9), (40, 31)])
@pytest.mark.parametrize("family", [family for family in FAMILIES if hasattr(built(family).model, "image_newline")])
def test_one_image_of_any_size_in_a_list(family, size) -> None:
    """Its rows of patches tell that it is whole, and one."""
    model = tiny_vlm(family, image_grid_pinpoints=[[9, 9], [9, 18], [18, 9], [18, 18], [27, 27]])
    inputs = prompt(model, [size])
    prune(model, Case("divprune").config(model))
    same(model, words(inputs), as_output(list(encode(model, inputs).pooler_output)), inputs)


@pytest.mark.parametrize("family", ALIKE)
def test_features_of_images_in_one_batch_with_text_alone(family) -> None:
    """A forward without a cache is no piece of a prompt, whatever it is given."""
    model = tiny_vlm(family)
    inputs = sample(model, "..I...")
    prune(model, Case("pyramiddrop").config(model))
    features = as_output(list(encode(model, inputs).pooler_output))
    text = torch.full_like(inputs["input_ids"], 5)
    batch = {"input_ids": torch.cat([inputs["input_ids"], text])}
    logits = run(model, batch, mm_encoder_outputs=features).logits
    close(logits[:1], run(model, inputs).logits)
    close(logits[1:], run(model, {"input_ids": text}).logits)


@pytest.mark.parametrize("family", ALIKE)
def test_a_tensor_is_as_stock_has_it(family) -> None:
    """For images the dense models refuse it."""
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(model, "..I...")
    prune(model, Case("divprune").config(model))
    features = torch.stack(encode(model, inputs).pooler_output)
    for each in (dense, model):
        with pytest.raises(TypeError, match="must be tuple of Tensors"):
            run(each, words(inputs), mm_encoder_outputs=as_output(features))


@pytest.mark.parametrize("parts", ["..V....", "..V.V....", "..VV..."])
@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_features_of_videos(family, parts) -> None:
    model = tiny_vlm(family)
    inputs = sample(model, parts)
    prune(model, Case("divprune").config(model))
    features = video_features(model, inputs["pixel_values_videos"]).unflatten(0, (parts.count("V"), -1))
    output = {"video": BaseModelOutputWithPooling(pooler_output=features)}
    close(run(model, words(inputs), mm_encoder_outputs=output).logits, run(model, inputs).logits)
    if parts.count("V") == 1 and not hasattr(model.model, "apply_pooling"):
        with pytest.raises(UnsupportedModelError, match=HINT):  # nothing tells one video from two that touch
            greedy(model, words(inputs), 3, mm_encoder_outputs=output)
        output = {"video": BaseModelOutputWithPooling(pooler_output=tuple(features))}
    same(model, words(inputs), output, inputs)


# -- pieces of a prompt ----------------------------------------------------------------------------------------------

PROMPTS = ["..I..i...", "..Ii.."]


def chunked(model: PreTrainedModel, inputs: Inputs, size: int | None) -> tuple[Any, DynamicCache]:
    cache = DynamicCache()
    return greedy(model, inputs, 2, prefill_chunk_size=size, **{CACHE_NAME: cache}), cache


def right_or_refused(model: PreTrainedModel, inputs: Inputs) -> list[int]:
    """The sizes of pieces that are taken, of all that there are; what they give is right."""
    expected, whole = chunked(model, inputs, None)
    taken = []
    for size in range(1, inputs["input_ids"].shape[1] + 2):
        try:
            found, cache = chunked(model, inputs, size)
        except UnsupportedModelError as error:
            assert "leave prefill_chunk_size out" in str(error)
            continue
        taken.append(size)
        close(torch.cat(found.logits), torch.cat(expected.logits))
        for layer, other in zip(cache.layers, whole.layers, strict=True):
            close(layer.keys, other.keys)
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("parts", PROMPTS)
@pytest.mark.parametrize("pair", PAIRS, ids=id_of)
def test_pieces_of_a_prompt_are_right_or_refused(pair, parts) -> None:
    """No part of an image is pruned like a whole one, and no two images like one, wherever the prompt is cut."""
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, parts)
    prune(model, case.config(model))
    taken = right_or_refused(model, inputs)
    apart = pair in ALONE and parts == PROMPTS[0]
    assert bool(taken) == apart, "each image of its own, whole, is right"


@pytest.mark.parametrize("parts", ["..V.I..", "..VV.."])
@pytest.mark.parametrize("family", WITH_VIDEOS)
def test_pieces_with_videos_are_right_or_refused(family, parts) -> None:
    model = tiny_vlm(family)
    inputs = sample(model, parts)
    prune(model, Case("divprune").config(model))
    right_or_refused(model, inputs)


@pytest.mark.parametrize("shapes", [[(2, 3), (3, 2)], [(3, 3)], [(1, 4), (1, 4)]], ids=str)
def test_pieces_of_rows_are_refused(shapes) -> None:
    """Pixtral: between two rows, and between two images, there is a token of text; nothing tells which."""
    model = pixtral()
    prune(model, Case("divprune").config(model))
    assert not right_or_refused(model, grids(*shapes))


@pytest.mark.parametrize("family", [family for family in ALIKE if (family, Case("divprune")) in ALONE])
def test_a_batch_in_pieces_is_right_or_refused(family) -> None:
    model = tiny_vlm(family)
    alone = sample(model, "..I...")
    inputs = {name: torch.cat([tensor, tensor]) for name, tensor in alone.items()}
    prune(model, Case("divprune").config(model))
    right_or_refused(model, inputs)
