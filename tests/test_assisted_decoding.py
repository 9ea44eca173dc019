"""Assisted decoding gives the tokens of greedy decoding: candidates behind the prompt choose no image tokens."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from hf_tokenprune import prune, record
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import (
    ONCE,
    ONCE_WITH_KEYS,
    Case,
    Inputs,
    collate,
    is_image,
    lengths,
    new_cache,
    run,
    sample,
    tiny_vlm,
)
from .decoder_prompts import BY_TOKEN, in_one
from .test_contract_decoders import ONE_IMAGE, close, id_of
from .test_generate import greedy, pruned_pair

each_once = pytest.mark.parametrize("pair", ONCE, ids=id_of)
each_once_with_keys = pytest.mark.parametrize("pair", ONCE_WITH_KEYS, ids=id_of)
STEPS = 8


def repeating(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """A prompt whose last words stood there before, for look-up."""
    return longer(model, inputs, inputs["input_ids"][:, -6:-2])


def longer(model: PreTrainedModel, inputs: Inputs, words: torch.Tensor) -> Inputs:
    """A prompt with words (1, n) behind it."""
    text = {name: torch.full_like(words, name == "attention_mask") for name in BY_TOKEN if name in inputs}
    return in_one(model, [inputs, text | {"input_ids": words}])


@pytest.mark.parametrize("how", ["look-up", "assistant"])
@each_once_with_keys
def test_assisted_decoding_is_greedy(pair: tuple[str, Case], how: str) -> None:
    two = pruned_pair(*pair)
    inputs = repeating(two.dense, sample(two.dense, ONE_IMAGE))
    more: dict = {"prompt_lookup_num_tokens": 3}
    if how == "assistant":
        more = {"assistant_model": copy.deepcopy(two.dense)}
    with record(two.model) as rec:
        expected = greedy(two.model, inputs, STEPS)
    kept = {name: sets.tolist() for name, sets in rec.kept.items()}
    with record(two.model) as rec:
        output = greedy(two.model, inputs, STEPS, **more)
    assert {name: sets.tolist() for name, sets in rec.kept.items()} == kept
    assert torch.equal(output.sequences, expected.sequences)
    close(torch.cat(output.logits), torch.cat(expected.logits))
    assert lengths(output[CACHE_NAME])[-1] < output.sequences.shape[1] - 1


@each_once
def test_candidates_behind_a_prompt_choose_nothing(pair: tuple[str, Case]) -> None:
    """Whatever they are; and all other text has its say, however many logits are asked for."""
    family, case = pair
    model = tiny_vlm(family)
    prompt = sample(model, ONE_IMAGE)
    prune(model, case.config(model))
    before = run(model, prompt).logits
    for seed in range(3):
        words = torch.randint(1, 50, (1, 4), generator=torch.Generator().manual_seed(seed))
        inputs = longer(model, prompt, words)
        logits = run(model, inputs, logits_to_keep=5, **{CACHE_NAME: new_cache(model)}).logits
        close(logits[:, :1], before[:, -1:])
        with record(model) as rec:
            whole = run(model, inputs).logits
        kept = {name: sets.tolist() for name, sets in rec.kept.items()}
        with record(model) as rec:
            last = run(model, inputs, logits_to_keep=5).logits
        assert {name: sets.tolist() for name, sets in rec.kept.items()} == kept
        assert torch.equal(last, whole[:, -5:])


@each_once
def test_what_cannot_be_candidates_has_its_say(pair: tuple[str, Case]) -> None:
    """More logits than there is text behind the image, or those of several prompts: nobody has proposed these."""
    family, case = pair
    model = tiny_vlm(family)
    one = sample(model, ONE_IMAGE)
    prune(model, case.config(model))
    length = one["input_ids"].shape[1]
    tail = length - 1 - int(is_image(one)[0].nonzero().max())
    batch = collate([one, sample(model, "..I..", 1)])
    for inputs, count in ((one, tail + 2), (one, length), (one, length + 9), (batch, 3), (batch, length)):
        with record(model) as rec:
            whole = run(model, inputs).logits
        kept = {name: sets.tolist() for name, sets in rec.kept.items()}
        with record(model) as rec:
            last = run(model, inputs, logits_to_keep=count, **{CACHE_NAME: new_cache(model)}).logits
        assert {name: sets.tolist() for name, sets in rec.kept.items()} == kept
        assert torch.equal(last, whole[:, -count:])


def test_a_pruned_assistant_is_refused_with_the_reason() -> None:
    model = tiny_vlm("llava")
    inputs = sample(model, ONE_IMAGE)
    draft = prune(copy.deepcopy(model), Case("divprune").config(model))
    with pytest.raises(UnsupportedModelError, match=r"no images: unprune\(assistant_model\)"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, assistant_model=draft)
