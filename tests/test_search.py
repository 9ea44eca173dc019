"""Searching schedules: what is measured is the model, what is solved is the best, and what stops goes on."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, ViTForImageClassification, ViTModel

from hf_tokenprune import (
    ATSConfig,
    ConfigError,
    ExactConfig,
    PruneConfig,
    PruneStateError,
    RandomConfig,
    SalienceMergeConfig,
    ToMeConfig,
    UnsupportedModelError,
    ZeroTPruneConfig,
    prune,
    pruned,
    record,
)
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR
from hf_tokenprune.engine import current_config, find_adapter
from hf_tokenprune.registry import get_method
from hf_tokenprune.search import Objective, Problem, SearchResult, Space, latency, search
from hf_tokenprune.search.journal import Journal
from hf_tokenprune.search.latency import Latency
from hf_tokenprune.search.space import Costs, macs_costs
from hf_tokenprune.search.strategies import FRACTIONS, STRATEGIES, distortion_table, solve, step_distortion
from hf_tokenprune.search.synthetic import pink_noise, synthesize

from .counted_time import count_time, work
from .decoder_families import tiny_vlm
from .families import first_tensor, images, inputs_for, methods_for, refused, snapshot, supported_classes, tiny_model

CLASSIFIERS = [pair for pair in supported_classes() if "ForImageClassification" in pair[1].__name__]
SEARCHABLE = [name for name in methods_for("vision") if get_method(name).with_counts is not PruneConfig.with_counts]
BATCHES = [{"pixel_values": pixels} for pixels in images(5).split(2)]


def model() -> ViTForImageClassification:
    return tiny_model("vit", ViTForImageClassification)


def kl(dense: Tensor, other: Tensor) -> Tensor:
    log_p, log_q = dense.double().log_softmax(1), other.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def geometric_mean(values: Tensor) -> float:
    return float((values.double() + 1e-6).prod() ** (1 / len(values)) - 1e-6)


# -- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSIFIERS, ids=lambda pair: pair[1].__name__)
@pytest.mark.parametrize("stride", [1, 3])
def test_starting_behind_unchanged_blocks_measures_the_whole_model(family: Any, stride: int) -> None:
    whole = tiny_model(*family)
    batches = [inputs_for(whole, pixels) for pixels in images(5).split(2)]
    before, calls = snapshot(whole), []
    first = next(m for m in find_adapter(whole).blocks(whole)[0].modules() if isinstance(m, torch.nn.LayerNorm))
    tokens = 5 * (find_adapter(whole).shape(whole).num_patches + find_adapter(whole).shape(whole).num_protected)
    objective = Objective(whole, batches, cache_bytes=-(-8 * tokens * 32 * 4 // stride))
    first.register_forward_hook(lambda *_: calls.append(1))
    for config in (
        RandomConfig(layers=(4, 6), keep_ratios=0.5),
        ToMeConfig(r=5, layers=(5,)),
        RandomConfig(layers=(0,), keep_ratios=0.5),
    ):
        if refused(whole, config):
            continue
        calls.clear()
        found = torch.cat(list(objective.values(config)))
        starts_at = (config.layers or (0,))[0]
        assert len(calls) == (0 if starts_at >= stride else len(batches)), "blocks in front are not run again"
        with torch.no_grad():
            dense = torch.cat([whole(**batch).logits for batch in batches])
            with pruned(whole, config):
                other = torch.cat([whole(**batch).logits for batch in batches])
        torch.testing.assert_close(found, kl(dense, other), atol=1e-6, rtol=1e-4)
    first._forward_hooks.clear()
    assert snapshot(whole) == before


def test_a_measurement_that_is_given_up_leaves_the_model_dense() -> None:
    whole = model()
    before, objective = snapshot(whole), Objective(whole, BATCHES)
    running = objective.values(RandomConfig())
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert snapshot(whole) == before


def test_goals() -> None:
    whole = model()
    with torch.no_grad():
        dense = whole(images(5)).logits
        with pruned(whole, RandomConfig(keep_ratios=0.2)):
            other = whole(images(5)).logits
    labels = torch.tensor([0, 1, 2, 3, 4])
    for goal, expected in (
        ("geometric_kl", kl(dense, other)),
        ("kl", kl(dense, other)),
        ("agreement", dense.argmax(1) != other.argmax(1)),
        ("accuracy", other.argmax(1) != labels),
    ):
        objective = Objective(whole, BATCHES, goal, labels)  # type: ignore[arg-type]
        found = torch.cat(list(objective.values(RandomConfig(keep_ratios=0.2))))
        torch.testing.assert_close(found, expected.double(), atol=1e-7, rtol=1e-4)
    with pytest.raises(ConfigError, match="needs labels"):
        Objective(whole, BATCHES, "accuracy")


# -- the space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHABLE)
@pytest.mark.parametrize("seed", range(3))
def test_a_schedule_is_its_config(method: str, seed: int) -> None:
    """Tokens leave as the schedule says, and cost what the space says."""
    whole = model()
    config = get_method(method)()
    shape = find_adapter(whole).shape(whole)
    space = Space(config, shape, macs_costs(config, shape), float("inf"))
    schedule = space.clamped(sorted(np.random.default_rng(seed).uniform(8, 64, shape.depth), reverse=True))
    found = space.config_of(schedule)
    assert cost(whole, found).pruned.macs == space.cost(schedule)
    assert PruneConfig.from_dict(found.to_dict()) == found
    prune(whole, found)
    with record(whole) as rec, torch.no_grad():
        whole(images(1))
    assert list(rec.tokens.values())[1:] == [count + 1 for count in schedule[:-1]]


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in SEARCHABLE for name in get_method(method).search_fields]
)
def test_choices_of_a_field_change_nothing_else_that_can_be_free(method: str, name: str) -> None:
    whole, config = model(), get_method(method)()
    shape = find_adapter(whole).shape(whole)
    found = config.choices(name, shape)
    assert len(found) > 1 and len(set(found)) == len(found)
    for other in found:
        assert PruneConfig.from_dict(other.to_dict()) == other
        assert all(getattr(other, each) == getattr(config, each) for each in config.search_fields if each != name)
        assert other.choices(name, shape) == found, "from every value one comes to all"


def test_zero_tprune_chooses_its_share_of_similar_tokens() -> None:
    """The same tokens leave; of them the similarity stage drops none, a quarter, half, three quarters, all."""
    whole = model()
    shape = find_adapter(whole).shape(whole)
    config = ZeroTPruneConfig(layers=(1, 4), keep_ratios=(0.75, 0.5), num_similar=8)  # 64 -> 42 -> 17
    found = config.choices("num_similar", shape)
    assert [each.num_similar for each in found] == [(0, 0), (6, 6), (11, 13), (17, 19), (22, 21)]  # at most half of 42
    for each in found:
        assert [stage.num_kept(n) for stage, n in zip(each.stages_for(shape), (64, 42), strict=True)] == [42, 17]


def test_zero_tprune_keeps_its_share_of_similar_tokens() -> None:
    whole = model()
    shape = find_adapter(whole).shape(whole)
    counts = {1: 50, 4: 30, 6: 20}
    assert ZeroTPruneConfig(num_similar=0).with_counts(shape, counts).num_similar == (0, 0, 0)
    only = ZeroTPruneConfig(keep_ratios=1.0, layers=(1,), num_similar=5).with_counts(shape, counts)
    assert only.num_similar == (14, 20, 10) and only.keep_ratios == (1.0, 1.0, 1.0)


# -- the exact solution ----------------------------------------------------------------------------------------------


def small_problem(budget: float, fewest_part: float = 0.0) -> Problem:
    """9 patches, 4 blocks, made-up costs: few enough schedules to try all of them."""
    shape = replace(find_adapter(model()).shape(model()), depth=4, image_size=(12, 12))
    config = ToMeConfig() if fewest_part else ATSConfig()
    space = Space(config, shape, Costs(99.0, 3.0, lambda layer, a, b: a + 0.5 * b + 0.02 * a * b), budget)
    problem = Problem.__new__(Problem)
    problem.space = space
    return problem


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("merging", [False, True])
def test_the_solution_is_the_best_of_all_schedules(seed: int, merging: bool) -> None:
    rng = np.random.default_rng(seed)
    table = np.cumsum(rng.random((4, 1 + len(FRACTIONS))) ** 3, axis=1)
    table[:, 0] = 0
    problem = small_problem(rng.uniform(38, 55), merging)
    space = problem.space

    def distortion(schedule: tuple[int, ...]) -> float:
        return sum(
            step_distortion(table[layer], a, b, 9) for layer, (a, b) in enumerate(itertools.pairwise((9, *schedule)))
        )

    possible = [
        schedule
        for schedule in itertools.product(range(1, 10), repeat=4)
        if all(
            b <= a and b >= space.fewest(layer, a) for layer, (a, b) in enumerate(itertools.pairwise((9, *schedule)))
        )
    ]
    best = min(distortion(schedule) for schedule in possible if space.cost(schedule) <= space.budget)
    # Costs are rounded up to parts of the budget: nothing that this leaves room for is better.
    almost = min(distortion(schedule) for schedule in possible if space.cost(schedule) <= space.budget * 0.998)
    found = solve(problem, table)
    assert found in possible and space.cost(found) <= space.budget
    assert best - 1e-9 <= distortion(found) <= almost + 1e-9


def test_an_impossible_budget_is_said() -> None:
    with pytest.raises(ConfigError, match="out of reach of tome"):
        solve(small_problem(8.0, 0.5), np.zeros((4, 1 + len(FRACTIONS))))


def test_the_distortion_of_a_step() -> None:
    row = np.array([0, 3, 5, 12.0])  # at 0, 1/8, 1/4, 1/2
    assert step_distortion(row, 64, 64, 64) == 0
    assert step_distortion(row, 64, 48, 64) == 5.0
    assert step_distortion(row, 32, 24, 64) == 10.0, "each token that is left stands for two"
    assert step_distortion(row, 64, 60, 64) == 1.5 and step_distortion(row, 64, 52, 64) == 4.0
    assert step_distortion(row, 64, 16, 64) > step_distortion(row, 64, 32, 64) == 12.0


def test_the_table_is_of_single_layers() -> None:
    whole = model()
    config = ToMeConfig()
    shape = find_adapter(whole).shape(whole)
    problem = Problem(Space(config, shape, macs_costs(config, shape), 1e9), Objective(whole, BATCHES))
    table = distortion_table(problem)
    assert table.shape == (8, 4) and (table[-1] == 0).all(), "nothing is behind the last block"
    part = BATCHES[0]  # more than a quarter of all
    with torch.no_grad():
        dense = whole(**part).logits
        with pruned(whole, ToMeConfig(r=32, layers=(3,))):
            other = whole(**part).logits
    assert problem.trials[11].distortion == pytest.approx(geometric_mean(kl(dense, other)), rel=1e-4)
    assert table[3, -1] == pytest.approx(max(trial.distortion for trial in problem.trials[9:12]))
    assert {trial.part for trial in problem.trials} == {len(part["pixel_values"]) / 5} and problem.best is None


# -- searches --------------------------------------------------------------------------------------------------------


def run(strategy: str = "dynamic", **options: Any) -> SearchResult:
    whole = options.pop("model", None) or model()
    dense = cost(whole).dense.macs
    options = {"macs": 0.7 * dense, "trials": None if strategy == "rule" else 6, **options}
    return search(whole, options.pop("config", SalienceMergeConfig()), BATCHES, strategy=strategy, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_stays_within_its_budget_and_is_no_worse_than_the_rule_where_it_starts_there(strategy: str) -> None:
    if strategy == "optuna":
        pytest.importorskip("optuna")
    whole = model()
    before = snapshot(whole)
    result = run(strategy, model=whole)
    assert snapshot(whole) == before
    assert cost(whole, result.config).pruned.macs == result.cost <= result.budget
    assert result.rule is not None and result.distortion <= result.rule[1]
    for config, distortion in ((result.config, result.distortion), result.rule):
        again = torch.cat(list(Objective(whole, BATCHES).values(config)))
        assert distortion == pytest.approx(geometric_mean(again), abs=1e-9), "what is reported is what is there"
    assert run(strategy).config == result.config, "the same seed"
    json.dumps(result.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_search_ends_as_an_uninterrupted_one(strategy: str, tmp_path: Path) -> None:
    if strategy == "optuna":
        pytest.importorskip("optuna")
    whole_search, seen = run(strategy), []

    def stop(trial: Any) -> None:
        seen.append(trial)
        if len(seen) == (1 if strategy == "rule" else 5):
            raise KeyboardInterrupt

    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(strategy, journal=journal, on_trial=stop)
    with journal.open("a") as file:
        file.write('{"key": "half a li')  # stopped while writing
        file.write("\n")
    resumed = run(strategy, journal=journal)
    assert resumed.config == whole_search.config and resumed.trials == whole_search.trials
    assert 0 < resumed.measured < whole_search.measured
    assert run(strategy, journal=journal).measured == 0


def test_what_follows_a_line_that_was_cut_off_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    Journal(file).write("whole", [1.0])
    with file.open("a") as out:
        out.write('{"key": "cut o')
    Journal(file).write("after", [2.0])
    again = Journal(file)
    assert (again.read("whole"), again.read("after"), again.known.keys()) == ([1.0], [2.0], {"whole", "after"})


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dynamic", "monte_carlo"])
def test_fields_are_chosen_by_what_they_lead_to(strategy: str) -> None:
    whole, macs = model(), 0.7 * cost(model()).dense.macs
    config = ZeroTPruneConfig()
    result = run(strategy, config=config, seed=1)
    assert result.settings["free"] == ["exact_last_block", "where", "num_similar"]
    measured = [trial.config for trial in result.trials]
    objective = Objective(whole, BATCHES)

    def distortion(candidate: PruneConfig) -> float:
        return geometric_mean(torch.cat(list(objective.values(candidate))))

    best, shape = replace(config, exact_last_block=True), find_adapter(whole).shape(whole)
    for name in ("where", "num_similar"):  # one after the other, each by its rule for the budget
        rules = [(each, each.for_budget(whole, macs=macs)) for each in (best, *best.choices(name, shape))]
        assert all(rule in measured for each, rule in rules if each.where != "queries")
        best = min(rules, key=lambda pair: distortion(pair[1]))[0]
    assert result.distortion <= distortion(best.for_budget(whole, macs=macs)) + 1e-9
    assert result.rule is not None and result.rule[0] == config.for_budget(whole, macs=macs), "as it was given"
    where = {trial.config.where for trial in result.trials}
    assert where == {"after_block", "mid_block"}


def test_a_field_that_was_set_is_not_chosen() -> None:
    config = ZeroTPruneConfig(num_similar=0)
    result = run(config=config, fixed=("where",))
    assert result.settings["free"] == ["exact_last_block"]
    assert {(trial.config.where, trial.config.num_similar) for trial in result.trials} >= {("after_block", 0)}
    assert all(not any(np.atleast_1d(trial.config.num_similar)) for trial in result.trials)
    held = run(config=config, free=())
    assert held.settings["free"] == [] and not any(trial.config.exact_last_block for trial in held.trials)
    asked = run(config=SalienceMergeConfig(), free=("similarity",), trials=12)
    assert {trial.config.similarity for trial in asked.trials} == {"per_head", "mean_key"}
    assert {trial.config.where for trial in asked.trials} == {"queries"}


@pytest.mark.parametrize("strategy", ["dynamic", "monte_carlo"])
@pytest.mark.parametrize("goal", ["geometric_kl", "kl"])
def test_the_least_mean_wins(goal: str, strategy: str) -> None:
    """Of all schedules that were run on all inputs, by a mean taken here."""
    result, objective = run(strategy, goal=goal), Objective(model(), BATCHES)
    means = []
    for trial in result.trials:
        if trial.whole and trial.feasible:
            of_inputs = torch.cat(list(objective.values(trial.config)))
            means.append(geometric_mean(of_inputs) if goal == "geometric_kl" else float(of_inputs.mean()))
            assert trial.distortion == pytest.approx(means[-1], rel=1e-4)
    assert len(means) > 3 and result.distortion == pytest.approx(min(means), rel=1e-4)


def test_a_search_for_fields_keeps_the_rule() -> None:
    result, macs = run("rule", config=ZeroTPruneConfig()), 0.7 * cost(model()).dense.macs
    shape, found = find_adapter(model()).shape(model()), result.config
    given = ZeroTPruneConfig(exact_last_block=True, where=found.where)
    rules = [each.for_budget(model(), macs=macs) for each in (given, *given.choices("num_similar", shape))]
    assert found in rules
    assert result.distortion == min(trial.distortion for trial in result.trials if trial.config in rules)
    with pytest.raises(ConfigError, match="trials=3 has no effect"):
        run("rule", trials=3)
    with pytest.raises(ConfigError, match="chooses free fields, and there are none"):
        run("rule", free=())


def test_hopeless_candidates_are_given_up() -> None:
    whole = model()
    config = RandomConfig()
    shape = find_adapter(whole).shape(whole)
    problem = Problem(Space(config, shape, macs_costs(config, shape), float("inf")), Objective(whole, BATCHES))
    good = problem.measure((64,) * 6 + (60, 60))
    bad = problem.measure((2,) * 8)
    assert good.whole and not bad.whole and problem.best == good
    assert problem.measure((2,) * 8, discard=False).whole


def test_clip_is_searched_by_what_it_says_of_classes() -> None:
    clip = tiny_model("clip", CLIPModel)
    classes = torch.nn.functional.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=-1)

    def logits(batch: Any) -> Tensor:
        features = clip.get_image_features(**batch).pooler_output
        return 20 * torch.nn.functional.normalize(features, dim=-1) @ classes.T

    config = ToMeConfig()
    if refused(clip, config):
        pytest.skip("blocks take no keyword arguments in this version of Transformers")
    result = search(clip, config, BATCHES, macs=0.7 * cost(clip).dense.macs, run=logits)
    with torch.no_grad():
        dense = logits({"pixel_values": images(5)})
        with pruned(clip, result.config):
            other = logits({"pixel_values": images(5)})
    assert result.distortion == pytest.approx(geometric_mean(kl(dense, other)), rel=1e-4)


def test_what_search_refuses() -> None:
    whole, macs = model(), 0.7 * cost(model()).dense.macs
    with pytest.raises(ConfigError, match="one of macs=, seconds= and speedup=, got none"):
        search(whole, ToMeConfig(), BATCHES)
    with pytest.raises(ConfigError, match="got macs=, speedup="):
        search(whole, ToMeConfig(), BATCHES, macs=macs, speedup=2.0)
    with pytest.raises(ConfigError, match="more than 0 and less than the dense"):
        search(whole, ToMeConfig(), BATCHES, macs=1e12)
    with pytest.raises(ConfigError, match="goal='loss': expected one of geometric_kl, kl, agreement, accuracy"):
        search(whole, ToMeConfig(), BATCHES, macs=macs, goal="loss")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected one of dynamic, coordinate"):
        search(whole, ToMeConfig(), BATCHES, macs=macs, strategy="guess")
    with pytest.raises(ConfigError, match=r"exact has no schedule.* such as 'salience_merge'"):
        search(whole, ExactConfig(), BATCHES, macs=macs)
    with pytest.raises(ConfigError, match="batches is empty"):
        search(whole, ToMeConfig(), [], macs=macs)
    with pytest.raises(ConfigError, match="out of reach"):
        search(whole, ToMeConfig(), BATCHES, macs=0.05 * macs)
    with pytest.raises(ConfigError, match=r"'r' is no field with a few values.*exact_last_block"):
        search(whole, ToMeConfig(), BATCHES, macs=macs, free=("r",))
    with pytest.raises(ConfigError, match="exact_last_block=False is all that works"):
        search(whole, ToMeConfig(restore=True), BATCHES, macs=macs, free=("exact_last_block",))
    with pytest.raises(ConfigError, match=r"fixed=\('where',\) has no effect beside free"):
        search(whole, ToMeConfig(), BATCHES, macs=macs, free=(), fixed=("where",))
    with pytest.raises(PruneStateError, match="unprune"):
        search(prune(model(), ToMeConfig()), ToMeConfig(), BATCHES, macs=macs)
    llava = tiny_vlm("llava")
    with pytest.raises(UnsupportedModelError, match="works on vision encoders"):
        search(llava, ToMeConfig(), BATCHES, macs=macs)


# -- inputs without images -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_made_images_are_what_the_model_is_sure_of() -> None:
    digits = ViTForImageClassification.from_pretrained(MODEL_DIR).train()
    before, weights = snapshot(digits), [p.clone() for p in digits.parameters()]
    size = find_adapter(digits).shape(digits)
    noise = pink_noise(6, size.num_channels, size.image_size, torch.Generator().manual_seed(3))
    made = synthesize(digits, 6, seed=3, batch_size=4)
    assert [len(batch["pixel_values"]) for batch in made] == [4, 2]
    assert snapshot(digits) == before and digits.training
    assert all(torch.equal(a, b) for a, b in zip(digits.parameters(), weights, strict=True))
    assert all(p.requires_grad and p.grad is None for p in digits.parameters())
    pixels = torch.cat([batch["pixel_values"] for batch in made])
    with torch.no_grad():
        sure, unsure = (digits.eval()(x).logits.softmax(1).amax(1).mean() for x in (pixels, noise))
    assert sure > unsure
    again = torch.cat([batch["pixel_values"] for batch in synthesize(digits, 6, seed=3, batch_size=4)])
    assert torch.equal(again, pixels)
    with pytest.raises(UnsupportedModelError, match="has no classes"):
        synthesize(tiny_model("vit", ViTModel), 2, steps=1)


def test_noise_has_the_spectrum_of_images() -> None:
    """Amplitudes fall with 1 / frequency: twice the frequency, half the amplitude."""
    pixels = pink_noise(64, 3, (64, 64), torch.Generator().manual_seed(0))
    assert pixels.mean().abs() < 1e-5 and pixels.std((2, 3)).sub(1).abs().max() < 1e-4
    amplitude = torch.fft.fft2(pixels).abs().mean((0, 1))[0]
    assert float(amplitude[4] / amplitude[8]) == pytest.approx(2, rel=0.1)
    assert float(amplitude[8] / amplitude[16]) == pytest.approx(2, rel=0.1)


# -- a budget in seconds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RandomConfig(), RandomConfig(where="queries"), ATSConfig()], ids=str)
def test_a_sum_over_blocks_is_the_whole(config: PruneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    count_time(monkeypatch)
    whole = model()
    shape = find_adapter(whole).shape(whole)
    timed = Latency(whole, 3, lambda config: macs_costs(config, shape), Journal())
    assert timed.dense == pytest.approx(work(lambda: whole(images(3))), rel=1e-9)
    space = Space(config, shape, timed.costs(config, 0.6 * timed.dense), float("inf"))
    schedule = (64, 50, 50, 40, 20, 20, 11, 11)
    with pruned(whole, space.config_of(schedule)):
        found = work(lambda: whole(images(3)))
    # Between two timed lengths a block is taken as linear; attention is not quite.
    assert space.cost(schedule) == pytest.approx(found, rel=0.02)
    assert first_tensor(whole(images(1))).shape == (1, 5)


@pytest.mark.slow
def test_a_search_for_time_meets_its_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    count_time(monkeypatch)
    whole = model()
    result = search(whole, RandomConfig(), BATCHES, speedup=1.5, latency_batch_size=2)
    dense = work(lambda: whole(images(2)))
    with pruned(whole, result.config):
        assert work(lambda: whole(images(2))) <= 1.03 * dense / 1.5

    def slower(forward: Any) -> float:
        return 2 * work(forward)

    exact = search(whole, SalienceMergeConfig(), BATCHES, speedup=1.5, trials=0, latency_batch_size=2)
    assert exact.budget == pytest.approx(dense / 1.5), "of the dense model, not of one with an exact last block"

    journal = tmp_path / "journal.jsonl"
    first = search(whole, RandomConfig(), BATCHES, speedup=1.5, trials=0, journal=journal)
    monkeypatch.setattr(latency, "seconds", slower)
    again = search(whole, RandomConfig(), BATCHES, speedup=1.5, trials=0, journal=journal)
    assert again.budget == first.budget and again.config == first.config, "times are read back too"
    with pytest.raises(ConfigError, match="batch_size=0"):
        search(whole, RandomConfig(), BATCHES, speedup=1.5, latency_batch_size=0)


@pytest.mark.parametrize("strategy", ["rule", "dynamic"])
def test_what_was_chosen_in_a_lucky_moment_is_fitted_to_the_budget(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_time(monkeypatch)
    whole, fitted, luck = model(), Latency.fitted, [0.8]

    def clock(forward: Any) -> float:
        config = current_config(whole)
        return work(forward) * (luck[-1] if config and config.method == "random" else 1)

    def later(*args: Any, **options: Any) -> Any:
        luck.append(1.0)
        return fitted(*args, **options)

    monkeypatch.setattr(latency, "seconds", clock)
    monkeypatch.setattr(Latency, "fitted", later)
    options = {"free": ("where",)} if strategy == "rule" else {"trials": 4}
    result = search(whole, RandomConfig(), BATCHES, speedup=1.5, latency_batch_size=2, strategy=strategy, **options)
    dense = work(lambda: whole(images(2)))
    with pruned(whole, result.config):
        assert work(lambda: whole(images(2))) == pytest.approx(dense / 1.5, rel=0.04)
    assert result.cost == pytest.approx(result.budget, rel=0.04) and result.cost <= result.budget
