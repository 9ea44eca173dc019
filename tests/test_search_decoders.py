"""Searching schedules of vision-language models: what is measured is what ``generate`` would say, what is counted is
what ``cost`` counts, and every method with a decoder can be searched."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedModel
from typer.testing import CliRunner

from hf_tokenprune import (
    ConfigError,
    DivPruneConfig,
    EvsConfig,
    FastVConfig,
    PruneConfig,
    PyramidDropConfig,
    StackConfig,
    TransPruneConfig,
    UnsupportedModelError,
    VisionZipConfig,
    prune,
    pruned,
    record,
)
from hf_tokenprune.benchmark.decoder import random_inputs
from hf_tokenprune.cli import app
from hf_tokenprune.cost import cost
from hf_tokenprune.search import AnswerObjective, SearchResult, Space, Trial, search
from hf_tokenprune.search.journal import Journal
from hf_tokenprune.search.latency import Latency
from hf_tokenprune.search.space import prefill_costs
from hf_tokenprune.search.strategies import STRATEGIES
from hf_tokenprune.signals import DecoderShape

from .counted_time import count_time, work
from .decoder_families import (
    FAMILIES,
    IMAGE,
    ONCE,
    SUPPORTED,
    Case,
    Inputs,
    adapter_of,
    built,
    collate,
    sample,
    tiny_vlm,
)
from .families import snapshot
from .forced_answers import NEW_TOKENS, generated, kl
from .llava_checkpoint import save_tiny_llava

PROMPTS = (".I..", "..Ii.", "...", ".I......", "I.")
STACK = StackConfig(
    (
        VisionZipConfig(dominant=12, contextual=4),
        TransPruneConfig(accumulate_layers=(1, 2), layers=(1, 3), keep_ratios=(0.6, 0.4)),
    )
)


def prompts(model: PreTrainedModel) -> list[Inputs]:
    videos = [".V.."] if "video" in adapter_of(model).placeholders else []
    return [sample(model, parts, seed) for seed, parts in enumerate([*PROMPTS, *videos])]


def batches_of(model: PreTrainedModel) -> list[Inputs]:
    """Ragged, padded on the left, in batches of two and three."""
    alone = prompts(model)
    return [collate(alone[:2]), collate(alone[2:])]


def answers_of_two_lengths(model: PreTrainedModel, inputs: Inputs) -> None:
    """Make a token that the model says the end of an answer."""
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -2]
    model.generation_config.eos_token_id = int(said)


# -- what is measured ------------------------------------------------------------------------------------------------


def searchable(family: str, case: Case, seed: int, text_tokens: int | None = None) -> tuple[Any, Space, tuple]:
    """A model, the space of a method on it, and a schedule in it."""
    model = tiny_vlm(family)
    config, shape = case.config(model), adapter_of(model).shape(model)
    space = Space(config, shape, prefill_costs(model, config, text_tokens), float("inf"))
    rng = np.random.default_rng(seed)
    removed = rng.random(len(space.places)) * 0.5 * space.num_tokens / len(space.slots)
    if config.one_stage:
        removed *= np.arange(len(space.places)) == rng.choice(space.slots)
    else:
        removed *= np.isin(np.arange(len(space.places)), space.slots)
    return model, space, space.clamped(list(space.num_tokens - removed.cumsum()))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), ONCE, ids=str)
def test_an_answer_is_measured_as_generate_would_run_it(family: str, case: Case) -> None:
    model, space, schedule = searchable(family, case, seed=0)
    config, alone = space.config_of(schedule), prompts(model)
    answers_of_two_lengths(model, alone[0])
    before = snapshot(model)  # now that Transformers has its own hooks
    objective = AnswerObjective(model, batches_of(model), new_tokens=NEW_TOKENS)
    found = torch.cat(list(objective.values(config)))
    objective.goal = "agreement"
    differs = torch.cat(list(objective.values(config)))

    dense = [generated(model, inputs) for inputs in alone]
    with pruned(model, config):
        other = [generated(model, inputs, answer)[1] for inputs, (answer, _) in zip(alone, dense, strict=True)]
    assert len({len(answer) for answer, _ in dense}) > 1, "answers of several lengths"
    torch.testing.assert_close(objective.dense, torch.cat([logits for _, logits in dense]), atol=1e-3, rtol=1e-3)
    expected = torch.stack([kl(a, b).mean() for (_, a), b in zip(dense, other, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert expected[2] < 1e-6 < expected[0] and expected[-1] > 1e-6, "only a prompt without an image is not pruned"
    wrong = [bool((a.argmax(1) != b.argmax(1)).any()) for (_, a), b in zip(dense, other, strict=True)]
    assert differs.tolist() == wrong
    assert snapshot(model) == before


def test_images_are_encoded_once() -> None:
    model = tiny_vlm("llava")
    batches, calls = batches_of(model), []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    objective = AnswerObjective(model, batches, new_tokens=NEW_TOKENS)
    assert len(calls) == 2, "once a batch, for answering and measuring"
    list(objective.values(DivPruneConfig(keep_ratio=0.4)))
    assert len(calls) == 2
    list(objective.values(VisionZipConfig(dominant=5, contextual=2)))
    assert len(calls) == 4, "a method that works in the tower needs it"
    handle.remove()
    assert "get_image_features" not in vars(model.model)


def test_answers_may_be_given() -> None:
    model = tiny_vlm("llava")
    config, alone = DivPruneConfig(keep_ratio=0.2), prompts(model)
    labels = torch.tensor([[5, 6, 7, -100], [8, -100, -100, -100], [9, 3, 4, 2], [1, 1, -1, -1], [2, 3, -1, -1]])
    with torch.no_grad():
        dense = [generated(model, inputs, row[row >= 0])[1] for inputs, row in zip(alone, labels, strict=True)]
        with pruned(model, config):
            other = [generated(model, inputs, row[row >= 0])[1] for inputs, row in zip(alone, labels, strict=True)]
    objective = AnswerObjective(model, batches_of(model), labels=labels)
    expected = torch.stack([kl(a, b).mean() for a, b in zip(dense, other, strict=True)])
    torch.testing.assert_close(torch.cat(list(objective.values(config))), expected, atol=1e-3, rtol=1e-3)
    right = torch.full((5, 2), -1)
    with pruned(model, config):
        for i, inputs in enumerate(alone):
            right[i] = generated(model, inputs)[0][:2]
    right[3, 1] = (right[3, 1] + 1) % IMAGE
    accuracy = AnswerObjective(model, batches_of(model), "accuracy", right)
    assert torch.cat(list(accuracy.values(config))).tolist() == [0, 0, 0, 1, 0]


def test_a_measurement_that_is_given_up_leaves_the_model_dense() -> None:
    model = tiny_vlm("llava")
    objective = AnswerObjective(model, batches_of(model), new_tokens=2)
    before = snapshot(model)
    running = objective.values(DivPruneConfig(keep_ratio=0.4))
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert snapshot(model) == before and "get_image_features" not in vars(model.model)


# -- the space -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), SUPPORTED, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_schedule_is_its_config(family: str, case: Case, seed: int) -> None:
    """Tokens leave as the schedule says, and cost what the space says."""
    model, space, schedule = searchable(family, case, seed, text_tokens=9)
    config = space.config_of(schedule)
    assert cost(model, config, text_tokens=9).pruned.macs == space.cost(schedule)
    assert PruneConfig.from_dict(config.to_dict()) == config
    inputs = random_inputs(model, 1, 9)
    assert isinstance(space.shape, DecoderShape)
    prune(model, config)
    with record(model) as rec, torch.no_grad():
        model(**inputs)
    entering = [count for place, count in zip(space.places, (space.num_tokens, *schedule), strict=False) if place >= 0]
    assert list(rec.tokens.values()) == [count + 9 for count in entering]


@pytest.mark.parametrize(
    "config",
    [
        TransPruneConfig(accumulate_layers=(1, 2), newlines="protect"),
        DivPruneConfig(newlines="protect"),
        StackConfig((VisionZipConfig(newlines="protect"), PyramidDropConfig(newlines="protect"))),
    ],
    ids=lambda config: config.method,
)
def test_protected_newlines_are_not_counted(config: PruneConfig) -> None:
    model = tiny_vlm("llava_next")
    shape = adapter_of(model).shape(model)
    space = Space(config, shape, prefill_costs(model, config, None), float("inf"))
    assert space.num_tokens == shape.image_tokens - shape.newline_tokens
    wanted = np.linspace(0.8, 0.3, len(space.places)) * space.num_tokens
    schedule = space.clamped(list(wanted) if len(space.slots) > 1 else [wanted[0]] * len(wanted))
    assert cost(model, space.config_of(schedule)).pruned.macs == space.cost(schedule)


def test_where_tokens_may_leave() -> None:
    model = tiny_vlm("llava")
    shape = adapter_of(model).shape(model)
    assert TransPruneConfig(accumulate_layers=(3, 5)).search_places(shape) == (3, 4, 5, 6), "something is accumulated"
    assert TransPruneConfig(alpha=0.0, accumulate_layers=()).search_places(shape) == tuple(range(7))
    everywhere = StackConfig((FastVConfig(layer=3), DivPruneConfig(), VisionZipConfig()))
    assert everywhere.search_places(shape) == (-2, -1, 3), "one stage stays where it is"
    found = everywhere.with_counts(shape, {-2: 20, -1: 10, 3: 4})
    assert found.stages[0].keep_ratio == 0.4 and found.stages[1].keep_ratio == 0.5
    zip_ = found.stages[2]
    assert (zip_.dominant, zip_.contextual) == (17, 3), "in the proportion of 54 to 10"
    only = everywhere.with_counts(shape, {-1: 10})
    assert only.stages[0].keep_ratio == 1 and only.stages[1].keep_ratio == 0.4
    late = TransPruneConfig(accumulate_layers=(1, 2, 5), layers=(2, 5), keep_ratios=(0.5, 0.4))
    assert late.with_counts(shape, {2: 20, 3: 10}).accumulate_layers == (1, 2)


def test_visionzip_has_a_rule_for_budgets() -> None:
    model = tiny_vlm("llava")
    config = VisionZipConfig(dominant=12, contextual=4).for_budget(model, keep=0.4)
    assert (config.dominant, config.contextual) == (8, 2)


# -- searches --------------------------------------------------------------------------------------------------------


def run(model: PreTrainedModel, config: PruneConfig, strategy: str = "dynamic", **options: Any) -> SearchResult:
    options = {"macs": 0.8 * cost(model).dense.macs, "trials": 4, "new_tokens": 3, **options}
    return search(model, config, batches_of(model), strategy=strategy, **options)


@pytest.mark.parametrize("case", [case for family, case in SUPPORTED if family == "llava"], ids=str)
def test_every_method_is_searched_within_its_budget(case: Case) -> None:
    model = tiny_vlm("llava")
    batches_of(model)
    before = snapshot(model)
    result = run(model, case.config(model), "coordinate")
    assert snapshot(model) == before
    assert cost(model, result.config).pruned.macs == result.cost <= result.budget
    assert result.rule is not None and result.distortion <= result.rule[1]
    json.dumps(result.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_searched_within_its_budget(family: str) -> None:
    model = tiny_vlm(family)
    result = run(model, DivPruneConfig())
    assert cost(model, result.config).pruned.macs == result.cost <= result.budget
    with pruned(model, result.config):
        pruned_answers = [generated(model, inputs)[0] for inputs in prompts(model)]
    assert len(pruned_answers) == result.settings["inputs"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "rule"])
def test_a_stack_is_searched_with_every_strategy_and_resumed(strategy: str, tmp_path: Path) -> None:
    if strategy == "optuna":
        pytest.importorskip("optuna")
    model, seen = tiny_vlm("llava"), []

    def stop(trial: Trial) -> None:
        seen.append(trial)
        if len(seen) == 3:
            raise KeyboardInterrupt

    whole, before = run(model, STACK, strategy), snapshot(model)
    assert cost(model, whole.config).pruned.macs == whole.cost <= whole.budget
    again = torch.cat(list(AnswerObjective(model, batches_of(model), new_tokens=3).values(whole.config)))
    assert whole.distortion == pytest.approx(float(again.mean()), abs=1e-9), "what is reported is what is there"
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(model, STACK, strategy, journal=journal, on_trial=stop)
    assert snapshot(model) == before and "get_image_features" not in vars(model.model)
    resumed = run(model, STACK, strategy, journal=journal)
    assert resumed.config == whole.config and resumed.trials == whole.trials
    assert 0 < resumed.measured < whole.measured


def test_one_number_is_decided_by_the_budget() -> None:
    model = tiny_vlm("llava")
    result = run(model, DivPruneConfig())
    one_more = DivPruneConfig(keep_ratio=result.config.keep_ratio + 1 / 25)
    assert cost(model, one_more).pruned.macs > result.budget >= result.cost, "as many tokens as the budget allows"
    assert len({trial.schedule for trial in result.trials}) == 1 and result.settings["strategy"] == "every_place"
    fastv = run(model, FastVConfig())
    layers = {next(i for i, count in enumerate(trial.schedule) if count < 25) for trial in fastv.trials}
    assert layers >= {0, 1, 2}, "every layer from which the budget can be reached"
    assert fastv.distortion == min(trial.distortion for trial in fastv.trials if trial.whole)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PyramidDropConfig(), DivPruneConfig(keep_ratio=0.5), STACK], ids=lambda c: c.method)
def test_a_search_for_time_meets_its_budget(config: PruneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    count_time(monkeypatch)
    model = tiny_vlm("llava")
    inputs = random_inputs(model, 2, 20)

    def prefill() -> None:
        model(**inputs, logits_to_keep=1)

    dense, before = work(prefill), snapshot(model)  # in this order: a first forward leaves hooks of Transformers' own
    result = search(
        model, config, batches_of(model), speedup=1.25, latency_batch_size=2, text_tokens=20, trials=2, new_tokens=2
    )
    assert snapshot(model) == before
    assert result.budget == pytest.approx(dense / 1.25, rel=1e-6)
    with pruned(model, result.config):
        assert 0.9 * result.budget <= work(prefill) <= 1.03 * result.budget
        assert result.cost == pytest.approx(work(prefill), rel=0.03), "a sum over layers is the whole"


@pytest.mark.parametrize("family", [name for name in FAMILIES if adapter_of(built(name)).position_axes > 1])
def test_layers_that_differ_take_parts_of_what_is_timed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count_time(monkeypatch)
    monkeypatch.setattr("hf_tokenprune.adapters.decoder._grids.USUAL_SIDE", 5)
    model, config = tiny_vlm(family), DivPruneConfig()
    untimed = partial(prefill_costs, model, text_tokens=9)
    latency = Latency(model, 1, untimed, Journal(), text_tokens=9)
    step = latency.costs(config, latency.dense / 2).step
    seconds, macs = ([of(layer, 25, 25) for layer in range(8)] for of in (step, untimed(config).step))
    assert sum(seconds) == pytest.approx(latency.dense - latency.fixed, rel=1e-6)
    assert [each / sum(seconds) for each in seconds] == pytest.approx([each / sum(macs) for each in macs])


def test_layers_that_the_config_names_need_not_exist() -> None:
    model = tiny_vlm("llava")
    result = run(model, TransPruneConfig(accumulate_layers=(1, 2, 3)), "coordinate")
    assert isinstance(result.config, TransPruneConfig) and result.config.layers[-1] < 7
    assert result.rule is None, "(6, 8, 11) are not layers of this model"


def test_what_is_refused() -> None:
    model = tiny_vlm("llava")
    batches = batches_of(model)

    def error(match: str, config: PruneConfig | None = None, given: Any = batches, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            search(model, config or DivPruneConfig(), given, **{"macs": 0.8 * cost(model).dense.macs, **options})

    error("speedup=0.9 means a budget of", macs=None, speedup=0.9)
    error("text_tokens=0", macs=None, speedup=1.5, text_tokens=0)
    error("latency_batch_size=4 has no effect on a budget of MACs", latency_batch_size=4)
    error("run has no effect on a vision-language model", run=lambda batch: batch)
    error("more than 0 and less than the dense", macs=1e15)
    error("out of reach", TransPruneConfig(accumulate_layers=(5,)), macs=0.3 * cost(model).dense.macs)
    error(
        "has no place to prune at on a model of 8 layers",
        TransPruneConfig(accumulate_layers=(7,), layers=(7, 9), keep_ratios=(0.5, 0.4)),
    )
    error(
        "leaves no layer of 0..6 to search",
        StackConfig((DivPruneConfig(), TransPruneConfig(accumulate_layers=(7,), layers=(9,), keep_ratios=(0.5,)))),
    )
    error("at most one method that prunes inside it", StackConfig((FastVConfig(), PyramidDropConfig())))
    error(r"evs prunes videos.* such as 'pyramiddrop'", EvsConfig())
    error("new_tokens=0: expected at least 1", new_tokens=0)
    error("text_tokens=0", text_tokens=0)
    error("accuracy' needs labels", goal="accuracy")
    error("padded on the right", given=[collate(prompts(model), side="right")])
    error("batches need input_ids, got pixel_values", given=[{"pixel_values": torch.zeros(1, 3, 20, 20)}])
    error(r"expected \(5, L\)", labels=torch.ones(4, 2, dtype=torch.long))
    error("at least one, and negative numbers behind", labels=torch.tensor([[1, -1, 2]] * 5))
    error("placeholders of images", labels=torch.tensor([[1, IMAGE]] * 5))
    error("new_tokens=3 has no effect", labels=torch.ones(5, 1, dtype=torch.long), new_tokens=3)
    headless = AutoModel.from_config(model.config)
    with pytest.raises(UnsupportedModelError, match="cannot answer"):
        search(headless, DivPruneConfig(), batches, macs=0.8 * cost(headless).dense.macs)


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("typer")
    model, photos = save_tiny_llava(tmp_path / "model"), tmp_path / "photos"
    photos.mkdir()
    rows = []
    for i in range(3):
        Image.radial_gradient("L").rotate(40 * i).convert("RGB").save(photos / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "question": "what is this", "answer": "red"}))
    (photos / "questions.jsonl").write_text("\n".join(rows))

    def ok(*args: object) -> str:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        return result.stdout

    budget = 0.8e-9 * cost(AutoModelForImageTextToText.from_pretrained(model), text_tokens=10).dense.macs
    common = ("search", model, photos, "-m", "divprune", "-g", budget, "--new-tokens", 2)
    data = json.loads(ok(*common, "--out", tmp_path / "asked", "--json"))
    assert data["cost"] <= data["budget"] and data["settings"]["inputs"] == 3 and data["settings"]["new_tokens"] == 2
    assert PruneConfig.from_pretrained(tmp_path / "asked").to_dict() == data["config"]
    again = json.loads(ok(*common, "--out", tmp_path / "asked", "--json"))
    assert again["config"] == data["config"] and again["measured"] == 0

    (photos / "questions.jsonl").unlink()
    (photos / "labels.csv").write_text("file,label\n" + "".join(f"{i}.png,0\n" for i in range(3)))
    text = ok(*common, "--out", tmp_path / "images", "--question", "what is this ?", "--question", "where ?")
    assert "6 prompts" in text

    for options, words in (
        (("--synthetic",), "--synthetic has no effect on a vision-language model"),
        (("--goal", "accuracy", "--question", "what"), "--goal accuracy is about classes"),
        (("--question", "what", "--prompt", "no place"), "has no {}"),
    ):
        result = CliRunner().invoke(app, [str(arg) for arg in (*common, "--out", tmp_path / "x", *options)])
        assert result.exit_code == 1 and words in result.output
