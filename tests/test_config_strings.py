"""Strings that stand for a config: names of methods and presets, paths, repositories; and what is said of others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import DryRunFileInfo
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import ViTForImageClassification
from typer.testing import CliRunner

import hf_tokenprune
from hf_tokenprune import (
    PruneConfig,
    RandomConfig,
    ToMeConfig,
    UniformConfig,
    list_methods,
    list_presets,
    prune,
    pruned,
)
from hf_tokenprune.cli import app
from hf_tokenprune.config import CONFIG_NAME, as_config
from hf_tokenprune.cost import cost
from hf_tokenprune.engine import current_config
from hf_tokenprune.errors import ConfigError
from hf_tokenprune.registry import get_method
from hf_tokenprune.sharing.pretrained import choose_config

from .families import tiny_model


def vit() -> ViTForImageClassification:
    return tiny_model("vit", ViTForImageClassification)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The Hub has ``owner/name``, with a config of ``uniform``; the calls are recorded."""
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, filename: str, dry_run: bool = False, **kwargs: Any) -> Any:
        calls.extend([] if dry_run else [{"repo_id": repo_id, **kwargs}])
        response = type("Response", (), {"headers": {}, "request": None})()
        if repo_id != "owner/name":
            raise RepositoryNotFoundError("404", response=response)
        if kwargs.get("revision") == "gone":
            raise RevisionNotFoundError("404", response=response)
        file = calls[0]["file"]
        return DryRunFileInfo("0" * 40, 100, filename, str(file), False, True) if dry_run else file

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


@pytest.mark.parametrize("method", list_methods())
def test_the_name_of_a_method_is_the_method(method: str, no_hub: list, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    RandomConfig(seed=9).save_pretrained(method)  # a folder of that name
    assert as_config(method) == get_method(method)()
    assert as_config(f"./{method}") == as_config(Path(method)) == RandomConfig(seed=9)
    assert not no_hub


@pytest.mark.parametrize("preset", list_presets())
def test_the_name_of_a_preset_is_the_preset(preset: str, no_hub: list, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    RandomConfig(seed=9).save_pretrained(preset)
    assert as_config(preset) == PruneConfig.preset(preset)
    assert as_config(f"./{preset}") == RandomConfig(seed=9)
    RandomConfig(seed=8).save_pretrained("runs/no_preset@1")
    assert as_config("runs/no_preset@1") == RandomConfig(seed=8)
    assert not no_hub


def test_every_place_that_takes_a_config_takes_a_name(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    places: dict[str, Callable[[], Any]] = {
        "prune": lambda: current_config(prune(vit(), "tome")),
        "from_pretrained": lambda: current_config(hf_tokenprune.from_pretrained(tmp_path, "tome")),
    }
    assert {name: place() for name, place in places.items()} == dict.fromkeys(places, ToMeConfig())
    told = CliRunner().invoke(app, ["info", str(tmp_path), "-c", "tome", "--json"])
    assert told.exit_code == 0 and "tome" in json.loads(told.stdout)
    model = vit()
    with pruned(model, "tome"):
        assert current_config(model) == ToMeConfig()
    assert cost(model, "tome").pruned == cost(model, ToMeConfig()).pruned


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tomee", ["'tomee'", "did you mean 'tome'?", "owner/name"]),
        ("xyzzy", ["'xyzzy'", "owner/name"]),
        ("tome/deit-tiny@0.86g", ["no such preset", "tome/deit-tiny@0.85g"]),
        ("/no/such/folder", ["'/no/such/folder'", "no such file or folder"]),
        ("./owner/name", ["'./owner/name'", "no such file or folder"]),
        ("~/name", ["'~/name'", "no such file or folder"]),
        ("./runs/a@1", ["'./runs/a@1'", "no such file or folder"]),
        ("a/b/c", ["'a/b/c'", "no such file or folder"]),
        (f"runs/{CONFIG_NAME}", ["no such file or folder"]),
    ],
)
def test_other_names_are_told_at_once(name: str, parts: list[str], no_hub: list) -> None:
    for take in (as_config, lambda value: prune(vit(), value)):
        with pytest.raises(ConfigError) as error:
            take(name)
        for part in parts:
            assert part in str(error.value)
        assert "Repo id" not in str(error.value)
    assert not no_hub, "the Hub was asked"


def test_reading_a_file_by_the_name_of_a_method_says_how_to_make_one() -> None:
    with pytest.raises(ConfigError, match=r"'tome' is a method: PruneConfig\.for_method\('tome'\)"):
        PruneConfig.from_pretrained("tome")


def test_a_class_in_place_of_a_config() -> None:
    with pytest.raises(ConfigError, match=r"ToMeConfig is a class of configs; give one of it: ToMeConfig\(\)"):
        prune(vit(), ToMeConfig)


def test_a_repository_and_one_that_is_not_there(no_hub: list, tmp_path: Path) -> None:
    no_hub.append({"file": str(UniformConfig().save_pretrained(tmp_path))})
    assert as_config("owner/name", token="t") == UniformConfig()
    assert no_hub[1:] == [{"repo_id": "owner/name", "subfolder": None, "token": "t"}]
    with pytest.raises(ConfigError, match="'owner/nome' is neither a local path nor a Hub repository"):
        as_config("owner/nome")
    with pytest.raises(ConfigError, match="the repository 'owner/name' has no revision='gone'"):
        as_config("owner/name", revision="gone")


OF_THE_USER = {"token": "t", "cache_dir": "/c", "local_files_only": True, "force_download": False}


@pytest.mark.parametrize("auto", [False, True], ids=["ours", "stock"])
def test_what_is_said_of_machine_and_user_holds_for_the_repository_of_the_config(
    auto: bool, no_hub: list, tmp_path: Path
) -> None:
    """``revision`` and ``subfolder`` are those of the checkpoint; the config's repository has its own."""
    vit().save_pretrained(tmp_path / "model" / "inner")
    no_hub.append({"file": str(UniformConfig().save_pretrained(tmp_path / "hub"))})
    arguments = {**OF_THE_USER, "revision": "v1", "subfolder": "inner", "prune_config": "owner/name"}
    if auto:
        hf_tokenprune.enable_auto()
    load = ViTForImageClassification.from_pretrained if auto else hf_tokenprune.from_pretrained
    try:
        model = load(tmp_path / "model", **arguments)
    finally:
        hf_tokenprune.disable_auto()
    assert current_config(model) == UniformConfig()
    assert no_hub[1:] == [{"repo_id": "owner/name", "subfolder": None, **OF_THE_USER}]


def test_an_argument_that_names_the_checkpoints_own_repository(no_hub: list, tmp_path: Path) -> None:
    no_hub.append({"file": str(UniformConfig().save_pretrained(tmp_path))})
    arguments = {"revision": "v1", "subfolder": "s", "token": "t"}
    choose_config("owner/name", "owner/name", None, arguments)
    assert no_hub[1:] == [{"repo_id": "owner/name", **arguments}] * 2


@pytest.mark.parametrize("path", ["/no/such/folder", "./nope", "a/b/c", "owner/nome"])
def test_a_checkpoint_that_is_not_there_is_no_malformed_repository(path: str) -> None:
    with pytest.raises(ConfigError, match=f"'{path}' is neither a local path nor a Hub repository"):
        hf_tokenprune.from_pretrained(path, "tome")


def test_a_config_alone_is_no_checkpoint(tmp_path: Path) -> None:
    UniformConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds a prune_config\.json and no model; give it beside a checkpoint"):
        hf_tokenprune.from_pretrained(tmp_path)
