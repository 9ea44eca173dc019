"""Budgets from sizes alone, and the presets of the package."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

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
    pruned,
)
from hf_tokenprune.cost import config_for_macs, cost
from hf_tokenprune.engine import find_adapter, plan
from hf_tokenprune.registry import get_method

from .decoder_families import FAMILIES, small_size, tiny_vlm
from .families import methods_for, tiny_model

SCALABLE = [name for name in methods_for("vision") if get_method(name).scaled is not PruneConfig.scaled]
ROOT = Path(__file__).resolve().parents[1]
SHAPES = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "make_presets.py")))


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_for_images_of_another_size(family: str) -> None:
    model = tiny_vlm(family)
    size = small_size(model)
    dense = cost(model, image_size=size, text_tokens=9).dense.macs
    found = DivPruneConfig().for_budget(model, speedup=1.25, text_tokens=9, image_size=size)
    assert cost(model, found, image_size=size, text_tokens=9).pruned.macs <= dense / 1.25
    more = replace(found, keep_ratio=found.keep_ratio + 1 / find_adapter(model).shape(model, size).image_tokens)
    assert cost(model, more, image_size=size, text_tokens=9).pruned.macs > dense / 1.25, "no more would do"
    assert config_for_macs(model, more, dense / 1.25, text_tokens=9, image_size=size).keep_ratio < more.keep_ratio
    with pytest.raises(ConfigError, match="budgets of a vision encoder are for images of the checkpoint's own size"):
        ToMeConfig().for_budget(shell(), speedup=1.25, image_size=(448, 448))


@pytest.mark.parametrize("shape", SHAPES.VISION_LANGUAGE)
def test_presets_of_vision_language_models_prune_models_of_their_shape(shape: str) -> None:
    model = SHAPES.vision_language(shape)
    names = [name for name in list_presets() if f"/{shape}@keep" in name]
    assert len(names) == len(SHAPES.KEPT)
    for name in names:
        with pruned(model, name):
            report = cost(model)
        found = get_preset(name).provenance
        assert [found["gmacs"], found["dense_gmacs"]] == [round(m.macs / 1e9, 1) for m in (report.pruned, report.dense)]
        kept = float(name.split("@keep")[1])
        text = report.text_tokens
        assert report.pruned.layers[0].tokens_in - text == pytest.approx(kept * report.image_tokens, abs=1)
    with pytest.raises(UnsupportedModelError, match="divprune' works on vision-language models"):
        prune(shell(), names[0])


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


@pytest.mark.heavy
@pytest.mark.slow
def test_rule_presets_are_what_their_script_makes(tmp_path: Path) -> None:
    out = tmp_path / "presets.json"
    subprocess.run([sys.executable, ROOT / "examples" / "make_presets.py", out], check=True, capture_output=True)
    made = json.loads(out.read_text())
    packaged = json.loads(files("hf_tokenprune.presets").joinpath("presets.json").read_text())
    assert made.keys() == packaged.keys()
    kept = {name: entry for name, entry in packaged.items() if entry["provenance"]["source"] != "searched"}
    assert all(made[name] == entry for name, entry in kept.items())
