"""FSDP2 with mixed precision casts whatever tensors a layer is given, inside containers too, of which every layer then
gets a copy. What layers tell each other, and sizes that are float32 for a reason, must not go that way."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import ViTForImageClassification

from hf_tokenprune import PruneConfig, prune, pruned, record
from hf_tokenprune.registry import get_adapter

from .decoder_families import ONCE, Case, collate, is_image, sample, tiny_vlm
from .families import first_tensor, images, inputs_for, tiny_model
from .test_contract_decoders import ONE_IMAGE, id_of
from .test_encoder_devices import configs


@pytest.fixture(autouse=True, scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process that talks to itself."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model: nn.Module, dtype: torch.dtype) -> None:
    """Every block is cast to ``dtype`` when it runs, with what it is given."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy, mesh = MixedPrecisionPolicy(param_dtype=dtype), dist.init_device_mesh("cpu", (1,))
    for block in get_adapter(model.config.model_type).blocks(model):  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ONCE, ids=id_of)
def test_decoders(pair: tuple[str, Case]) -> None:
    """In training, with recomputed layers: of the model's own dtype bit for bit, and in half precision at all."""
    family, case = pair
    losses: dict[Any, Any] = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        model = tiny_vlm(family).train()
        batch = collate([sample(model, ONE_IMAGE), sample(model, "..I..", 1)])
        prune(model, case.config(model))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if dtype is not None:
            shard(model, dtype)
        with record(model) as rec:
            loss = model(**batch, labels=batch["input_ids"].masked_fill(is_image(batch), -100)).loss
            loss.backward()
        losses[dtype] = loss.detach(), {name: kept.shape for name, kept in rec.kept.items()}
    assert torch.equal(losses[None][0], losses[torch.float32][0])
    assert losses[None][1] == losses[torch.bfloat16][1]
    assert losses[torch.bfloat16][0].isfinite()


@pytest.mark.parametrize("config", configs(), ids=lambda c: f"{c.method}-{c.where if hasattr(c, 'where') else ''}")
def test_encoders(config: PruneConfig) -> None:
    model = tiny_model("vit", ViTForImageClassification, num_hidden_layers=4)
    prune(model, config)
    inputs = inputs_for(model, images())
    with torch.no_grad():
        expected = first_tensor(model(**inputs))
        shard(model, torch.float32)
        assert torch.equal(first_tensor(model(**inputs)), expected)


@pytest.mark.slow
def test_accelerate_finds_every_block_by_the_name_of_its_class() -> None:
    """Its FSDP2 plugin looks for the first module of that name, and wraps what is an instance of that one's class."""
    utils = pytest.importorskip("accelerate.utils")
    prepare = pytest.importorskip("accelerate.utils.fsdp_utils").fsdp2_prepare_auto_wrap_policy
    models: list[tuple[Any, list[PruneConfig]]] = [(tiny_model("vit", ViTForImageClassification), configs())]
    for family, case in ONCE:
        model = tiny_vlm(family)
        models.append((model, [case.config(model)]))
    for model, found in models:
        blocks = get_adapter(model.config.model_type).blocks(model)
        plugin = utils.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[type(blocks[0]).__name__],
        )
        for config in found:
            with pruned(model, config):
                assert all(map(prepare(plugin, model), blocks)), (model.config.model_type, config)
