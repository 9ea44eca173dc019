"""``prune(model)``: what the checkpoint carries, else the method to take, on every model class of every family."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTForImageClassification

from hf_tokenprune import ConfigError, RandomConfig, UnsupportedModelError, prune, pruned, record, unprune
from hf_tokenprune.cost import cost
from hf_tokenprune.engine import WHAT_TO_TAKE, current_config, default_config
from hf_tokenprune.errors import DOCS
from hf_tokenprune.pictures import visualize

from .decoder_families import FAMILIES, tiny_vlm
from .families import images, inputs_for, supported_classes, tiny_model

CARRIED = RandomConfig(layers=(1,), keep_ratios=0.5)


def vit() -> ViTForImageClassification:
    return tiny_model("vit", ViTForImageClassification)


@pytest.mark.parametrize(("family", "cls"), supported_classes(), ids=lambda value: getattr(value, "__name__", value))
def test_every_encoder_has_one(family: str, cls: type[PreTrainedModel]) -> None:
    model = tiny_model(family, cls)
    try:
        config = default_config(model)
    except UnsupportedModelError as error:
        assert "pip install -U transformers" in str(error)
        pytest.skip("this Transformers is an older one, whose blocks cannot merge")
    assert config.method == "salience_merge"
    prune(model)
    assert current_config(model) == config
    with record(model) as rec, torch.no_grad():
        model(**inputs_for(model, images()))
    tokens = list(rec.tokens.values())
    assert tokens[-1] < tokens[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_vision_language_model_has_one(family: str) -> None:
    model = prune(tiny_vlm(family))
    assert current_config(model).to_dict().items() >= WHAT_TO_TAKE["decoder"][0].items()
    assert cost(model).pruned.macs < cost(model).dense.macs


def test_what_a_checkpoint_carries_comes_first(tmp_path: Path) -> None:
    prune(vit(), CARRIED).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert current_config(prune(model)) == CARRIED
    assert current_config(prune(unprune(model))).method == "salience_merge"  # unprune took the key away
    unprune(model).config.prune_config = {"method": "gone"}
    with pytest.raises(ConfigError, match="no such method"):
        prune(model)


def test_for_the_length_of_a_block() -> None:
    model = vit()
    with pruned(model):
        assert current_config(model).method == "salience_merge"
    assert current_config(model) is None
    prune(model, CARRIED)
    with pruned(model):
        assert current_config(model) == CARRIED
    assert current_config(model) == CARRIED


# -- models inside others, and other things that lead on ---------------------------------------------------------------


class Tuner(nn.Module):
    """As PEFT's ``LoraModel``: what it has not it asks of the model, so ``base_model`` is the headless model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)


class Peft(nn.Module):
    """As PEFT's ``PeftModel``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(model)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model


@pytest.mark.parametrize(
    "wrap",
    [
        Tuner,
        nn.DataParallel,
        lambda model: nn.DataParallel(Peft(model)),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
    ids=["tuner", "parallel", "parallel peft", "compiled parallel"],
)
def test_the_hint_leads_to_the_model_in_one_step(wrap: Any) -> None:
    inner = vit()
    with pytest.raises(UnsupportedModelError) as error:
        prune(wrap(inner), CARRIED)
    (way,) = re.findall(r"pass (\S+), or prune before wrapping", str(error.value))
    assert eval(way, {"model": wrap(inner)}) is inner


def test_a_family_without_adapter_leads_to_a_page_that_everybody_has() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError, match=re.escape(f"{DOCS}/add_a_family.md")):
        prune(model, CARRIED)
    assert DOCS.startswith("https://")


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_a_vision_language_model_are_refused(family: str) -> None:
    model = prune(tiny_vlm(family), "divprune")
    with pytest.raises(UnsupportedModelError, match=r"is a vision-language model: use sheet\(trace"):
        visualize(model, images())
