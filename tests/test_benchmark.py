"""The benchmark leaves the model as it was and reports what it says; how fast things are is not asserted."""

import copy
import json

import pytest
import torch

from hf_tokenprune import ConfigError, RandomConfig, ZeroTPruneConfig, prune, record
from hf_tokenprune.benchmark import GivenStage, _peak_bytes, benchmark
from hf_tokenprune.cost import cost

from .families import images, supported_classes, tiny_model


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
        assert row.speedup_quartiles[0] <= row.speedup <= row.speedup_quartiles[1]
        assert row.dense_peak_bytes > 0 and row.pruned_peak_bytes > 0
    assert json.loads(json.dumps(report.to_dict()))["rounds"] == 3
    assert "of ideal" in report.summary()
    assert model.training and torch.get_num_threads() == threads
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    with torch.no_grad():
        a, b = model.eval()(images()), before.eval()(images())
    assert all(torch.equal(x, y) for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True))


def test_pruned_model_is_measured_with_its_own_config_and_stays_pruned() -> None:
    model = prune(tiny_model(*supported_classes()[0]), RandomConfig(keep_ratios=0.5))
    expected = cost(model)
    report = benchmark(model, batch_sizes=(1,), rounds=1, warmup=0)
    assert report.macs == expected
    with record(model) as rec, torch.no_grad():
        model(images())
    assert rec.tokens[7] < rec.tokens[0]


def test_other_dtype_is_measured_on_a_copy() -> None:
    model = tiny_model(*supported_classes()[0])
    report = benchmark(model, RandomConfig(), batch_sizes=(1,), rounds=1, warmup=0, dtype=torch.bfloat16)
    assert report.environment["dtype"] == "bfloat16"
    assert next(model.parameters()).dtype == torch.float32


def test_given_arm_drops_as_many_tokens() -> None:
    model = tiny_model(*supported_classes()[0])
    from hf_tokenprune.engine import find_adapter, plan

    adapter = find_adapter(model)
    stages = plan(ZeroTPruneConfig(), adapter.shape(model))
    lengths = []
    for these in (stages, tuple(GivenStage(s.layer, s.where, s) for s in stages)):
        adapter.attach(model, these)
        with record(model) as rec, torch.no_grad():
            model(images())
        adapter.detach(model)
        lengths.append(list(rec.tokens.values()))
    assert lengths[0] == lengths[1]


def test_peak_memory_is_that_of_the_tensors_held_at_once() -> None:
    def run() -> None:
        a = torch.ones(1000)  # 4000 bytes
        del a
        b, c = torch.ones(1000), torch.ones(500)  # 6000 at once
        del b, c

    assert 6000 <= _peak_bytes(run) < 6000 + 512, "some allocators round up"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"batch_sizes": (0,)}, "batch_sizes"),
        ({"rounds": 0}, "rounds"),
        ({"threads": -1}, "threads"),
    ],
)
def test_bad_counts(kwargs, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        benchmark(tiny_model(*supported_classes()[0]), RandomConfig(), **kwargs)


def test_dense_model_needs_a_config() -> None:
    with pytest.raises(ConfigError, match="give benchmark a config"):
        benchmark(tiny_model(*supported_classes()[0]))
