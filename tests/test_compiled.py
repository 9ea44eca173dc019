"""Pruned models under ``torch.compile``: how many graphs, when they are made anew, and the benchmark of them.

That every family compiles as one graph is in test_contract_families.py.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_tokenprune import ConfigError, DivPruneConfig, PruneConfig, RandomConfig, UnsupportedModelError, prune, unprune
from hf_tokenprune.benchmark import CompiledBenchmarkReport, benchmark
from hf_tokenprune.benchmark.cases import HEADER, Case, run_cases
from hf_tokenprune.benchmark.compiled import twin
from hf_tokenprune.benchmark.decoder import random_inputs
from hf_tokenprune.cli import app
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR

from .decoder_families import Case as DecoderCase
from .decoder_families import tiny_vlm
from .families import images, snapshot
from .test_contract_families import KINDS
from .test_export_shapes import classifier

ONE_OF_EACH_KIND = sorted({config.method for config in KINDS})
QUICK: dict[str, Any] = {"rounds": 3, "warmup": 0, "compile_mode": "default"}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """What is compiled, without generating code."""
    found: list[Callable[..., Any]] = []
    stock = partial(torch.compile, backend="eager")

    def compile_(run: Callable[..., Any], **options: Any) -> Any:
        found.append(run)
        return stock(run, **options)

    monkeypatch.setattr(torch, "compile", compile_)
    return found


@pytest.mark.slow
def test_dense_and_pruned_are_compiled_once_a_batch_size(compiled: list[Any]) -> None:
    model, config = classifier(None, 2), RandomConfig()
    model(images())  # the first forward of any model installs hooks of Transformers' own
    before = snapshot(model)
    report = benchmark(model, config, batch_sizes=(1, 2), **QUICK)
    assert isinstance(report, CompiledBenchmarkReport) and report.macs == cost(model, config)
    assert len(compiled) == 4
    for row in report.rows:
        assert row.dense_graphs == row.pruned_graphs == 1
        assert min(row.dense_compile_seconds, row.pruned_compile_seconds, row.dense_seconds, row.pruned_seconds) > 0
    assert json.loads(json.dumps(report.to_dict()))["environment"]["compile"] == "default"
    assert "1 -> 1" in report.summary() and "operations" not in report.summary()
    assert snapshot(model) == before


@pytest.mark.heavy
@pytest.mark.slow
def test_of_a_vision_language_model_the_prefill_is_compiled(compiled: list[Any]) -> None:
    """In several graphs, and generate could not be measured: it is told before."""
    model = tiny_vlm("llava", text_config={"num_hidden_layers": 1}, vision_config={"num_hidden_layers": 2})
    report = benchmark(model, DivPruneConfig(keep_ratio=0.4), batch_sizes=(1,), text_tokens=6, new_tokens=3, **QUICK)
    (row,) = report.rows
    assert row.pruned_graphs >= row.dense_graphs > 1 and len(compiled) == 2
    assert "6 text tokens in, 3 new tokens out, prefill; 3 interleaved rounds" in report.summary()
    with pytest.raises(UnsupportedModelError, match="cannot generate"):
        benchmark(model.model, RandomConfig(), **QUICK)


def test_unknown_modes() -> None:
    with pytest.raises(ConfigError, match="compile_mode='fast': expected one of default, reduce-overhead, or None"):
        benchmark(classifier(None, 2), RandomConfig(), **{**QUICK, "compile_mode": "fast"})
    with pytest.raises(ConfigError, match="engine='onnxruntime' runs exported files"):
        benchmark(classifier(None, 2), RandomConfig(), **QUICK, engine="onnxruntime")


def test_a_twin_is_pruned_alone_and_shares_the_weights() -> None:
    model = classifier(None, 2)
    expected, before = model(images()).logits, snapshot(model)
    other = prune(twin(model), RandomConfig())
    assert snapshot(model) == before and torch.equal(model(images()).logits, expected)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one is two


@pytest.mark.heavy
@pytest.mark.slow
def test_command_line_with_generated_code() -> None:
    options = ["bench", str(MODEL_DIR), "-m", "uniform", "-b", "1", "--rounds", "1", "--compile", "--json"]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    (row,) = json.loads(result.stdout)["uniform"]["rows"]
    assert row["dense_graphs"] == row["pruned_graphs"] == 1 and row["pruned_compile_seconds"] > 0


def test_a_case_that_fails_is_a_line_and_the_others_go_on() -> None:
    report = benchmark(classifier(None, 2), RandomConfig(), (1,), 1, 0)

    def full() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def refused() -> Any:
        raise UnsupportedModelError("no\nmore")

    told: list[str] = []

    def silent() -> Any:
        raise AssertionError

    cases = [Case("full", full), Case("refused", refused), Case("silent", silent), Case("fine", lambda: report)]
    lines = list(run_cases(cases, 60, told.append))
    assert told == ["full", "refused", "silent", "fine"]
    assert [line.note for line in lines] == ["out of memory", "UnsupportedModelError: no", "AssertionError: ", ""]
    assert lines[3].dense_seconds == report.rows[0].dense_seconds and lines[3].part == "forward"
    assert all(len(line.cells()) == len(HEADER) for line in lines)
    late = list(run_cases(cases, -1, told.append))
    assert len(told) == 4 and {line.note for line in late} == {"left out: the time is spent"}


@pytest.mark.slow
def test_a_compiled_encoder_follows_prune_and_unprune() -> None:
    """Blocks have another class then, which guards of the graph look at."""
    model, graphs = classifier(None, 2), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        dense = compiled(images()).logits
        prune(model, RandomConfig())
        pruned = compiled(images()).logits
        assert len(graphs) == 2 and not torch.equal(pruned, dense)
        assert torch.equal(pruned, model(images()).logits)
        assert torch.equal(compiled(images()).logits, pruned) and len(graphs) == 2
        unprune(model)
        assert torch.equal(compiled(images()).logits, dense) and len(graphs) == 2, "the former graph again"


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_batch_size_compiles_no_more_than_of_a_dense_model(name: str) -> None:
    counts = []
    for config in (None, PruneConfig.for_method(name)):
        model, graphs = classifier(config, 2), list[Any]()

        def backend(graph: torch.fx.GraphModule, _: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
        with torch.no_grad():
            for batch in (2, 3, 5):
                torch.testing.assert_close(compiled(images(batch)).logits, model(images(batch)).logits)
        counts.append(len(graphs))
    assert counts == [2, 2], "the second one is for every batch size"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["divprune", "transprune"])
def test_a_prefill_is_cut_at_the_entrance_and_nowhere_in_the_layers(name: str) -> None:
    """Other prompts of the same sizes compile nothing anew."""
    case, graphs = DecoderCase(name), list[int]()
    model = tiny_vlm("llava")
    prune(model, case.config(model))

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(sum("scaled_dot_product" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=backend)
    inputs = random_inputs(model, 2, 6)
    with torch.no_grad():
        first = compiled(**inputs, use_cache=True).logits
        assert max(graphs) == model.config.text_config.num_hidden_layers, "all layers of the decoder in one graph"
        torch.testing.assert_close(first, model(**inputs, use_cache=True).logits)
        made = len(graphs)
        inputs["input_ids"] = inputs["input_ids"].roll(1, 0)
        torch.testing.assert_close(compiled(**inputs, use_cache=True).logits, model(**inputs, use_cache=True).logits)
        assert len(graphs) == made
