"""Weights that are there only while their layer runs (offloading by layers, FSDP2), and heads that are spread over
processes (tensor parallelism): the result of the whole model."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from hf_tokenprune import prune, record, unprune
from hf_tokenprune.adapters._swap import check_swappable
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import ONCE, TEXTS, Case, adapter_of, collate, run, sample, tiny_vlm
from .test_contract_decoders import ONE_IMAGE, id_of

each_once = pytest.mark.parametrize("pair", ONCE, ids=id_of)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process that talks to itself."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def offload(model: PreTrainedModel) -> None:
    """All weights of a layer come together when it runs, and go when it has."""
    accelerate = pytest.importorskip("accelerate")
    names = sorted({type(block).__name__ for block in adapter_of(model).blocks(model)})
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=names)


def shard(model: PreTrainedModel) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    for block in adapter_of(model).blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("order", ["prune first", "prune last"])
@pytest.mark.parametrize("wrap", [offload, shard], ids=lambda wrap: wrap.__name__)
@each_once
def test_weights_that_come_with_their_layer(
    pair: tuple[str, Case], wrap: Callable[[PreTrainedModel], None], order: str, process_group: None
) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = collate([sample(model, ONE_IMAGE), sample(model, "..I..", 1)])
    config = case.config(model)
    expected = run(prune(copy.deepcopy(model), config), inputs).logits
    steps: list[Callable[[PreTrainedModel], Any]] = [lambda model: prune(model, config), wrap]
    for step in steps if order == "prune first" else reversed(steps):
        step(model)
    with record(model) as rec:
        assert torch.equal(run(model, inputs).logits, expected)
    assert rec.kept


@pytest.mark.parametrize("order", ["prune first", "prune last"])
@pytest.mark.parametrize("text", TEXTS)
def test_sharded_layers_stay_sharded(text: str, order: str, process_group: None) -> None:
    """``fully_shard`` makes a class of its own; prune and unprune change what is beneath it, and nothing else."""
    from torch.distributed.fsdp import FSDPModule

    model = tiny_vlm("llava", text)
    inputs = sample(model, ONE_IMAGE)
    stock = [type(block) for block in adapter_of(model).blocks(model)]
    dense, config = run(model, inputs).logits, Case("stack").config(model)
    steps: list[Callable[[PreTrainedModel], Any]] = [lambda model: prune(model, config), shard]
    for step in steps if order == "prune first" else reversed(steps):
        step(model)
    blocks: Any = adapter_of(model).blocks(model)
    pruned = run(model, inputs).logits
    for _ in range(2):
        assert all(isinstance(block, FSDPModule) for block in blocks)
        assert torch.equal(run(unprune(model), inputs).logits, dense)
        assert all(isinstance(block, FSDPModule) for block in blocks)
        assert [type(block).__bases__ for block in blocks] == [(FSDPModule, kind) for kind in stock]
        blocks[3].reshard()
        assert torch.equal(run(prune(model, config), inputs).logits, pruned)
    with pytest.raises(NotImplementedError, match="FSDP does not support deepcopy"):
        copy.deepcopy(blocks[0])


def test_other_classes_over_a_layer_are_refused(process_group: None) -> None:
    class Mixin:
        pass

    block = tiny_vlm("llava").model.language_model.layers[0]
    stock = type(block)
    block.__class__ = type("Other", (Mixin, stock), {})
    with pytest.raises(UnsupportedModelError, match="decoder layer 0 is a .*Other, expected LlamaDecoderLayer"):
        check_swappable(block, stock, "decoder layer 0")


# -- tensor parallelism ----------------------------------------------------------------------------------------------


def spread_over_ranks(folder: Path) -> None:
    """In each of two processes: a model whose heads are spread over them keeps what the whole model keeps."""
    from transformers import AutoModelForImageTextToText

    dist.init_process_group("gloo")
    for name, case in [("llava", case) for family, case in ONCE if case.parts is None] + [("llava", Case("stack"))]:
        whole = AutoModelForImageTextToText.from_pretrained(folder / name).eval()
        split = AutoModelForImageTextToText.from_pretrained(folder / name, tp_plan="auto", dtype=torch.float32).eval()
        batch = collate([sample(whole, ONE_IMAGE), sample(whole, "..I..", 1)])
        config = case.config(whole)
        kept, logits = [], []
        for model in (prune(whole, config), prune(split, config)):
            with record(model) as rec:
                logits.append(run(model, batch).logits)
            kept.append({place: sets.tolist() for place, sets in rec.kept.items()})
        assert split.model.language_model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16, "not split"
        assert kept[0] == kept[1], (case, kept)
        valid = batch["attention_mask"].bool()
        torch.testing.assert_close(logits[1][valid], logits[0][valid], atol=1e-4, rtol=1e-4)
        step = {"input_ids": torch.tensor([[5], [6]])}
        assert run(split, step).logits.isfinite().all()
    dist.destroy_process_group()


def test_all_ranks_keep_what_the_whole_model_keeps(tmp_path: Path) -> None:
    tiny_vlm("llava", text_config={"num_key_value_heads": 2}).save_pretrained(tmp_path / "llava")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__, str(tmp_path)]
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


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


if __name__ == "__main__":
    spread_over_ranks(Path(sys.argv[1]))
