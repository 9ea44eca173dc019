"""The benchmark of vision-language models: what it feeds, which arms it compares, what it reports, what it leaves.

How fast things are is not asserted.
"""

import copy
import json

import pytest
import torch

from hf_tokenprune import DivPruneConfig, RandomConfig, StackConfig, prune, record
from hf_tokenprune.benchmark import benchmark
from hf_tokenprune.benchmark.decoder import GenerationBenchmarkReport, GenerationRow, TokenClock, random_inputs
from hf_tokenprune.benchmark.timing import Arms, GivenStage, Timing
from hf_tokenprune.cost import cost
from hf_tokenprune.engine import find_adapter
from hf_tokenprune.errors import ConfigError, UnsupportedModelError

from .decoder_families import FAMILIES, IMAGE, SUPPORTED, VIDEO, Case, run, small_size, stages_of, tiny_vlm
from .families import snapshot

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
QUICK = {"rounds": 2, "warmup": 1, "text_tokens": 6, "new_tokens": 3}


@EVERY_FAMILY
def test_inputs_are_those_of_a_processor(family: str) -> None:
    """The stock model takes them: it compares placeholders with features, and crops with sizes of images."""
    model = tiny_vlm(family).to(torch.bfloat16)
    size = small_size(model)
    shape = find_adapter(model).shape(model, size)
    inputs = random_inputs(model, 3, 5, size)
    assert run(model, inputs).logits.shape[:2] == (3, shape.image_tokens + 5)
    is_image = inputs["input_ids"] == IMAGE
    assert is_image.sum(1).tolist() == [shape.image_tokens] * 3
    assert is_image[:, 2:-3].all(), "two tokens of text, the image, three tokens of text"
    assert not (inputs["input_ids"] == VIDEO).any()
    assert inputs["attention_mask"].all() and inputs["attention_mask"].shape == is_image.shape
    assert inputs["pixel_values"].dtype == torch.bfloat16
    again = random_inputs(model, 3, 5, size)
    assert all(torch.equal(again[name], tensor) for name, tensor in inputs.items())


@pytest.mark.parametrize("size", [(18, 18), (10, 30), (40, 9)])
def test_inputs_of_other_image_sizes(size: tuple[int, int]) -> None:
    model = tiny_vlm("llava_next")
    inputs = random_inputs(model, 2, 4, size)
    assert inputs["image_sizes"].tolist() == [list(size)] * 2
    shape = find_adapter(model).shape(model, size)
    assert inputs["pixel_values"].shape[1] == shape.tower_images
    assert run(model, inputs).logits.shape[1] == shape.image_tokens + 4


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), SUPPORTED, ids=str)
def test_given_arm_drops_as_many_tokens_and_looks_at_none(family: str, case: Case) -> None:
    model = tiny_vlm(family)
    stages = stages_of(model, case.config(model))
    arms, inputs = Arms(model, case.config(model)), random_inputs(model, 2, 6, small_size(model))
    lengths = {}
    for arm in ("pruned", "given"):

        def tokens() -> list[int]:
            with record(model) as rec:
                run(model, inputs)
            return list(rec.tokens.values())

        lengths[arm] = arms.run(arm, tokens)
    assert lengths["pruned"] == lengths["given"]
    for stage, given in zip(stages, arms.stages["given"], strict=True):
        assert not given.needs and not given.observes and given.text_rows is None
        for name in ("layer", "where", "positions", "newlines", "budget", "counts_from", "name"):
            assert getattr(given, name) == getattr(stage, name)


@pytest.mark.slow
@EVERY_FAMILY
def test_report_and_model_afterwards(family: str) -> None:
    model = tiny_vlm(family).train()
    size = small_size(model)
    run(model, random_inputs(model, 1, 4, size))  # the first forward of any model installs hooks of Transformers' own
    before, tensors, threads = snapshot(model), copy.deepcopy(model.state_dict()), torch.get_num_threads()
    config = DivPruneConfig(keep_ratio=0.4)
    report = benchmark(model, config, batch_sizes=(1, 2), threads=1, image_size=size, **QUICK)
    assert isinstance(report, GenerationBenchmarkReport)
    assert [row.batch_size for row in report.rows] == [1, 2]
    assert report.rounds == 2 and report.environment["threads"] == 1
    assert report.macs == cost(model, config, image_size=size, text_tokens=6, new_tokens=3)
    for row in report.rows:
        for timing in (row.prefill, row.decode, row.end_to_end):
            assert timing.dense_seconds > 0 and timing.pruned_seconds > 0
            assert timing.speedup is timing.speedup_quartiles is None, "two rounds tell nothing from noise"
        assert row.decision_share is row.decision_quartiles is None
        assert 0 < row.dense_operations < row.pruned_operations
        assert row.dense_peak_bytes > 0 and row.pruned_peak_bytes > 0  # often both are the vision tower's
    assert model.training and torch.get_num_threads() == threads
    assert snapshot(model) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_pruned_model_is_measured_with_its_own_config_and_stays_pruned() -> None:
    model = prune(tiny_vlm("llava"), RandomConfig(keep_ratios=0.5))
    report = benchmark(model, batch_sizes=(1,), image_size=None, **QUICK)
    assert report.macs == cost(model, text_tokens=6, new_tokens=3)
    assert report.rows[0].dense_peak_bytes > report.rows[0].pruned_peak_bytes > 0
    with record(model) as rec:
        run(model, random_inputs(model, 1, 6))
    assert rec.tokens[0] == 12 + 6, "12 of 25 image tokens"


def test_other_dtype_is_measured_on_a_copy() -> None:
    model = tiny_vlm("llava")
    report = benchmark(model, DivPruneConfig(keep_ratio=0.4), batch_sizes=(1,), dtype=torch.bfloat16, **QUICK)
    assert report.environment["dtype"] == "bfloat16"
    assert model.dtype == torch.float32


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_other_image_sizes_are_measured(family: str) -> None:
    model = tiny_vlm(family)
    config = DivPruneConfig(keep_ratio=0.4)
    report = benchmark(model, config, batch_sizes=(1,), image_size=(10, 30), **QUICK)
    assert report.macs == cost(model, config, image_size=(10, 30), text_tokens=6, new_tokens=3)
    assert report.macs.dense.macs < cost(model, config, text_tokens=6, new_tokens=3).dense.macs


def test_the_clock_sees_every_new_token_of_generate() -> None:
    """Also where the model would like to end earlier, and to sample."""
    model = tiny_vlm("llava")
    inputs = random_inputs(model, 2, 4)
    clock = TokenClock()
    model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=clock)
    assert len(clock.times) == 1 + 5, "the prompt, then every token"
    clock.times = [0.0, 10.0, 11.0, 12.5, 14.0, 18.0]
    assert clock.seconds_per_token == (18 - 10) / 4


def test_as_many_tokens_as_asked_are_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vlm("llava")
    model.generation_config.update(eos_token_id=list(range(4, IMAGE)), do_sample=True, temperature=0.5, num_beams=2)
    made, generate = [], model.generate

    def spy(**kwargs):
        made.append(generate(**kwargs))
        return made[-1]

    monkeypatch.setattr(model, "generate", spy)
    benchmark(model, DivPruneConfig(keep_ratio=0.4), batch_sizes=(2,), **QUICK)
    assert {tuple(ids.shape) for ids in made} == {(2, 25 + 6 + 3)}
    assert len(made) == 3 * 3, "three arms, one round of warm-up and two measured"
    assert len({tuple(ids[:, -3:].flatten().tolist()) for ids in made}) <= 3, "greedy: an arm repeats itself"


def test_a_dictionary_and_a_table() -> None:
    macs = cost(tiny_vlm("llava"), DivPruneConfig(keep_ratio=0.4), text_tokens=6, new_tokens=3)
    timings = [
        Timing(0.5, 0.25, 2.0, (1.875, 2.125)),
        Timing(0.25, 0.25, None, (0.5, 1.5)),
        Timing(1, 0.75, 1.5, (1, 2)),
    ]
    row = GenerationRow(
        4,
        *timings,
        decision_share=0.0125,
        decision_quartiles=(0.01, 0.015),
        dense_peak_bytes=31_400_000,
        pruned_peak_bytes=8_000_000,
        dense_operations=149,
        pruned_operations=285,
    )
    report = GenerationBenchmarkReport((row,), macs, 7, {"device": "abacus"})
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(report.to_dict()))
    dense, pruned = macs.dense, macs.pruned
    ideal = {
        "prefill": dense.macs / pruned.macs,
        "decode": dense.decode_macs / pruned.decode_macs,
        "end_to_end": (dense.macs + dense.decode_macs) / (pruned.macs + pruned.decode_macs),
    }
    for part, speedup in (("prefill", 2.0), ("decode", None), ("end_to_end", 1.5)):
        assert data["rows"][0][part]["speedup"] == speedup
        assert data["rows"][0][part]["ideal"] == ideal[part] == report.ideal[part]
        assert data["rows"][0][part]["of_ideal"] == (speedup and speedup / ideal[part])
    assert data["rows"][0]["batch_size"] == 4 and data["rows"][0]["decision_share"] == 0.0125
    assert data["macs"] == macs.to_dict() and data["rounds"] == 7

    header, prefill, decode, whole, last = report.summary().splitlines()
    words = [f"{ideal['prefill']:.2f}", f"{2 / ideal['prefill']:.2f}"]
    assert prefill.split() == [
        "4",
        "prefill",
        "500.0",
        "250.0",
        "2.00",
        "[1.88,",
        "2.12]",
        *words,
        *("1.2%", "[1.0%,", "1.5%]"),
        "31",
        "->",
        "8",
        *("149", "->", "285"),
    ]
    assert decode.split()[:8] == ["4", "decode", "a", "token", "250.0", "250.0", "noise", "[0.50,"]
    assert whole.split()[:5] == ["4", "end", "to", "end", "1000.0"]
    assert len(header) == len(prefill) > len(decode) == len(whole)
    assert (
        last == "one image of 20x20 pixels (25 tokens) and 6 text tokens in, 3 new tokens out; "
        "7 interleaved rounds; medians; [ ] quartiles; "
        + ("noise: not measurable here (quartiles on both sides of 1; a decision's below 0); device abacus")
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch_sizes": ()}, "batch_sizes"),
        ({"rounds": 0}, "rounds"),
        ({"text_tokens": 0}, "text_tokens=0: expected at least 1"),
        ({"new_tokens": 1}, "new_tokens=1: expected at least 2"),
        ({"image_size": (9, 9)}, "image_size=.* has no effect"),
    ],
)
def test_bad_counts(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        benchmark(tiny_vlm("llava"), RandomConfig(), **arguments)


def test_what_cannot_be_measured() -> None:
    model = tiny_vlm("llava")
    with pytest.raises(ConfigError, match="give benchmark a config"):
        benchmark(model)
    with pytest.raises(UnsupportedModelError, match="LlavaModel cannot generate; load the checkpoint with a class"):
        benchmark(model.model, RandomConfig(), **QUICK)
    with pytest.raises(UnsupportedModelError, match="tokens cannot be chosen in the vision tower"):
        benchmark(tiny_vlm("llava_onevision"), Case("visionzip").config(model), **QUICK)
    before = snapshot(model)
    with pytest.raises(ConfigError, match="this model has 8 layers"):
        benchmark(model, StackConfig(), **QUICK)  # made for more layers
    assert snapshot(model) == before


def test_given_stage_of_a_stage_that_counts_from_the_original() -> None:
    model = tiny_vlm("llava")
    stages = stages_of(model, Case("transprune").config(model))
    assert [stage.counts_from for stage in stages] == ["original"] * 2
    given = [GivenStage.like(stage) for stage in stages]
    assert [stage.num_kept(25) for stage in given] == [17, 10]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case("divprune"), Case("transprune")], ids=str)
def test_gpu(case: Case) -> None:
    """In bfloat16 on CUDA: every part is timed there, and memory is that of the device."""
    model = tiny_vlm("llava").to("cuda", torch.bfloat16)
    report = benchmark(model, case.config(model), batch_sizes=(2,), **QUICK)
    assert report.environment["device"] == torch.cuda.get_device_name()
    (row,) = report.rows
    assert all(timing.pruned_seconds > 0 for timing in (row.prefill, row.decode, row.end_to_end))
    assert row.dense_peak_bytes > 0 and row.pruned_peak_bytes > 0
