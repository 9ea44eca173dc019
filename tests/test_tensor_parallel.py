"""Heads that are spread over processes (tensor parallelism): all of them keep what the whole model keeps."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from transformers import AutoModelForImageTextToText

from hf_tokenprune import prune, pruned, record
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import CASES, Case, collate, run, sample, tiny_vlm
from .test_contract_decoders import ONE_IMAGE

RANKS = 2


def compare(rank: int, folder: Path) -> None:
    """In each process: the whole model beside one of which it has a part of the heads, with every method."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    split = AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
    weight: Any = split.model.language_model.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] == weight.shape[0] // 2, "split"
    batch = collate([sample(whole, ONE_IMAGE), sample(whole, "..I..", 1)])
    valid = batch["attention_mask"].bool()
    for case in CASES:
        kept, logits = [], []
        for model in (whole, split):
            with pruned(model, case.config(whole)), record(model) as rec:
                logits.append(run(model, batch).logits[valid])
            kept.append({place: sets.tolist() for place, sets in rec.kept.items()})
        assert kept[0] == kept[1], (case, kept)
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    dist.destroy_process_group()


def test_all_ranks_keep_what_the_whole_model_keeps(tmp_path: Path) -> None:
    tiny_vlm("llava", text_config={"num_key_value_heads": 2}).save_pretrained(tmp_path)
    start_processes(compare, args=(tmp_path,), nprocs=RANKS, start_method="fork")


def test_heads_that_nobody_can_find_are_refused() -> None:
    """A projection that gives a part of the heads, and does not say who has the others."""
    model = tiny_vlm("llava")
    inputs = sample(model, ONE_IMAGE)
    prune(model, Case("fastv").config(model))
    attention = model.model.language_model.layers[2].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(attention, name)
        projection.weight = nn.Parameter(projection.weight[:16])
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :16])
    with pytest.raises(UnsupportedModelError, match=r"q_proj gives 2 of 4 heads .*such as divprune"):
        run(model, inputs)
