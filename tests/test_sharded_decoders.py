"""Weights that are there only while their layer runs (offloading by layers, FSDP2): the result of the whole model, and
``prune`` and ``unprune`` leave the wrapping alone."""

import copy
import functools
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from hf_tokenprune import prune, record, unprune
from hf_tokenprune.adapters._swap import check_swappable
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import OF_TEXT, ONCE, Case, adapter_of, collate, run, sample, tiny_vlm
from .test_contract_decoders import ONE_IMAGE, id_of


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process that talks to itself."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def offload(model: PreTrainedModel) -> None:
    """All weights of a layer come together when it runs, and go when it has; those of the tower, which reads some
    outside the modules they belong to, too."""
    accelerate = pytest.importorskip("accelerate")
    adapter = adapter_of(model)
    whole = [*adapter.blocks(model), adapter.tower(adapter.inner(model))]
    names = sorted({type(module).__name__ for module in whole})
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=names)


def shard(model: PreTrainedModel) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    for block in adapter_of(model).blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@functools.cache
def runs_offloaded(family: str) -> bool:
    """Whether the dense model does: Idefics3 asks which of its pixels are all zero on the device of its weights."""
    if find_spec("accelerate") is None:
        return True  # the test says so
    model = tiny_vlm(family)
    offload(model)
    try:
        run(model, sample(model, ONE_IMAGE))
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("order", ["prune first", "prune last"])
@pytest.mark.parametrize(
    ("pair", "wrap"),
    [(pair, wrap) for pair in ONCE for wrap in (offload, shard) if wrap is shard or runs_offloaded(pair[0])],
    ids=lambda value: id_of(value) if isinstance(value, tuple) else value.__name__,
)
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


@pytest.mark.slow
@pytest.mark.parametrize("order", ["prune first", "prune last"])
@pytest.mark.parametrize("text", OF_TEXT)
def test_sharded_layers_stay_sharded(text: str, order: str, process_group: None) -> None:
    """``fully_shard`` makes a class of its own; prune and unprune change what is beneath it, and nothing else."""
    from torch.distributed.fsdp import FSDPModule

    model = tiny_vlm(OF_TEXT[text], text)
    inputs = sample(model, ONE_IMAGE)
    stock = [type(block) for block in adapter_of(model).blocks(model)]
    dense, config = run(model, inputs).logits, Case("divprune").config(model)
    steps: list[Callable[[PreTrainedModel], Any]] = [lambda model: prune(model, config), shard]
    for step in steps if order == "prune first" else reversed(steps):
        step(model)
    blocks: Any = adapter_of(model).blocks(model)
    shorter = run(model, inputs).logits
    for _ in range(2):
        assert all(isinstance(block, FSDPModule) for block in blocks)
        assert torch.equal(run(unprune(model), inputs).logits, dense)
        assert all(isinstance(block, FSDPModule) for block in blocks)
        assert [type(block).__bases__ for block in blocks] == [(FSDPModule, kind) for kind in stock]
        blocks[3].reshard()
        assert torch.equal(run(prune(model, config), inputs).logits, shorter)
    with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
        copy.deepcopy(blocks[0])


def test_other_classes_over_a_layer_are_refused(process_group: None) -> None:
    class Mixin:
        pass

    block = tiny_vlm("llava").model.language_model.layers[0]
    stock = type(block)
    block.__class__ = type("Other", (Mixin, stock), {})
    with pytest.raises(UnsupportedModelError, match=r"decoder layer 0 is a .*Other, expected LlamaDecoderLayer"):
        check_swappable(block, stock, "decoder layer 0")
