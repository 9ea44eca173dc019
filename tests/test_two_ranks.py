"""Two processes that share one model: FSDP2, which gathers the weights of a layer when it runs, and tensor parallelism,
in which each has a part of the heads. What each rank says is what the whole model says, logits and generated tokens."""

import os
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    PreTrainedModel,
    ViTForImageClassification,
)

from hf_tokenprune import PruneConfig, pruned, record
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import ONCE, Case, Inputs, adapter_of, collate, run, sample, tiny_vlm
from .families import first_tensor, images, inputs_for, tiny_model
from .test_contract_decoders import ONE_IMAGE
from .test_encoder_devices import configs

RANKS = 2
OF_FAMILY: dict[str, list[Case]] = defaultdict(list)
for _family, _case in ONCE:
    OF_FAMILY[_family].append(_case)
pytestmark = pytest.mark.slow


def join(rank: int, folder: Path) -> None:
    """Make this process one of the ranks; none waits longer than the timeout for the others."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store, timeout = f"file://{folder / 'store'}", timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timeout)


def start(work: Any, folder: Path, *given: Any) -> None:
    start_processes(work, args=(folder, *given), nprocs=RANKS, start_method="fork")


def shard(model: PreTrainedModel) -> PreTrainedModel:
    """By FSDP2; each block is a unit, as accelerate and the Trainer make them."""
    from torch.distributed.fsdp import fully_shard

    mesh: Any = dist.init_device_mesh("cpu", (RANKS,))
    for block in adapter_of(model).blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters: Any = list(model.parameters())
    assert sum(p.to_local().numel() for p in parameters) < sum(p.numel() for p in parameters), "split"
    return model


def prompts(model: PreTrainedModel, rank: int) -> Inputs:
    """A padded batch with images, of other lengths and numbers on each rank."""
    own = [ONE_IMAGE, "..I.."], ["....I.......", ".I.", "..I......"]
    return collate([sample(model, prompt, i + 10 * rank) for i, prompt in enumerate(own[rank])])


def says(model: PreTrainedModel, batch: Inputs) -> dict[str, Any]:
    """Logits of what is no padding, what was kept, and what is generated from it."""
    with record(model) as rec:
        logits = run(model, batch).logits[batch["attention_mask"].bool()]
    kept = dict(rec.kept)
    tokens = model.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    return {"logits": logits, "kept": kept, "tokens": tokens}


def sharded_by_fsdp2(rank: int, folder: Path) -> None:
    join(rank, folder)
    for family, cases in OF_FAMILY.items():
        whole, split = tiny_vlm(family), shard(tiny_vlm(family))
        batch = prompts(whole, rank)  # each rank has its own
        for case in cases:
            config, found = case.config(whole), []
            for model in (whole, split):
                with pruned(model, config):
                    found.append(says(model, batch))
            try:
                torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
            except AssertionError as error:
                raise AssertionError(f"{family}, {case}") from error
    dist.destroy_process_group()


def test_fsdp2(tmp_path: Path) -> None:
    """Ranks have other prompts, so other numbers of tokens stay on each."""
    start(sharded_by_fsdp2, tmp_path)


def split_by_heads(rank: int, folder: Path) -> None:
    join(rank, folder)
    split_up = []
    for family, cases in OF_FAMILY.items():
        whole = AutoModelForImageTextToText.from_pretrained(folder / family).eval()
        try:
            split = AutoModelForImageTextToText.from_pretrained(folder / family, tp_plan="auto").eval()
        except (RuntimeError, ValueError):  # no plan, or one that stock Transformers cannot load these sizes by
            continue
        split_up.append(family)
        batch = prompts(whole, 0)  # the same on each rank
        for case in cases:
            config, found = case.config(whole), []
            for model in (whole, split):
                with pruned(model, config):
                    found.append(says(model, batch))
            assert all(torch.equal(kept, found[0]["kept"][place]) for place, kept in found[1]["kept"].items())
            assert torch.equal(found[1]["tokens"], found[0]["tokens"]), (family, case)
            # Sums over heads have another order.
            torch.testing.assert_close(found[1]["logits"], found[0]["logits"], atol=1e-4, rtol=1e-4)
    assert {"llava", "qwen2_5_vl"} <= set(split_up)
    dist.destroy_process_group()


def test_tensor_parallelism(tmp_path: Path) -> None:
    for family in OF_FAMILY:
        tiny_vlm(family, text_config={"num_key_value_heads": 2}).save_pretrained(tmp_path / family)
    start(split_by_heads, tmp_path)


def encoders(rank: int, folder: Path) -> None:
    """A ViT: FSDP2 gives what the whole model gives. Stock Transformers has no tp_plan for it; with one of its user's
    own, methods that read no attention do, and others, which would choose by other heads on each rank, say so."""
    join(rank, folder)
    whole = AutoModelForImageClassification.from_pretrained(folder)
    plan = {"vit.layers.*.attention." + name: "colwise" for name in ("q_proj", "k_proj", "v_proj")}
    plan["vit.layers.*.attention.o_proj"] = "rowwise"
    by_heads = AutoModelForImageClassification.from_pretrained(folder, tp_plan=plan)
    projection: Any = dict(by_heads.named_modules())["vit.layers.0.attention.q_proj"]
    assert projection.weight.to_local().numel() < projection.weight.numel(), "split"
    inputs, refused = inputs_for(whole, images()), set()

    def logits(model: nn.Module, config: PruneConfig) -> torch.Tensor:
        with torch.no_grad(), pruned(model, config):
            return first_tensor(model(**inputs))

    expected = [logits(whole, config) for config in configs()]
    for config, want in zip(configs(), expected, strict=True):
        try:
            torch.testing.assert_close(logits(by_heads, config), want)
        except UnsupportedModelError as error:
            assert "gives 2 of 4 heads here (tensor parallelism)" in str(error)
            refused.add(config.method)
    assert {"salience_merge", "tome", "evit"} <= refused and "random" not in refused
    split = shard(whole)
    for config, want in zip(configs(), expected, strict=True):
        assert torch.equal(logits(split, config), want), config
    dist.destroy_process_group()


def test_encoders(tmp_path: Path) -> None:
    tiny_model("vit", ViTForImageClassification, num_hidden_layers=4).save_pretrained(tmp_path)
    start(encoders, tmp_path)
