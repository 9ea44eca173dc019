"""A folder that was saved into twice: what it says of pruning is true, or an error says which of two things to drop."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import DryRunFileInfo
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

import hf_tokenprune
from hf_tokenprune import (
    PruneConfig,
    RandomConfig,
    UniformConfig,
    disable_auto,
    enable_auto,
    list_methods,
    prune,
    unprune,
)
from hf_tokenprune.config import CONFIG_NAME
from hf_tokenprune.engine import current_config
from hf_tokenprune.errors import ConfigError, PruneStateError
from hf_tokenprune.registry import get_method
from hf_tokenprune.sharing.pretrained import choose_config

from .families import first_tensor, images, tiny_model

OLD, NEW = UniformConfig(layers=(2,), keep_ratios=0.5), RandomConfig(layers=(3,), keep_ratios=0.75)
Load = Callable[..., PreTrainedModel]


def vit() -> ViTForImageClassification:
    return tiny_model("vit", ViTForImageClassification)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(model(images()))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with a model that is pruned by ``OLD``, as this package saves it."""
    hf_tokenprune.save_pretrained(prune(vit(), OLD), tmp_path)
    return tmp_path


@pytest.fixture(params=["ours", "auto class", "model class"])
def load(request: pytest.FixtureRequest) -> Iterator[Load]:
    if request.param == "ours":
        yield hf_tokenprune.from_pretrained
        return
    enable_auto()
    yield {"auto class": AutoModelForImageClassification, "model class": ViTForImageClassification}[
        request.param
    ].from_pretrained
    disable_auto()


def by_trainer(model: PreTrainedModel, folder: Path) -> None:
    Trainer(model, TrainingArguments(folder / "run", report_to=[], use_cpu=True)).save_model(folder)


SAVERS: dict[str, Callable[[PreTrainedModel, Path], Any]] = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "trainer": by_trainer,
}
DENSE = {
    "never pruned": vit,
    "unpruned": lambda: unprune(prune(vit(), NEW)),
    "the same, unpruned": lambda: unprune(prune(vit(), OLD)),
}


@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)
def test_a_dense_model_saved_over_a_pruned_one(make: Any, old: Path, load: Load) -> None:
    make().save_pretrained(old)
    with pytest.raises(ConfigError) as error:
        load(old)
    message = str(error.value)
    for part in (str(old), f"its {CONFIG_NAME} says {OLD}", "is of a dense model", "delete it", "prune_config=..."):
        assert part in message
    assert current_config(load(old, prune_config=NEW)) == NEW
    (old / CONFIG_NAME).unlink()  # as it says
    if load is hf_tokenprune.from_pretrained:
        with pytest.raises(ConfigError, match="no prune config for"):
            load(old)
    else:
        assert torch.equal(run(load(old)), run(vit()))


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
def test_a_model_pruned_otherwise_saved_over_a_pruned_one(save: Any, old: Path, load: Load) -> None:
    save(prune(vit(), NEW), old)
    with pytest.raises(ConfigError) as error:
        load(old)
    key = f"the key prune_config of its config.json says {NEW}"
    for part in (str(old), f"its {CONFIG_NAME} says {OLD}", key, "delete it", "hf_tokenprune.save_pretrained"):
        assert part in str(error.value)
    assert current_config(load(old, prune_config=OLD)) == OLD
    (old / CONFIG_NAME).unlink()
    assert current_config(load(old)) == NEW


def test_saving_a_dense_model_with_this_package_says_what_to_delete(old: Path) -> None:
    with pytest.raises(PruneStateError, match=rf"with model\.save_pretrained, and delete the {CONFIG_NAME} in"):
        hf_tokenprune.save_pretrained(vit(), old)


def test_saving_with_this_package_leaves_nothing_old(old: Path, load: Load) -> None:
    hf_tokenprune.save_pretrained(prune(vit(), NEW), old)
    assert current_config(load(old)) == NEW


def test_saving_the_loaded_model_again_in_its_folder(old: Path, load: Load) -> None:
    load(old).save_pretrained(old)
    assert current_config(load(old)) == OLD


def test_a_file_that_was_put_beside_a_dense_model(tmp_path: Path, load: Load) -> None:
    vit().save_pretrained(tmp_path)
    NEW.save_pretrained(tmp_path)
    assert current_config(load(tmp_path)) == NEW


def test_a_config_object_of_the_caller_is_no_sign_of_anything(old: Path, load: Load) -> None:
    own = vit().config
    assert not hasattr(own, "prune_config")
    assert current_config(load(old, config=own)) == OLD


def test_on_the_hub_the_same(old: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the file is in a snapshot, beside the config.json of the same commit."""
    vit().save_pretrained(old)

    def download(repo: str, name: str, dry_run: bool = False, **kwargs: Any) -> Any:
        return DryRunFileInfo("0" * 40, 100, name, str(old / name), False, True) if dry_run else str(old / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("hf_tokenprune.config.os.path.isdir", lambda path: False)
    with pytest.raises(ConfigError, match="is of a dense model"):
        choose_config("owner/name", None, None, {})


@pytest.mark.parametrize("method", list_methods())
def test_the_file_of_a_model_is_that_of_its_config_and_says_where_else_it_is(method: str, tmp_path: Path) -> None:
    config = get_method(method)()
    file = config.save_pretrained(tmp_path, also_in_model=True)
    assert json.loads(file.read_text()) == {**config.to_dict(), "also_in": "config.json"}
    assert PruneConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("value", ["../config.json", None, True, ["config.json"]], ids=repr)
def test_nothing_else_may_stand_there(value: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"also_in={value!r}: expected 'config.json'")):
        PruneConfig.from_dict({**OLD.to_dict(), "also_in": value})
