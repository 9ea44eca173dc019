"""The benchmark leaves the model as it was and reports what it says; how fast things are is not asserted."""

import copy
import json

import pytest
import torch
from transformers import PreTrainedModel, ViTForImageClassification

from hf_tokenprune import ConfigError, RandomConfig, ZeroTPruneConfig, prune, record
from hf_tokenprune.benchmark import benchmark
from hf_tokenprune.benchmark.timing import Arms, Repeats, Timing, peak_bytes
from hf_tokenprune.cost import cost

from .families import first_tensor, images, inputs_for, supported_classes, tiny_model


@pytest.mark.parametrize("family", supported_classes(), ids=lambda pair: pair[1].__name__)
@pytest.mark.parametrize("where", ["after_block", "mid_block"])
def test_report_and_model_afterwards(family, where: str) -> None:
    model = tiny_model(*family).train()
    before, threads = copy.deepcopy(model), torch.get_num_threads()
    config = ZeroTPruneConfig(where=where)
    report = benchmark(model, config, batch_sizes=(1, 2), rounds=3, warmup=0, threads=1)
    assert [row.batch_size for row in report.rows] == [1, 2] and report.environment["threads"] == 1
    assert report.macs == cost(before, config)
    for row in report.rows:
        assert row.dense_seconds > 0 and row.pruned_seconds > 0
        low, high = row.speedup_quartiles
        assert (row.speedup is None and low < 1 < high) or low <= row.speedup <= high
        assert row.dense_peak_bytes > 0 and row.pruned_peak_bytes > 0
        assert 0 < row.dense_operations < row.pruned_operations
    assert json.loads(json.dumps(report.to_dict()))["rounds"] == 3
    assert "of ideal" in report.summary()
    assert model.training and torch.get_num_threads() == threads
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    with torch.no_grad():
        a, b = (outputs(each.eval()) for each in (model, before))
    assert torch.equal(a, b)


def outputs(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(0)  # ViT-MAE shuffles patches
    return first_tensor(model(**inputs_for(model, images())))


def test_pruned_model_is_measured_with_its_own_config_and_stays_pruned() -> None:
    model = prune(tiny_model("vit", ViTForImageClassification), RandomConfig(keep_ratios=0.5))
    expected = cost(model)
    report = benchmark(model, batch_sizes=(1,), rounds=1, warmup=0)
    assert report.macs == expected
    with record(model) as rec, torch.no_grad():
        model(images())
    assert rec.tokens[7] < rec.tokens[0]


def test_other_dtype_is_measured_on_a_copy() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    report = benchmark(model, RandomConfig(), batch_sizes=(1,), rounds=1, warmup=0, dtype=torch.bfloat16)
    assert report.environment["dtype"] == "bfloat16"
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    "config", [ZeroTPruneConfig(), RandomConfig(where="mid_block")], ids=lambda config: config.where
)
def test_given_arm_drops_as_many_tokens(config) -> None:
    model = tiny_model("vit", ViTForImageClassification)
    arms = Arms(model, config)

    def lengths() -> list[int]:
        with record(model) as rec, torch.no_grad():
            model(images())
        return list(rec.tokens.values())

    assert arms.run("pruned", lengths) == arms.run("given", lengths)
    assert not any(stage.needs for stage in arms.stages["given"])


def test_arms_take_turns_in_changing_order_and_leave_the_model_dense() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    arms = Arms(model, RandomConfig())
    calls = []

    def measure() -> int:
        calls.append([type(state.stage).__name__ for state in arms.adapter.states(model) if state.stage])
        return len(calls)

    measured = arms.interleave(measure, Repeats(rounds=2, warmup=1, progress=False), "label")
    # Calls 1 to 3 are the warm-up, which does not count.
    assert measured == {"dense": [4, 9], "pruned": [5, 8], "given": [6, 7]}
    names = {"dense": [], "pruned": ["RandomStage"] * 3, "given": ["GivenStage"] * 3}
    assert [calls[number - 1] for number in (4, 5, 6)] == [names[arm] for arm in ("dense", "pruned", "given")]
    assert not arms.adapter.states(model)
    with pytest.raises(ZeroDivisionError):
        arms.run("pruned", lambda: 1 / 0)
    assert not arms.adapter.states(model)


def test_medians_are_of_ratios_within_a_round() -> None:
    timing = Timing.of([1.0, 8.0, 3.0], [2.0, 2.0, 2.0])
    assert timing == Timing(dense_seconds=3.0, pruned_seconds=2.0, speedup=1.5, speedup_quartiles=(1.0, 2.75))


def test_peak_memory_is_that_of_the_tensors_held_at_once() -> None:
    def run() -> None:
        a = torch.ones(1000)  # 4000 bytes
        del a
        b, c = torch.ones(1000), torch.ones(500)  # 6000 at once
        del b, c

    assert 6000 <= peak_bytes(run) < 6000 + 512, "some allocators round up"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"rounds": 0}, "rounds"),
        ({"threads": -1}, "threads"),
        ({"text_tokens": 3}, "text_tokens=3: has no effect on a vision encoder"),
        ({"new_tokens": 3}, "new_tokens=3: has no effect on a vision encoder"),
    ],
)
def test_bad_counts(kwargs, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        benchmark(tiny_model("vit", ViTForImageClassification), RandomConfig(), **kwargs)


def test_dense_model_needs_a_config() -> None:
    with pytest.raises(ConfigError, match="give benchmark a config"):
        benchmark(tiny_model("vit", ViTForImageClassification))
