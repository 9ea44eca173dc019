"""FlashAttention takes positions that do not count up for samples packed in one row, where there is no mask: what
layers are given must not look so, however positions go on behind a pruning point."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_tokenprune import prune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME

from .decoder_families import SUPPORTED, adapter_of, new_cache, run, sample, tiny_vlm
from .decoder_prompts import Inputs
from .reference_decoder import reference
from .test_contract_decoders import ONE_IMAGE, every_method, half, id_of
from .test_generate import continued

POSITIONS = {1: ("contiguous", "original"), 3: ("original",)}
"""By the number of axes."""


def turns(model: PreTrainedModel) -> list[Inputs]:
    """Two of them, each with an image, and a step of decoding; with one cache."""
    first, words = sample(model, ONE_IMAGE, 1), sample(model, "..I...", 2)
    told = reference(model, first)
    second = continued(told, words)
    seen = first["input_ids"].shape[1]
    second |= {name: second[name][..., seen:] for name in ("input_ids", "mm_token_type_ids") if name in second}
    if "position_ids" in second:
        second["position_ids"] = second["position_ids"][..., seen:]
    return [first, second]


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """What attention modules of the language model are given."""
    given: list[dict[str, Any]] = []
    modules = [block.self_attn for block in adapter_of(model).blocks(model) if hasattr(block, "self_attn")]
    handles = [
        module.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
        for module in modules
    ]
    yield given
    for handle in handles:
        handle.remove()


def is_packed(positions: Tensor | None) -> bool:
    """What Transformers asks of the positions of one row: whether they are others than these that count up."""
    return positions is not None and not torch.equal(
        positions, positions.min() + torch.arange(positions.shape[-1]).expand_as(positions)
    )


@every_method
def test_no_layer_is_given_positions_with_gaps(pair) -> None:
    """In none of two turns with an image, whatever the rule for positions."""
    family, case = pair
    model = prune(tiny_vlm(family), case.config(tiny_vlm(family)))
    cache = new_cache(model)
    for inputs in turns(tiny_vlm(family)):
        with watched(model) as given:
            run(model, inputs, use_cache=True, **{CACHE_NAME: cache})
        assert given
        if not adapter_of(model).blocks(model)[0].reads_positions:  # else refused with FlashAttention
            assert not any(is_packed(kwargs["position_ids"]) for kwargs in given)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", [pair for pair in SUPPORTED if pair[1].method == "uniform"], ids=id_of)
def test_gpu_a_second_turn_with_an_image(pair) -> None:
    """Batch 1, as Transformers looks for packed samples there alone: no farther from SDPA than with all tokens.

    By a method that looks at nothing: in bfloat16 others may choose otherwise with another kernel.
    """
    pytest.importorskip("flash_attn")
    family, case = pair

    def second(attention: str, **fields: Any) -> Tensor:
        model = tiny_vlm(family)
        told = turns(model)
        model.set_attn_implementation({"text_config": attention})
        if fields:
            prune(model, case.config(model, **fields))
        model.to("cuda", torch.bfloat16)
        cache = new_cache(model)
        for inputs in told:
            moved = {name: tensor.to("cuda") for name, tensor in half(inputs, torch.bfloat16).items()}
            logits = run(model, moved, use_cache=True, **{CACHE_NAME: cache}).logits
        return logits.float()

    dense = (second("flash_attention_2") - second("sdpa")).norm()
    for positions in POSITIONS[adapter_of(tiny_vlm(family)).position_axes]:
        pruned = [second(attention, positions=positions) for attention in ("flash_attention_2", "sdpa")]
        assert (pruned[0] - pruned[1]).norm() <= 3 * dense
