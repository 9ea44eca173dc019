"""Decoders whose layers are spread over two devices (``device_map``), emulated: every layer computes on its own one,
and what comes out is what one device gives."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_tokenprune import prune, record
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME

from .decoder_families import (
    DEPTH,
    ONCE_WITH_KEYS,
    SUPPORTED,
    Case,
    Inputs,
    adapter_of,
    collate,
    lengths,
    places,
    run,
    sample,
    tiny_vlm,
)
from .test_contract_decoders import ONE_IMAGE, id_of
from .test_packed_samples import packed
from .two_devices import CPU, FIRST, SECOND, Devices, device_of, put, spread

IN_TOWER = [pair for pair in SUPPORTED if places(pair[1]) == {"vision_tower"}]


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    yield
    assert device_of(torch.ones(1)) == CPU, "no test leaves the mode on"


def over_two(model: PreTrainedModel, first_of_second: int, connector: str = "") -> PreTrainedModel:
    """The model as accelerate spreads it: from this layer on the decoder, and the head, are on the second device, and
    the part of this name, if any."""
    adapter = adapter_of(model)
    inner = adapter.inner(model)
    decoder = adapter.decoder(inner)
    for parameter in (*model.parameters(), *model.buffers()):
        put(parameter, FIRST)
    others = [part for part in inner.children() if part is not decoder]
    for part in (*others, decoder.embed_tokens, decoder.rotary_emb):
        spread(part, FIRST)
    for i, layer in enumerate(decoder.layers):
        spread(layer, FIRST if i < first_of_second else SECOND)
    behind = [inner.get_submodule(connector)] if connector else []
    for part in (decoder.norm, model.lm_head, *behind):
        spread(part, SECOND)
    return model


def on_first(inputs: Inputs) -> Inputs:
    return {name: put(tensor.clone(), FIRST) for name, tensor in inputs.items()}


def turns(model: PreTrainedModel, inputs: Inputs, step: Inputs, move: Any = dict) -> dict[str, Any]:
    """A prompt with hidden states, then several tokens and a beam's change of places with its cache."""
    cache = DynamicCache()
    with record(model) as rec:
        output = run(model, move(inputs), use_cache=True, output_hidden_states=True, **{CACHE_NAME: cache})
    first = run(model, move(step), **{CACHE_NAME: cache}).logits
    cache.reorder_cache(torch.tensor([1, 0]))
    step = {**step, "attention_mask": torch.cat([step["attention_mask"], torch.ones_like(step["input_ids"])], 1)}
    return {
        "logits": output.logits,
        "states": output.hidden_states,
        "later": [first, run(model, move(step), **{CACHE_NAME: cache}).logits],
        "kept": list(rec.kept.values()),
        "lengths": lengths(cache),
    }


@pytest.mark.parametrize("first_of_second", [2, 3])
@pytest.mark.parametrize("pair", ONCE_WITH_KEYS, ids=id_of)
def test_layers_of_two_devices(pair: tuple[str, Case], first_of_second: int) -> None:
    """With a boundary between a stage and the layer behind it, and inside a segment."""
    family, case = pair
    model = tiny_vlm(family)
    model.set_experts_implementation("eager")  # a grouped product asks CUDA what it can do
    inputs = collate([sample(model, ONE_IMAGE, 1), sample(model, "..I..", 2)])
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    positions = mask.cumsum(1)[:, -3:] - 1
    axes = adapter_of(model).position_axes
    step = {"input_ids": ids, "attention_mask": mask}
    step["position_ids"] = positions if axes == 1 else positions.expand(axes, -1, -1)
    prune(model, case.config(model))
    expected = turns(model, inputs, step)
    over_two(model, first_of_second)
    with Devices():
        found = turns(model, inputs, step, on_first)
    assert expected["lengths"][DEPTH - 1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert device_of(found["logits"]) == SECOND


@pytest.mark.parametrize("pair", ONCE_WITH_KEYS, ids=id_of)
def test_a_packed_row_over_two_devices(pair: tuple[str, Case]) -> None:
    """Samples get their places in the row again where the last layer is."""
    family, case = pair
    model = tiny_vlm(family)
    model.set_experts_implementation("eager")  # a grouped product asks CUDA what it can do
    row = packed(model, [sample(model, ONE_IMAGE, 1), sample(model, "..I..", 2)])
    prune(model, case.config(model))
    expected = run(model, row, use_cache=False, output_hidden_states=True)
    over_two(model, 3)
    with Devices():
        found = run(model, on_first(row), use_cache=False, output_hidden_states=True)
    for name in ("logits", "hidden_states"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("pair", IN_TOWER, ids=id_of)
def test_a_projector_on_another_device_than_the_tower(pair: tuple[str, Case]) -> None:
    """As where a device is full behind the last block of the tower."""
    family, case = pair
    model = tiny_vlm(family)
    model.set_experts_implementation("eager")  # a grouped product asks CUDA what it can do
    inputs = sample(model, ONE_IMAGE)
    prune(model, case.config(model))
    expected = run(model, inputs).logits
    over_two(model, 0, adapter_of(model).connector_name)
    with Devices():
        found = run(model, on_first(inputs)).logits
    torch.testing.assert_close(found, put(expected, SECOND), rtol=0, atol=0)


def test_the_emulation_tells_devices_apart() -> None:
    with Devices():
        first, second = put(torch.ones(2, 3), FIRST), torch.zeros(2, 3, device="cuda:1")
        assert (first.device, second.device, first.new_ones(2).device) == (FIRST, SECOND, FIRST)
        assert (first + second.to("cuda:0")).device == FIRST
        assert second.to(first.device, torch.float64).device == FIRST
        assert second.to(first).dtype == first.dtype
        assert (second * torch.tensor(2.0)).device == SECOND
        assert (second + 1)[:, 0].device == SECOND
        for mix in (
            lambda: first + second,
            lambda: torch.cat([first, second]),
            lambda: first[torch.tensor([0], device="cuda:1")],
            lambda: first + torch.ones(3),
            lambda: torch.nn.functional.linear(first, second),
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                mix()


def test_a_dense_model_over_two_devices() -> None:
    """The emulation lets stock Transformers through, and a module that keeps another's tensors it does not."""
    model = tiny_vlm("llava")
    inputs = sample(model, ONE_IMAGE)
    expected = run(model, inputs).logits
    over_two(model, 4)
    with Devices():
        assert torch.equal(run(model, on_first(inputs)).logits, put(expected, SECOND))
        kept: list[Any] = []
        layers = adapter_of(model).blocks(model)
        layers[0].register_forward_pre_hook(lambda _, args, kwargs: kept.append(kwargs), with_kwargs=True)
        layers[6].register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "position_embeddings": kept[0]["position_embeddings"]}),
            with_kwargs=True,
        )
        with pytest.raises(RuntimeError, match="same device"):
            run(model, on_first(inputs))
