"""Several samples in one row, as padding-free collators make them: each is what it is alone, whatever the method."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_tokenprune import prune, record
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import (
    FAMILIES,
    ONCE,
    Case,
    Inputs,
    adapter_of,
    lengths,
    may_renumber,
    run,
    sample,
    texts_of,
    tiny_vlm,
)
from .decoder_prompts import BY_TOKEN, joined
from .reference_decoder import positions_of
from .test_contract_decoders import close, id_of

each_once = pytest.mark.parametrize("pair", ONCE, ids=id_of)
PROMPTS = ("..I...", "I..", "....", ".I.I.....")


def samples(model: PreTrainedModel) -> list[Inputs]:
    return [sample(model, parts, seed) for seed, parts in enumerate(PROMPTS)]


def packed(model: PreTrainedModel, alone: list[Inputs]) -> Inputs:
    """One behind the other in one row; positions of several axes have those in the text before them."""
    row = {
        name: joined([inputs[name] for inputs in alone if name in inputs], int(name in BY_TOKEN))
        for name in {name for inputs in alone for name in inputs} - {"attention_mask"}
    }
    text = torch.cat([torch.arange(inputs["input_ids"].shape[1]) for inputs in alone])[None]
    positions = torch.cat([positions_of(model, inputs) for inputs in alone], 1)
    return {**row, "position_ids": text if len(positions) == 1 else torch.cat([text, positions])[:, None]}


def ends_of(alone: list[Inputs]) -> dict[str, Any]:
    """What collators give attention kernels."""
    counts = torch.tensor([0, *(inputs["input_ids"].shape[1] for inputs in alone)])
    ends, longest = counts.cumsum(0).int(), int(counts.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def parted(row: Tensor, alone: list[Inputs]) -> list[Tensor]:
    return list(row[0].split([inputs["input_ids"].shape[1] for inputs in alone]))


@pytest.mark.parametrize(
    ("pair", "positions"),
    [
        (pair, rule)
        for pair in ONCE
        for rule in ("contiguous", "original")
        if rule == "original" or may_renumber(pair[0])
    ],
)
def test_each_sample_is_what_it_is_alone(pair: tuple[str, Case], positions: str) -> None:
    """Logits, hidden states and kept sets; with a cache left to its default, too, and with ends of samples."""
    family, case = pair
    model = tiny_vlm(family, texts_of(family)[-1])
    alone = samples(model)
    prune(model, case.config(model, positions=positions))
    row, expected = packed(model, alone), []
    for inputs in alone:
        with record(model) as rec:
            expected.append((run(model, inputs, output_hidden_states=True), rec.kept))
    ways = [{"use_cache": False}, {}, {**ends_of(alone), "use_cache": False}]
    if brings_a_cache(tiny_vlm(family), alone[0]):
        with pytest.raises(UnsupportedModelError, match="use_cache=False"):
            run(model, row, **ways.pop(1))
    for more in ways:
        with record(model) as rec:
            output = run(model, row, output_hidden_states=True, **more)
        assert output.get(CACHE_NAME) is None
        parts = zip(expected, parted(output.logits, alone), parted(output.hidden_states[4], alone), strict=True)
        for i, ((single, kept), logits, states) in enumerate(parts):
            close(logits, single.logits[0])
            close(states, single.hidden_states[4][0])
            for name, sets in kept.items():
                assert [n for n in rec.kept[name][i].tolist() if n >= 0] == sets[0].tolist()


def brings_a_cache(dense: PreTrainedModel, inputs: Inputs) -> bool:
    """Whether the model around the language model makes a cache where the caller gives none."""
    given = []
    dense.get_decoder().register_forward_pre_hook(
        lambda _, args, call: given.append(call[CACHE_NAME]), with_kwargs=True
    )
    run(dense, inputs)
    return given[0] is not None


@each_once
def test_ends_of_samples_alone_tell_them_apart(pair: tuple[str, Case]) -> None:
    family, case = pair
    model = tiny_vlm(family)
    alone = samples(model)
    prune(model, case.config(model))
    row = packed(model, alone)
    expected = run(model, row, use_cache=False).logits
    row.pop("position_ids")
    close(run(model, row, use_cache=False, **ends_of(alone)).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_rows_of_samples(family: str) -> None:
    """Two rows of the same length, cut at different places."""
    model = tiny_vlm(family)
    alone = [sample(model, parts, seed) for seed, parts in enumerate(["..I...", "I..", ".I.", "I....."])]
    first, second = packed(model, alone[:2]), packed(model, alone[2:])
    row = {name: torch.cat([first[name], second[name]], -2 if name == "position_ids" else 0) for name in first}
    prune(model, next(case for name, case in ONCE if name == family).config(model))
    logits = run(model, row, use_cache=False).logits.flatten(0, 1)
    close(logits, torch.cat([run(model, inputs).logits[0] for inputs in alone]))


@each_once
def test_gradients_reach_every_sample(pair: tuple[str, Case]) -> None:
    family, case = pair
    model = tiny_vlm(family).train()
    alone = samples(model)[:2]
    prune(model, case.config(model))
    weight = adapter_of(model).blocks(model)[6].input_layernorm.weight

    def gradient(batches: list[Inputs]) -> Tensor:
        model.zero_grad()
        for inputs in batches:
            model(**inputs, use_cache=False).logits.log_softmax(-1).square().sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    expected = gradient(alone)
    # Entries are sums that cancel: their rounding is a part of the largest, not of what is left.
    torch.testing.assert_close(
        gradient([packed(model, alone)]), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_of_a_packed_row_is_refused(filled: bool) -> None:
    """It could not keep its samples apart in later turns. Positions that only count up are no sign of samples."""
    model = tiny_vlm("llava")
    alone = samples(model)[:2]
    prune(model, Case("fastv").config(model))
    cache = DynamicCache()
    if filled:
        run(model, {"input_ids": torch.tensor([[5, 6]])}, **{CACHE_NAME: cache})
    with pytest.raises(UnsupportedModelError, match=r"2 samples in 1 row, which a .*Cache cannot keep apart"):
        run(model, packed(model, alone), **{CACHE_NAME: cache})
    single = packed(model, alone[:1])
    single["position_ids"] += 2 * filled
    run(model, single, **{CACHE_NAME: cache})
    assert lengths(cache)[-1] < single["input_ids"].shape[1]


@each_once
def test_a_mask_says_that_rows_are_samples(pair: tuple[str, Case]) -> None:
    """As in a dense model: with a mask, positions are positions. What else stands there has no effect."""
    family, case = pair
    model = tiny_vlm(family)
    inputs = samples(model)[0]
    prune(model, case.config(model))
    expected = run(model, inputs).logits
    assert torch.equal(run(model, inputs, **ends_of([inputs])).logits, expected)
