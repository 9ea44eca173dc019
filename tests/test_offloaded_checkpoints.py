"""``from_pretrained(device_map=..., offload_folder=...)``: weights that lie on disk until they are needed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, ViTForImageClassification

from hf_tokenprune import PruneConfig, from_pretrained, prune, save_pretrained, unprune
from hf_tokenprune.engine import default_config

from .decoder_families import Case, adapter_of, one_for_each_place, run, sample, tiny_vlm
from .families import first_tensor, images, inputs_for, tiny_model
from .test_contract_decoders import ONE_IMAGE

pytest.importorskip("accelerate")
CASES = one_for_each_place(tiny_vlm("llava"))


def over_memory_and_disk(model: PreTrainedModel, all_on_disk: bool) -> dict[str, str]:
    """The second half of the decoder's layers, and the head, on disk; or all."""
    inner = adapter_of(model).inner(model)
    decoder = adapter_of(model).decoder(inner)
    blocks = list(adapter_of(model).blocks(model))
    parts = [part for part in inner.children() if part is not decoder]
    parts += [part for part in decoder.children() if not any(block in part.modules() for block in blocks)]
    names = {module: name for name, module in model.named_modules()}
    late = {*blocks[len(blocks) // 2 :], model.lm_head}
    whole = [*parts, *blocks, model.lm_head]
    return {names[part]: "disk" if all_on_disk or part in late else "cpu" for part in whole}


def check(model: PreTrainedModel, config: PruneConfig, says: Any, where: dict[str, str], folder: Path) -> None:
    dense, shorter = says(model), says(prune(model, config))
    save_pretrained(model, folder / "pruned")
    unprune(model)
    loaded = from_pretrained(folder / "pruned", device_map=where, offload_folder=folder / "disk")
    assert torch.device("meta") in {parameter.device for parameter in loaded.parameters()}, "some are on disk"
    assert torch.equal(says(loaded), shorter)
    assert torch.equal(says(unprune(loaded)), dense)
    assert torch.equal(says(prune(loaded, config)), shorter)
    save_pretrained(loaded, folder / "again")
    assert torch.equal(says(from_pretrained(folder / "again")), shorter)


@pytest.mark.slow
@pytest.mark.parametrize("all_on_disk", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decoders(case: Case, all_on_disk: bool, tmp_path: Path) -> None:
    model = tiny_vlm("llava")
    inputs = sample(model, ONE_IMAGE)
    where = over_memory_and_disk(model, all_on_disk)
    check(model, case.config(model), lambda model: run(model, inputs).logits, where, tmp_path)


def test_encoders(tmp_path: Path) -> None:
    model = tiny_model("vit", ViTForImageClassification).eval()
    inputs = inputs_for(model, images())

    @torch.no_grad()
    def says(model: PreTrainedModel) -> torch.Tensor:
        return first_tensor(model(**inputs))

    where = {"vit.embeddings": "cpu", "vit.layernorm": "disk", "classifier": "disk"}
    blocks = {f"vit.layers.{i}": "cpu" if i < 4 else "disk" for i in range(model.config.num_hidden_layers)}
    check(model, default_config(model), says, where | blocks, tmp_path)
