"""Training pruned models with the stock ``Trainer``: what an interrupted run, gradient checkpointing, the best model,
half precision, PEFT and generation come to, against runs without them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    CLIPForImageClassification,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

from hf_tokenprune import PruneConfig, UniformConfig, disable_auto, enable_auto, from_pretrained, prune, unprune
from hf_tokenprune.config_files import CONFIG_NAME
from hf_tokenprune.engine import current_config
from hf_tokenprune.sharing.resume import PruningCallback

from .decoder_families import Case, collate, sample, tiny_vlm
from .families import first_tensor, images, inputs_for, tiny_model
from .test_contract_families import MECHANICS, name_of
from .test_peft import said, with_lora

pytest.importorskip("accelerate")
CONFIG = UniformConfig(layers=(0,), keep_ratios=0.5)
MERGING = PruneConfig.for_method("tome", layers=(0,), r=8)
CONFIGS = pytest.mark.parametrize("config", [CONFIG, MERGING], ids=["dropping", "merging"])
DATA = [
    {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 3}
    for i in range(12)
]


def clip(config: PruneConfig = CONFIG, **fields: Any) -> PreTrainedModel:
    """Of a family whose checkpoints the ``Trainer`` reads back as it wrote them (docs/training.md)."""
    return prune(tiny_model("clip", CLIPForImageClassification, num_hidden_layers=2, **fields), config)


def trainer(model: Any, folder: Path, **fields: Any) -> Trainer:
    settings = {
        **{"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 1, "logging_steps": 1},
        **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2},
    }
    callbacks = fields.pop("callbacks", [PruningCallback])
    arguments = TrainingArguments(folder, **{**settings, **fields})
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:6], callbacks=callbacks)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("pair", MECHANICS, ids=name_of)
def test_training_reaches_every_parameter_of_the_dense_model(pair: Any) -> None:
    """Those of blocks behind which tokens leave too, and positions of patches that do."""
    family, config = pair
    model = tiny_model(*family).train()

    def learning() -> set[str]:
        model.zero_grad()
        found = first_tensor(model(**inputs_for(model, images(4)[:2])))
        # Random weights: squares behind a LayerNorm have the same sum whatever the parameters are.
        (found * torch.randn(found.shape[-1], generator=torch.Generator().manual_seed(0))).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        return {name for name, gradient in gradients.items() if gradient.abs().max() > 1e-6}

    dense = learning()
    prune(model, config)
    # Keys' biases shift all scores of a row alike: what they have is rounding.
    assert {name for name in dense - learning() if not name.endswith(("k_proj.bias", "key.bias"))} == set()


@pytest.mark.slow
@CONFIGS
def test_a_resumed_run_is_the_uninterrupted_one(config: PruneConfig, tmp_path: Path) -> None:
    whole = trainer(clip(config, attention_dropout=0.1), tmp_path / "whole")
    whole.train()
    parts = tmp_path / "parts"
    trainer(clip(config, attention_dropout=0.1), parts, max_steps=4, callbacks=[StopAtTwo]).train()
    assert sorted(path.name for path in parts.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    rest = trainer(clip(config, attention_dropout=0.1), parts)
    assert said(lambda: rest.train(resume_from_checkpoint=True)) == []
    assert losses(rest) == losses(whole) and len(losses(whole)) == 4
    check_same(weights(rest.model), weights(whole.model))
    assert current_config(rest.model) == config


class StopAtTwo(PruningCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.slow
@CONFIGS
def test_the_best_model_is_pruned_and_old_checkpoints_go(config: PruneConfig, tmp_path: Path) -> None:
    run = trainer(
        clip(config),
        tmp_path,
        **{"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2},
    )
    run.train()
    scores = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    assert run.evaluate()["eval_loss"] == min(scores.values())
    assert current_config(run.model) == config
    left = sorted(tmp_path.glob("checkpoint-*"))
    assert len(left) == 2 and run.state.best_model_checkpoint in map(str, left)
    for folder in left:
        loaded = from_pretrained(folder)
        assert current_config(loaded) == config
        evaluated = trainer(loaded, tmp_path / "again").evaluate()["eval_loss"]
        assert evaluated == scores[int(folder.name.removeprefix("checkpoint-"))]


@pytest.mark.slow
@CONFIGS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(config: PruneConfig, reentrant: bool, tmp_path: Path) -> None:
    plain = trainer(clip(config), tmp_path / "plain")
    plain.train()
    again = trainer(
        clip(config),
        tmp_path / "again",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    again.train()
    torch.testing.assert_close(torch.tensor(losses(again)), torch.tensor(losses(plain)))


CLASSIFIERS = [pair for pair in MECHANICS if pair[0][1].__name__.endswith("ForImageClassification")]


@pytest.mark.slow
@pytest.mark.parametrize("pair", CLASSIFIERS, ids=name_of)
def test_half_precision(pair: Any, tmp_path: Path) -> None:
    """Losses under bfloat16 are those of float32 but for its rounding."""
    family, config = pair
    found = []
    for bf16 in (False, True):
        run = trainer(prune(tiny_model(*family), config), tmp_path, bf16=bf16, max_steps=1, save_strategy="no")
        run.train()
        found.append(losses(run)[0])
    assert math.isclose(*found, rel_tol=0.1)


def test_predict_is_the_model_on_every_batch(tmp_path: Path) -> None:
    """And finds the names of labels that it finds of a dense model."""
    model = clip()
    run = trainer(model, tmp_path, label_names=["labels"], per_device_eval_batch_size=4)
    found = run.predict(DATA[:6])
    with torch.no_grad():
        expected = [
            model(torch.stack([item["pixel_values"] for item in part])).logits for part in (DATA[:4], DATA[4:6])
        ]
    assert torch.equal(torch.from_numpy(found.predictions), torch.cat(expected))
    assert found.label_ids.tolist() == [item["labels"] for item in DATA[:6]]
    for wrapped in (model, with_lora(model)):
        assert trainer(wrapped, tmp_path).label_names == trainer(unprune(clip()), tmp_path).label_names


# -- adapters of PEFT --------------------------------------------------------------------------------------------------


def vit(base: Path) -> PreTrainedModel:
    tiny_model("vit", ViTForImageClassification, num_hidden_layers=2).save_pretrained(base)
    return AutoModelForImageClassification.from_pretrained(base)


@pytest.mark.slow
@pytest.mark.parametrize("auto", [False, True], ids=["callback", "enable_auto"])
def test_checkpoints_of_adapters(auto: bool, tmp_path: Path) -> None:
    """They hold the config, load pruned, resume to the same losses, and say where they go on pruned otherwise."""
    if auto:
        enable_auto()
    fields: dict[str, Any] = {"callbacks": None if auto else [PruningCallback]}
    try:
        make = lambda: with_lora(prune(vit(tmp_path / "base"), CONFIG), modules_to_save=["classifier"])  # noqa: E731
        whole = trainer(make(), tmp_path / "whole", save_total_limit=3, **fields)
        whole.train()
        folders = sorted((tmp_path / "whole").glob("checkpoint-*"))
        assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
        assert all(PruneConfig.from_pretrained(folder) == CONFIG for folder in folders)
        assert current_config(from_pretrained(folders[-1])) == CONFIG
        rest = trainer(make(), tmp_path / "whole", **fields)
        assert said(lambda: rest.train(resume_from_checkpoint=str(folders[0]))) == []
        assert losses(rest) == losses(whole)
        check_same(weights(rest.model), weights(whole.model))
        dense = trainer(unprune(make()), tmp_path / "whole", **fields)
        messages = said(lambda: dense.train(resume_from_checkpoint=str(folders[0])))
        assert messages and all(f"was pruned by {CONFIG}" in message for message in messages)
        whole.save_model(str(tmp_path / "final"))  # which no callback hears of
        assert (tmp_path / "final" / CONFIG_NAME).exists() == auto
    finally:
        disable_auto()


# -- vision-language models: generation --------------------------------------------------------------------------------


def test_predict_with_generate(tmp_path: Path) -> None:
    """Rows are what ``model.generate`` gives for the batch, prompts and all, filled up behind."""
    model = tiny_vlm("llava")
    prune(model, Case("divprune").config(model))
    prompts = ["..I..", ".I..I...", ".I."]
    data = [sample(model, parts, seed) for seed, parts in enumerate(prompts)]
    rows = [{"index": i} for i in range(3)]

    def collator(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        batch = collate([data[row["index"]] for row in rows])
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -2:] = 5  # as long as the prompts: of labels of another length no decoder makes a loss
        return {**batch, "labels": labels}

    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        predict_with_generate=True,
        per_device_eval_batch_size=3,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        prediction_loss_only=False,
    )
    run = Seq2SeqTrainer(model, arguments, eval_dataset=rows, data_collator=collator)
    found = run.predict(rows, max_new_tokens=4, do_sample=False)
    expected = model.generate(**collate(data), max_new_tokens=4, do_sample=False)
    predictions = torch.from_numpy(found.predictions)
    assert torch.equal(predictions[:, : expected.shape[1]], expected)
    assert (predictions[:, expected.shape[1] :] == model.generation_config.pad_token_id).all()
    dense = unprune(model).generate(**collate(data), max_new_tokens=4, do_sample=False)
    assert not torch.equal(expected, dense), "pruning changes what is said"
