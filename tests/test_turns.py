"""Speed beside accuracy: arms take turns on every batch, and what cannot be told from noise is no figure."""

import gc
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from hf_tokenprune.benchmark.medians import cell, decision_share, explained, quartiles, speed_up
from hf_tokenprune.benchmark.timing import Timing
from hf_tokenprune.evaluation import (
    AnswersReport,
    PairedReport,
    RetrievalReport,
    collect_logits,
    evaluate_answers,
    evaluate_paired,
    evaluate_retrieval,
    load_images,
    load_questions,
)

CLASSES = 5


class Machine:
    """A clock that stands still but for forwards, each of which takes what ``seconds`` says of its arm and batch."""

    def __init__(self, seconds: Callable[[str, int], float]) -> None:
        self.seconds, self.now, self.arm = seconds, 0.0, "dense"
        self.order: list[str] = []

    def forward(self) -> None:
        self.now += self.seconds(self.arm, len(self.order) // 2)
        self.order.append(self.arm)

    @contextmanager
    def variant(self) -> Iterator[None]:
        self.arm, self.now = "pruned", self.now + 1000.0  # changing a model takes time, too
        try:
            yield
        finally:
            self.arm = "dense"


class Model(nn.Module):
    """A classifier, an image tower and an answering model in one, that runs on a `Machine`."""

    config = SimpleNamespace()
    generation_config = SimpleNamespace(eos_token_id=None)
    logit_scale = torch.zeros(())

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine, self.weight = machine, nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.machine.forward()
        return self.weight * pixel_values.flatten(1)[:, :CLASSES] + (self.machine.arm == "pruned")

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self(pixel_values)

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        self.machine.forward()
        return torch.cat([input_ids, input_ids], dim=1)


class Processor:
    chat_template = None

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> Any:
        if text is not None:
            return {"input_ids": torch.ones(len(text), 1, dtype=torch.int64)}
        return {"pixel_values": torch.stack([torch.full((3, 4), float(image.getpixel((0, 0))[0])) for image in images])}

    def batch_decode(self, tokens: torch.Tensor, **_: Any) -> list[str]:
        return ["yes"] * len(tokens)


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (4, 4), (i, i, i)) for i in range(n)]


def paired(machine: Machine, n: int, batch_size: int) -> PairedReport:
    images = load_images([{"image": image, "label": i % CLASSES} for i, image in enumerate(pictures(n))])
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    return evaluate_paired(Model(machine), images, Processor(), {"pruned": machine.variant}, **options)


def retrieval(machine: Machine, n: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> RetrievalReport:
    texts = torch.eye(CLASSES)[torch.arange(n) % CLASSES]
    monkeypatch.setattr("hf_tokenprune.evaluation.retrieval.embed_texts", lambda *_: texts)
    monkeypatch.setattr(Model, "get_text_features", lambda: None, raising=False)
    pairs = [(image, "a text") for image in pictures(n)]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    return evaluate_retrieval(Model(machine), pairs, Processor(), {"pruned": machine.variant}, ks=(1,), **options)


def answers(machine: Machine, n: int, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> AnswersReport:
    def measure(model: Model, inputs: Any, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        machine.now += 100.0  # behind the clock's back
        return torch.full((int(counts.sum()), CLASSES), float(machine.arm == "pruned"))

    monkeypatch.setattr("hf_tokenprune.evaluation.answers.answer_logits", measure)
    questions = load_questions([{"image": image, "question": "?", "answer": "yes"} for image in pictures(n)])
    options: dict[str, Any] = {"batch_size": batch_size, "prompt": "{}", "progress": False}
    return evaluate_answers(Model(machine), questions, Processor(), {"pruned": machine.variant}, **options)


@pytest.fixture(params=["classes", "retrieval", "answers"])
def evaluation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Every evaluation that prints a speed, on a machine whose clock is the one that is read."""
    run = {
        "classes": paired,
        "retrieval": lambda *a: retrieval(*a, monkeypatch),
        "answers": lambda *a: answers(*a, monkeypatch),
    }[request.param]

    def evaluate(machine: Machine, n: int, batch_size: int) -> Any:
        monkeypatch.setattr(time, "perf_counter", lambda: machine.now)
        return run(machine, n, batch_size)

    return evaluate


def rate_of(row: Any) -> float | None:
    return row.questions_per_second if hasattr(row, "questions_per_second") else row.images_per_second


def test_a_machine_that_slows_down_slows_both(evaluation: Callable[..., Any]) -> None:
    """Half as much work, on a machine that is three times slower from the fourth batch on: twice as fast it is.

    Dense first and alone, the speed-up would come out at about 1.
    """
    machine = Machine(lambda arm, batch: (2.0 if arm == "dense" else 1.0) * (3.0 if batch >= 4 else 1.0))
    dense, row = evaluation(machine, 11, 2).rows
    assert machine.order == ["dense", "pruned"] * 2 + ["pruned", "dense", "dense", "pruned"] * 2 + ["pruned", "dense"]
    assert (row.speed_up, row.speed_up_quartiles) == (2.0, (2.0, 2.0))
    assert (dense.speed_up, dense.speed_up_quartiles) == (None, None)
    assert (rate_of(dense), rate_of(row)) == (2 / 2, 4 / 2), "of five full batches three are fast"


def test_noise_is_no_figure(evaluation: Callable[..., Any]) -> None:
    machine = Machine(lambda arm, batch: 1.0 if arm == "dense" else (0.5, 2.0)[batch % 2])
    report = evaluation(machine, 8, 1)
    row = report.rows[1]
    assert (row.speed_up, rate_of(row)) == (None, None) and row.speed_up_quartiles == (0.5, 2.0)
    data = json.loads(json.dumps(report.to_dict()))["rows"][1]
    assert data["speed_up"] is None and data["speed_up_quartiles"] == [0.5, 2.0]
    for text in (report.summary(), report.to_markdown()):
        assert "noise [0.50, 2.00]" in text and "noise: not measurable here" in text


def test_too_few_batches_have_no_speed(evaluation: Callable[..., Any]) -> None:
    report = evaluation(Machine(lambda arm, batch: 1.0 if arm == "dense" else 0.5), 5, 2)  # the third is not full
    assert [(row.speed_up, row.speed_up_quartiles, rate_of(row)) for row in report.rows] == [(None, None, None)] * 2
    text = report.summary()
    assert "speed-up" not in text.splitlines()[2] and "No speed-up: it takes turns on at least 3 full batches" in text


def test_logits_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there were, in a forward the logits of two arms and one batch are there."""
    held: dict[int, int] = {}
    number = itertools.count()

    def count(self: Machine) -> None:
        forward = next(number)
        if forward in (4, 5, 28, 29):  # of the second batch, and of the last but one; two warm up
            found = gc.get_objects()
            held[forward] = sum(type(each) is torch.Tensor and each.shape[1:] == (CLASSES,) for each in found)

    monkeypatch.setattr(Machine, "forward", count)
    paired(Machine(lambda arm, batch: 0.0), 30, 2)
    assert next(number) == 2 + 2 * 15
    assert held[28] <= held[4] and 0 < held[29] <= held[5]


@pytest.mark.heavy
@pytest.mark.slow
def test_logits_of_answers_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches and variants there were, when one is measured there are the dense model's logits alone."""
    held: list[int] = []

    def measure(model: Model, inputs: Any, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        found = gc.get_objects()
        held.append(sum(type(each) is torch.Tensor and each.shape[1:] == (CLASSES,) for each in found))
        return torch.zeros(int(counts.sum()), CLASSES)

    monkeypatch.setattr("hf_tokenprune.evaluation.answers.answer_logits", measure)
    machine = Machine(lambda arm, batch: 0.0)
    questions = load_questions([{"image": image, "question": "?", "answer": "yes"} for image in pictures(8)])
    variants = dict.fromkeys("abc", machine.variant)
    report = evaluate_answers(
        Model(machine), questions, Processor(), variants, batch_size=2, prompt="{}", progress=False
    )
    assert [row.kl for row in report.rows] == [None, 0.0, 0.0, 0.0] and len(held) == 4 * 4
    before = held[0]
    assert max(held) <= before + 1 and min(held[-3:]) == before + 1


def test_what_is_timed_alone_is_the_sum_of_its_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda arm, batch: 2.0)
    monkeypatch.setattr(time, "perf_counter", lambda: machine.now)
    images = load_images([{"image": image, "label": 0} for image in pictures(7)])
    got = collect_logits(Model(machine), images, Processor(), batch_size=2, progress=False)
    assert got.seconds == 4 * 2.0 and got.images_per_second == 7 / 8


def test_a_variant_is_left_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, model_modes = Machine(lambda arm, batch: 1 / 0 if arm == "pruned" else 0.0), []

    @contextmanager
    def variant() -> Iterator[None]:
        with machine.variant():
            yield

    model = Model(machine).train()
    images = load_images([{"image": image, "label": 0} for image in pictures(2)])
    variants: dict[str, Callable[[], AbstractContextManager[Any]]] = {"pruned": variant}
    with pytest.raises(ZeroDivisionError):
        evaluate_paired(model, images, Processor(), variants, progress=False)
    model_modes.append(model.training)
    assert machine.arm == "dense" and model_modes == [True]


# -- medians by hand


def test_figures_and_noise() -> None:
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 4.0) and quartiles([1.0, 2.0]) is None
    assert speed_up([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]) == (2.0, (2.0, 2.5))
    assert speed_up([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]) == (1.0, (1.0, 1.0)), "no faster, and that is certain"
    assert speed_up([1.0] * 5, [0.5, 0.6, 1.0, 2.0, 3.0]) == (None, (0.5, 1 / 0.6))
    assert speed_up([2.0, 2.0], [1.0, 1.0]) == (None, None), "two rounds say nothing about noise"
    assert Timing.of([2.0], [1.0]) == Timing(2.0, 1.0, None, None)
    ones = [1.0] * 5
    share, spread = decision_share(ones, [0.6, 0.7, 0.8, 0.9, 1.0], [0.5] * 5)
    assert share == pytest.approx(0.3) and spread == pytest.approx((0.2, 0.4))
    share, spread = decision_share(ones, [0.3, 0.4, 0.6, 0.7, 0.8], [0.5] * 5)
    assert share is None and spread == pytest.approx((-0.1, 0.2))
    share, spread = decision_share(ones, [0.1, 0.2, 0.2, 0.3, 0.4], [0.5] * 5)
    assert share is None and spread == pytest.approx((-0.3, -0.2)), "choosing takes no less than no time"


def test_cells() -> None:
    assert cell(1.5, (1.25, 1.75), ".2f") == "1.50 [1.25, 1.75]"
    assert cell(None, (0.5, 1.75), ".2f") == "noise [0.50, 1.75]"
    assert cell(None, None, ".2f") == "-"
    assert "noise" not in explained("1.50 [1.25, 1.75]", 5) and "not measurable here" in explained("noise [0.5, 2]", 5)
    assert "at least 3" in explained("-", 2)
