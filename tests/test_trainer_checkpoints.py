"""Checkpoints of the stock ``Trainer``: another pruning than before is said, and weights come back as documented."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, ViTForImageClassification

from hf_tokenprune import (
    ConfigError,
    PruneConfig,
    RandomConfig,
    UniformConfig,
    disable_auto,
    enable_auto,
    prune,
    unprune,
)
from hf_tokenprune.sharing.resume import PruningCallback, _said_in

from .families import tiny_model

pytest.importorskip("accelerate")
A, B = UniformConfig(layers=(0,), keep_ratios=0.5), RandomConfig(layers=(0,), keep_ratios=0.5)
DATA = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(4)]


def vit(config: PruneConfig | None = None) -> PreTrainedModel:
    model = tiny_model("vit", ViTForImageClassification, num_hidden_layers=2)
    return model if config is None else prune(model, config)


def trainer(model: PreTrainedModel, folder: Path, steps: int, **more: Any) -> Trainer:
    callbacks = more.pop("callbacks", None)
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        max_steps=steps,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        **more,
    )
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA, callbacks=callbacks)


def said(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in found if "pruned" in str(warning.message)]


@pytest.fixture(params=["callback", "enable_auto"])
def callbacks(request: pytest.FixtureRequest) -> Iterator[list[Any] | None]:
    if request.param == "callback":
        yield [PruningCallback]
        return
    enable_auto()
    yield None
    disable_auto()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PruneConfig | None], Path]:
    """The folder of a run of one step with a model that is pruned so; nothing was said in it."""

    @cache
    def folder(config: PruneConfig | None) -> Path:
        path = tmp_path_factory.mktemp("trained")
        assert said(lambda: trainer(vit(config), path, 1, callbacks=[PruningCallback]).train()) == []
        return path

    return folder


def words(config: PruneConfig | None) -> str:
    return "dense" if config is None else f"pruned by {config}"


@pytest.mark.slow
@pytest.mark.parametrize(("then", "now"), [(A, None), (A, B), (None, A), (A, A), (None, None)], ids=str)
def test_going_on_with_another_pruning_is_said(
    then: PruneConfig | None, now: PruneConfig | None, callbacks: list[Any] | None, trained: Any, tmp_path: Path
) -> None:
    shutil.copytree(trained(then), tmp_path, dirs_exist_ok=True)
    resumed = trainer(vit(now), tmp_path, 2, callbacks=callbacks)
    messages = said(lambda: resumed.train(resume_from_checkpoint=True))
    if then == now:
        assert messages == []
    else:
        (message,) = messages
        assert "goes on from checkpoint-1 with" in message
        assert f"it was {words(then)}, and is now {words(now)}" in message


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_a_checkpoint_that_lies_elsewhere(told: bool, trained: Any, tmp_path: Path) -> None:
    """``train`` tells no callback the path: what was saved with one says so itself, of other checkpoints in vain."""
    shutil.copytree(trained(B), tmp_path / "other" / "out")  # of the same step, and not gone on from
    where, out = trained(A) / "checkpoint-1", tmp_path / "other" / "out"
    (message,) = said(
        lambda: trainer(vit(), out, 2, callbacks=[PruningCallback]).train(resume_from_checkpoint=str(where))
    )
    assert f"it was pruned by {A}, and is now dense" in message
    shutil.copytree(where, tmp_path / "plain")
    state = json.loads((tmp_path / "plain" / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["PruningCallback"]
    (tmp_path / "plain" / "trainer_state.json").write_text(json.dumps(state))
    more = {"resume_from_checkpoint": str(tmp_path / "plain")} if told else {}
    again = trainer(vit(), tmp_path / "new", 2, callbacks=[PruningCallback], **more)
    messages = said(lambda: again.train(resume_from_checkpoint=str(tmp_path / "plain")))
    assert [str(tmp_path / "plain") in message for message in messages] == [True] * told
    assert (tmp_path / "new" / "checkpoint-2").is_dir(), "it saves what the former state did not have"


@pytest.mark.slow
def test_the_state_is_that_of_the_step(tmp_path: Path) -> None:
    """Of a model whose pruning changes in the middle of a run, also where two callbacks are there."""

    class Change(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 1:
                prune(unprune(model), B)

    trainer(vit(A), tmp_path, 2, callbacks=[PruningCallback(), Change(), PruningCallback()]).train()
    for step, config in enumerate((A, B), 1):
        go_on = trainer(vit(), tmp_path / "new", 3, callbacks=[PruningCallback]).train
        (message,) = said(partial(go_on, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}")))
        assert f"it was pruned by {config}, and is now dense" in message


@pytest.mark.parametrize("text", ["{", "[]", '{"a": "\xff"}'])
def test_a_config_that_cannot_be_read_is_named(text: str, trained: Any, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-1" / "config.json"
    file.parent.mkdir()
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=re.escape(str(file))):
        _said_in(file.parent)


def test_a_dense_model_whose_config_says_otherwise(callbacks: list[Any] | None, tmp_path: Path) -> None:
    model = vit()
    model.config.prune_config = A.to_dict()
    (message,) = said(lambda: trainer(model, tmp_path, 1, callbacks=callbacks).train())
    assert f"its config says that it is pruned by {A}" in message


def test_after_disable_auto_no_trainer_has_it(tmp_path: Path) -> None:
    enable_auto(), enable_auto(), disable_auto()
    handler = trainer(vit(), tmp_path, 1).callback_handler
    assert not [callback for callback in handler.callbacks if isinstance(callback, PruningCallback)]


# -- what docs/troubleshooting.md says of stock checkpoints ------------------------------------------------------------


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("config", [None, A], ids=["dense", "pruned"])
def test_the_best_model_is_loaded_with_from_pretrained(config: PruneConfig | None, tmp_path: Path) -> None:
    run = trainer(vit(config), tmp_path, 2, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
    kept: dict[str, dict[str, torch.Tensor]] = {}
    save = run._save_checkpoint

    def keep(model: PreTrainedModel, trial: Any) -> None:
        save(model, trial)
        kept[f"{tmp_path}/checkpoint-{run.state.global_step}"] = weights(model)

    run._save_checkpoint = keep
    run.train()
    best = run.state.best_model_checkpoint
    assert same(weights(ViTForImageClassification.from_pretrained(best)), kept[best])


@pytest.mark.parametrize("config", [None, A], ids=["dense", "pruned"])
def test_resuming_with_a_model_loaded_from_the_checkpoint(config: PruneConfig | None, tmp_path: Path) -> None:
    first = vit(config)
    trainer(first, tmp_path, 1).train()
    model = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
    if config is not None:
        prune(model)  # as the checkpoint says
    run = trainer(model, tmp_path, 2)
    run._load_from_checkpoint(str(tmp_path / "checkpoint-1"))  # what train(resume_from_checkpoint=...) begins with
    assert same(weights(model), weights(first))
