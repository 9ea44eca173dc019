"""Caches that something else has changed, and language models that are called without the model around them: right, or
refused with what is true."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from hf_tokenprune import prune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.errors import PruneStateError, UnsupportedModelError

from .decoder_families import (
    DEPTH,
    ONCE,
    ONCE_WITH_KEYS,
    Case,
    Inputs,
    adapter_of,
    is_image,
    lengths,
    run,
    sample,
    tiny_vlm,
)
from .reference_decoder import reference
from .test_contract_decoders import ONE_IMAGE, close, id_of

each_once = pytest.mark.parametrize("pair", ONCE, ids=id_of)
each_once_with_keys = pytest.mark.parametrize("pair", ONCE_WITH_KEYS, ids=id_of)


def ready(pair: tuple[str, Case]) -> tuple[PreTrainedModel, Inputs]:
    model = tiny_vlm(pair[0])
    return prune(model, pair[1].config(model)), sample(model, ONE_IMAGE)


def press(attention: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """What methods that compress a cache do behind each layer of the prefill: here, every second key goes."""
    layer = kwargs[CACHE_NAME].layers[attention.layer_idx]
    if kwargs["hidden_states"].shape[1] > 1:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]


@pytest.mark.parametrize("pressed", [range(DEPTH), [DEPTH - 1]], ids=["all layers", "the last layer"])
@each_once_with_keys
def test_a_cache_that_was_compressed_is_not_called_cropped(pair: tuple[str, Case], pressed: Any) -> None:
    model, inputs = ready(pair)
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    layers = adapter_of(model).blocks(model)
    handles = [layers[i].self_attn.register_forward_hook(press, with_kwargs=True) for i in pressed]
    message = (
        rf"layer {pressed[0]} of this cache holds \d+ tokens, where the pruned prompt left \d+: .*compresses or evicts"
    )
    with pytest.raises(PruneStateError, match=message):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    for handle in handles:
        handle.remove()
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).equal(expected)


def cut_generated(cache: Any) -> None:
    """One layer loses the token that it was given last."""
    cache.layers[5].keys, cache.layers[5].values = (
        x[:, :, :-1] for x in (cache.layers[5].keys, cache.layers[5].values)
    )


def halved(cache: Any) -> None:
    """All layers lose half, whatever it is."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]


@pytest.mark.parametrize("change", [cut_generated, halved])
@each_once_with_keys
def test_a_cache_that_lost_tokens_later(pair: tuple[str, Case], change: Callable[[Any], None]) -> None:
    model, inputs = ready(pair)
    cache = DynamicCache()
    run(model, inputs, **{CACHE_NAME: cache})
    run(model, {"input_ids": torch.tensor([[5, 6]])}, **{CACHE_NAME: cache})
    change(cache)
    with pytest.raises(PruneStateError, match=r"layer \d of this cache holds .*start with a new DynamicCache"):
        run(model, {"input_ids": torch.tensor([[7]])}, **{CACHE_NAME: cache})


# -- the language model itself ---------------------------------------------------------------------------------------


@each_once
def test_embeddings_given_to_the_language_model_are_refused(pair: tuple[str, Case]) -> None:
    """Features stand among them, and nobody can tell where: it must not be dense without a word."""
    model, inputs = ready(pair)
    embeds = reference(tiny_vlm(pair[0]), inputs).embeds[None]
    decoder = model.get_decoder()
    for more in ({}, {CACHE_NAME: DynamicCache()}):
        with pytest.raises(UnsupportedModelError, match="were given to the language model itself"):
            decoder(inputs_embeds=embeds, **more)


@pytest.mark.parametrize("by_name", [True, False])
@each_once
def test_text_given_to_the_language_model_is_right(pair: tuple[str, Case], by_name: bool) -> None:
    """On its own, and behind a pruned prompt: as through the model around it."""
    model, inputs = ready(pair)
    decoder = model.get_decoder()
    ids = inputs["input_ids"][~is_image(inputs)][None]

    def call(ids: Tensor, cache: Any = None) -> Tensor:
        more = {} if cache is None else {CACHE_NAME: cache}
        with torch.no_grad():
            states: Tensor = (decoder(input_ids=ids, **more) if by_name else decoder(ids, **more)).last_hidden_state
        return states

    assert torch.equal(call(ids), tiny_vlm(pair[0]).get_decoder()(ids).last_hidden_state)
    caches = [run(model, inputs, use_cache=True)[CACHE_NAME] for _ in range(2)]
    # By itself it counts from the length of the cache: the model around it knows how far axes lag behind.
    model.base_model.rope_deltas = None
    for step in (ids[:, -2:], ids[:, :1]):
        outer = run(model.base_model, {"input_ids": step}, **{CACHE_NAME: caches[1]})
        close(call(step, caches[0]), outer.last_hidden_state)
    step = model.get_input_embeddings()(ids[:, :1]).detach()
    outer = run(model, {"input_ids": ids[:, :1]}, **{CACHE_NAME: caches[1]}).logits
    with torch.no_grad():
        states = decoder(inputs_embeds=step, **{CACHE_NAME: caches[0]}).last_hidden_state
        close(model.lm_head(states), outer)
    assert lengths(caches[0]) == lengths(caches[1])
