"""The references that pruned decoders are held against: they are the stock model where nothing leaves, and each other
where tokens do, in every family with random choices and no pruning code."""

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import decoder_visuals
from .decoder_families import DEPTH, built, run, tiny_vlm
from .decoder_prompts import collate, is_image, sample
from .decoder_visuals import Inputs, family_of
from .reference_decoder import Leaving, Masked, Reference, is_linear, reference

FAMILIES = [name for name in decoder_visuals.FAMILIES if name.partition("+")[0] in CONFIG_MAPPING]
every_family = pytest.mark.parametrize("family", FAMILIES)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def prompts(model) -> list[Inputs]:
    parts = ["....I......", "..", "..I.i...", "i....", *(["..V..", ".I..V."] if "V" in family_of(model).kinds else [])]
    return [sample(model, part, seed) for seed, part in enumerate(parts)]


def masked(told: Reference) -> Masked:
    return Masked(**vars(told))


def some_leave(told: Reference, layers: tuple[int, ...], renumber: bool = False) -> Reference:
    """The prompt with half of the image tokens leaving at each layer, by chance."""
    generator = torch.Generator().manual_seed(7)
    left, leaving = list(range(int(told.image.sum()))), []
    for layer in layers:
        order = torch.randperm(len(left), generator=generator)[: len(left) // 2]
        left = [left[i] for i in sorted(order.tolist())]
        leaving.append(Leaving(layer, frozenset(left), renumber))
    return Reference(**{**vars(told), "leaving": tuple(leaving)})


def can_mask(model) -> bool:
    return not any(is_linear(model.get_decoder(), layer) for layer in range(DEPTH))


@every_family
def test_a_batch_is_its_samples_alone_in_the_stock_model(family) -> None:
    """What pruned models are asked for, asked of stock: padding on either side, and generation with a cache or not."""
    model = tiny_vlm(family)
    alone = prompts(model)
    expected = [run(model, inputs).logits[0] for inputs in alone]
    for side in ("left", "right"):
        batch = collate(alone, side)
        logits = run(model, batch).logits
        for row, dense in enumerate(expected):
            close(logits[row][batch["attention_mask"][row].bool()], dense)
    tokens = {
        use_cache: model.generate(**batch, max_new_tokens=3, do_sample=False, use_cache=use_cache)
        for batch in [collate(alone)]
        for use_cache in (True, False)
    }
    assert torch.equal(tokens[True], tokens[False])
    for row, inputs in enumerate(alone):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:], tokens[True][row, -3:])


@every_family
def test_with_nothing_dropped_the_references_are_the_stock_model(family) -> None:
    """Positions, features and states are its; greedy tokens too, which follow with the positions of generate."""
    model = tiny_vlm(family)
    for inputs in prompts(model):
        told = reference(model, inputs)
        output = run(model, inputs, output_hidden_states=True)
        result = told.forward()
        close(result.logits, output.logits[0])
        for actual, states in zip(result.states, output.hidden_states, strict=True):
            close(actual, states[0])
        close(masked(told).forward().logits, output.logits[0])
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    for way in (told, masked(told)):
        assert way.generate(4)[0] == generated[0, -4:].tolist()


@pytest.mark.parametrize("layers", [(-1,), (0,), (-1, 1, 5)], ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if can_mask(built(family))])
def test_dropping_is_masking(family, layers) -> None:
    """Of the two references, which share no forward."""
    model = tiny_vlm(family)
    for inputs in prompts(model):
        told = some_leave(reference(model, inputs), layers)
        shorter, whole = told.forward(), masked(told).forward()
        assert shorter.survivors == whole.survivors
        assert (len(shorter.survivors) < len(told.embeds)) == bool(is_image(inputs).any())
        close(shorter.logits, whole.logits)
    assert told.generate(3)[0] == masked(told).generate(3)[0]
