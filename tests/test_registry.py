"""The registry: names, misses, and what others add to it, from one file or through an entry point."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification

import hf_tokenprune
from hf_tokenprune import (
    PruneConfig,
    list_adapters,
    list_methods,
    prune,
    record,
    register_adapter,
    register_method,
    registry,
    unprune,
)
from hf_tokenprune.cost import cost
from hf_tokenprune.errors import ConfigError, TokenPruneError, UnsupportedModelError
from hf_tokenprune.registry import get_adapter, get_method

from .families import images, tiny_model

ROOT = Path(__file__).resolve().parents[1]

THIRD_PARTY_METHOD = '''
"""Keep the tokens with the largest norm: a whole method in one file."""
from dataclasses import dataclass

from hf_tokenprune import PruneConfig, register_method
from hf_tokenprune.signals import Reduction, Stage
from hf_tokenprune.tokens import num_to_keep, top_tokens

@register_method("largest_norm")
@dataclass(frozen=True)
class LargestNormConfig(PruneConfig):
    layer: int = 2
    keep_ratio: float = 0.5

    def stages_for(self, shape):
        return (LargestNormStage(self.layer, "after_block", self.keep_ratio),)

@dataclass(frozen=True)
class LargestNormStage(Stage):
    keep_ratio: float

    def num_kept(self, num_prunable):
        return num_to_keep(num_prunable, self.keep_ratio)

    def reduce(self, signals, n_keep):
        return Reduction(top_tokens(signals.tokens[:, signals.num_protected :].float().norm(dim=-1), n_keep))
'''


@pytest.fixture
def clean_registry() -> Iterator[None]:
    """Whatever a test registers is gone afterwards."""
    list_methods(), list_adapters()
    tables = [(table, dict(table)) for table in (registry._METHODS, registry._ADAPTERS)]
    modules = set(sys.modules)
    yield
    for table, before in tables:
        table.clear()
        table.update(before)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def largest_norm(clean_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[PruneConfig]:
    (tmp_path / "largest_norm_plugin.py").write_text(THIRD_PARTY_METHOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("largest_norm_plugin").LargestNormConfig


def test_lists_are_sorted_names_of_what_is_there() -> None:
    assert list_methods() == sorted(list_methods())
    assert list_adapters() == sorted(list_adapters())
    assert all(get_method(name).method == name for name in list_methods())
    folder = Path(hf_tokenprune.__file__).parent / "methods"
    files = {path.stem for path in folder.glob("*.py") if "@register_method(" in path.read_text()}
    assert {get_method(name).__module__.rsplit(".", 1)[1] for name in list_methods()} == files


def test_the_lists_are_copies() -> None:
    list_methods().clear()
    assert list_methods()


@pytest.mark.parametrize("name", list_methods())
def test_a_method_cannot_be_registered_twice(name: str, clean_registry: None) -> None:
    before = get_method(name)
    with pytest.raises(TokenPruneError, match=rf"method '{name}' is already registered .*{before.__name__}"):
        register_method(name)(type("Other", (), {}))
    assert get_method(name) is before


@pytest.mark.parametrize("name", list_adapters())
def test_an_adapter_cannot_be_registered_twice(name: str, clean_registry: None) -> None:
    before = get_adapter(name)
    with pytest.raises(TokenPruneError, match=rf"adapter '{name}' is already registered .*{type(before).__name__}"):
        register_adapter(name)(type("Other", (), {}))
    assert get_adapter(name) is before


@pytest.mark.parametrize("register", [register_method, register_adapter])
@pytest.mark.parametrize("name", ["", "Upper", "with-dash", "with space", "../x", "1st", "ünï", "a\n", "_a", None, 3])
def test_bad_names_are_refused_at_once(register, name) -> None:
    before = list_methods(), list_adapters()
    with pytest.raises(TokenPruneError) as error:
        register(name)
    assert repr(name) in str(error.value)
    assert "lower-case letters, digits and underscores" in str(error.value)
    assert (list_methods(), list_adapters()) == before


def test_forgotten_parentheses_are_refused() -> None:
    class Config:
        pass

    with pytest.raises(TokenPruneError, match=r"method name <class .*Config'>"):
        register_method(Config)


def test_a_miss_lists_the_choices() -> None:
    with pytest.raises(ConfigError) as error:
        get_method("fastv2")
    assert "method='fastv2'" in str(error.value)
    assert ", ".join(list_methods()) in str(error.value)
    with pytest.raises(UnsupportedModelError) as error:
        get_adapter("swin")
    assert "model_type='swin'" in str(error.value)
    assert ", ".join(list_adapters()) in str(error.value)


def test_a_method_from_one_file_works_end_to_end(largest_norm: type[PruneConfig], tmp_path: Path) -> None:
    assert "largest_norm" in list_methods()
    model = tiny_model("vit", ViTForImageClassification)
    pixels = images()
    with torch.no_grad():
        dense = model(pixels).logits
        states = model(pixels, output_hidden_states=True).hidden_states
        prune(model, {"method": "largest_norm", "keep_ratio": 0.25})
        with record(model) as rec:
            pruned_logits = model(pixels).logits
    norms = states[3][:, 1:].norm(dim=-1)  # what block 2 put out
    expected = [sorted(row.sort(descending=True).indices[:16].tolist()) for row in norms]
    assert rec.kept["2"].tolist() == expected
    assert [rec.tokens[i] for i in range(8)] == [65] * 3 + [17] * 5
    assert cost(model).ratio < 1
    hf_tokenprune.save_pretrained(model, tmp_path / "saved")
    loaded = hf_tokenprune.from_pretrained(tmp_path / "saved")
    assert PruneConfig.from_pretrained(tmp_path / "saved") == largest_norm(keep_ratio=0.25)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, pruned_logits)
        assert torch.equal(unprune(model)(pixels).logits, dense)


@pytest.mark.parametrize("layer", [-1, 8])
def test_a_method_that_does_not_check_its_layers_still_fails_loudly(
    largest_norm: type[PruneConfig], layer: int
) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    with pytest.raises(ConfigError, match=rf"prunes in blocks \[{layer}\].*0\.\.7, this model has 8 blocks"):
        prune(model, largest_norm(layer=layer))
    assert not hasattr(model.config, "prune_config")


def test_the_third_party_method_is_gone_again() -> None:
    assert "largest_norm" not in list_methods()
    with pytest.raises(ConfigError, match="no such method"):
        PruneConfig.for_method("largest_norm")


@pytest.mark.slow
def test_entry_points_register_and_a_broken_one_only_warns(tmp_path: Path) -> None:
    """With real package metadata, in a fresh interpreter: a good plugin, one that is missing, one that raises."""
    info = tmp_path / "some_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[hf_tokenprune]\nbroken = not_there_at_all\nraising = raising_plugin\ngood = good_plugin\n"
    )
    (tmp_path / "good_plugin.py").write_text(THIRD_PARTY_METHOD)
    (tmp_path / "raising_plugin.py").write_text(
        "from hf_tokenprune import RandomConfig, register_method\n"
        "@register_method('half_done')\nclass HalfDone(RandomConfig): pass\n1 / 0\n"
    )
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import hf_tokenprune
    assert not caught, caught
    methods, adapters = hf_tokenprune.list_methods(), hf_tokenprune.list_adapters()
    hf_tokenprune.list_methods(), hf_tokenprune.list_adapters()
assert "largest_norm" in methods and "random" in methods and "vit" in adapters, (methods, adapters)
assert hf_tokenprune.PruneConfig.for_method("largest_norm").keep_ratio == 0.5
for warning in caught:
    print(warning.message)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "plugin" in line]
    assert len(lines) == 2, done.stdout  # each once, though methods and adapters were both looked up
    assert any("'not_there_at_all'" in line and "ModuleNotFoundError" in line for line in lines)
    assert any("'raising_plugin'" in line and "ZeroDivisionError" in line for line in lines)
