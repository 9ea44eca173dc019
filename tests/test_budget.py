"""Budgets from sizes alone, and the presets of the package."""

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_tokenprune import (
    ConfigError,
    DivPruneConfig,
    EViTConfig,
    ExactConfig,
    PruneConfig,
    SalienceMergeConfig,
    ToMeConfig,
    UnsupportedModelError,
    get_preset,
    list_presets,
    prune,
)
from hf_tokenprune.cost import config_for_macs, cost
from hf_tokenprune.engine import find_adapter, plan
from hf_tokenprune.registry import get_method

from .decoder_families import tiny_vlm
from .families import methods_for, tiny_model

SCALABLE = [name for name in methods_for("vision") if get_method(name).scaled is not PruneConfig.scaled]
ROOT = Path(__file__).resolve().parents[1]


def shell(width: int = 192) -> ViTForImageClassification:
    """A DeiT without memory for its weights."""
    with torch.device("meta"):
        return ViTForImageClassification(
            ViTConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64, num_labels=1000)
        )


@pytest.mark.parametrize("method", SCALABLE)
@pytest.mark.parametrize("part", [0.9, 0.7])
def test_every_method_meets_a_budget_from_below(method: str, part: float) -> None:
    model = shell()
    dense = cost(model).dense.macs
    config = get_method(method)()
    by_macs = config.for_budget(model, macs=part * dense)
    assert 0.9 * part * dense < cost(model, by_macs).pruned.macs <= part * dense
    assert config.for_budget(model, speedup=1 / part) == by_macs
    assert type(by_macs) is type(config)


@pytest.mark.parametrize("method", SCALABLE)
def test_a_fraction_that_stays(method: str) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    shape = find_adapter(model).shape(model)
    found = get_method(method)().for_budget(model, keep=0.4)
    left = shape.num_patches
    for stage in plan(found, shape):
        left = stage.num_kept(left)
    assert 0.25 * shape.num_patches < left <= 0.4 * shape.num_patches


def test_merging_goes_to_later_blocks_the_less_it_merges() -> None:
    model = shell()
    first = {}
    shape = find_adapter(model).shape(model)
    for part in (0.88, 0.8, 0.7):
        tome = ToMeConfig().for_budget(model, macs=part * cost(model).dense.macs)
        layers = [stage.layer for stage in plan(tome, shape)]
        assert layers[-1] == 10, "nothing is saved behind the last block"
        first[part] = layers[0]
    assert first[0.88] > first[0.7] and list(first.values()) == sorted(first.values(), reverse=True)
    given = ToMeConfig(layers=(2, 3), r=0.2).for_budget(model, macs=0.9 * cost(model).dense.macs)
    assert given.layers == (2, 3), "layers that are given stay"
    assert EViTConfig().for_budget(model, speedup=1.3).layers is None, "dropping is spread as by default"


@pytest.mark.parametrize("config", [SalienceMergeConfig(), ToMeConfig()], ids=str)
def test_nearly_all_of_a_budget_is_used(config: PruneConfig) -> None:
    """What the rule leaves unused is accuracy given away: it had a step at which a tenth of the work was."""
    model = shell()
    dense = cost(model).dense.macs
    for part in np.arange(0.52, 0.9, 0.01):
        found = config.for_budget(model, macs=part * dense)
        assert 0.99 * part * dense <= cost(model, found).pruned.macs <= part * dense
        scaled = config_for_macs(model, config, part * dense)
        assert 0.99 * part * dense <= cost(model, scaled).pruned.macs <= part * dense


def test_a_language_model_is_budgeted_by_its_prefill() -> None:
    model = tiny_vlm("llava")
    dense = cost(model).dense.macs
    found = DivPruneConfig().for_budget(model, macs=0.8 * dense)
    assert cost(model, found).pruned.macs <= 0.8 * dense
    with pytest.raises(UnsupportedModelError):
        DivPruneConfig().for_budget(shell(), macs=1e9)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({}, "give one of macs, speedup and keep, got none"),
        ({"macs": 1e9, "keep": 0.5}, "got macs, keep"),
        ({"macs": 1e12}, "expected more than 0 and less than 1.254e"),
        ({"speedup": 0.5}, "speedup=0.5: expected more than 1"),
        ({"keep": 1.5}, "keep=1.5: expected more than 0 and less than 1"),
        ({"speedup": 50.0}, "out of reach"),
    ],
)
def test_what_a_budget_cannot_be(budget: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ToMeConfig().for_budget(shell(), **budget)
    with pytest.raises(ConfigError, match="exact has no schedule"):
        ExactConfig().for_budget(shell(), macs=1e9)


# -- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_is_a_config_with_its_origin(name: str) -> None:
    preset = get_preset(name)
    assert preset.config == PruneConfig.preset(name) and preset.config.method == name.split("/")[0]
    assert preset.provenance["source"] in ("searched", "rule", "published")


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_presets_meet_the_budget_in_their_name(size: str) -> None:
    model = shell({"tiny": 192, "small": 384, "base": 768}[size])
    names = [name for name in list_presets() if f"/deit-{size}@" in name]
    assert len(names) == 12
    for name in names:
        budget = float(name.split("@")[1].removesuffix("g"))
        macs = cost(model, PruneConfig.preset(name)).pruned.macs / 1e9
        assert 0.97 * budget < macs <= budget
        assert macs == pytest.approx(get_preset(name).provenance["gmacs"], abs=1e-4)


def test_a_searched_preset_prunes() -> None:
    preset = get_preset("salience_merge/deit-tiny@0.85g")
    assert preset.provenance["source"] == "searched" and preset.provenance["inputs"] > 0
    assert preset.provenance["distortion"] <= preset.provenance["distortion_of_the_rule"]
    assert isinstance(preset.config, SalienceMergeConfig)
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(hidden_size=48, intermediate_size=96, num_attention_heads=3, num_labels=4)
    )
    prune(model.eval(), preset.config)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).logits.isfinite().all()


def test_a_preset_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"no such preset \(close: .*salience_merge/deit-tiny@0.85g"):
        PruneConfig.preset("salience_merge/deit-tiny@0.9g")


def test_rule_presets_are_what_their_script_makes(tmp_path: Path) -> None:
    out = tmp_path / "presets.json"
    subprocess.run([sys.executable, ROOT / "examples" / "make_presets.py", out], check=True, capture_output=True)
    made = json.loads(out.read_text())
    packaged = json.loads(files("hf_tokenprune.presets").joinpath("presets.json").read_text())
    assert made.keys() == packaged.keys()
    kept = {name: entry for name, entry in packaged.items() if entry["provenance"]["source"] != "searched"}
    assert all(made[name] == entry for name, entry in kept.items())
