"""Stock pipelines with pruned models, one by one and in batches, against the model called by hand."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, PreTrainedModel, ViTForImageClassification, ViTImageProcessor, ViTModel, pipeline

from hf_tokenprune import (
    DivPruneConfig,
    PruneConfig,
    SalienceMergeConfig,
    ToMeConfig,
    disable_auto,
    enable_auto,
    prune,
    record,
    save_pretrained,
)
from hf_tokenprune.engine import current_config, find_adapter

from .clip_checkpoint import tiny_clip
from .families import TINY, tiny_model
from .real_processors import model_of, processor_of
from .test_real_processors import LARGE, TALL, WIDE, inputs_of, prompt

SIDE = {"height": TINY["image_size"], "width": TINY["image_size"]}
LABELS = ["red", "blue"]
PICTURES = [LARGE, TALL, WIDE]
CHATS = [prompt(LARGE, "what is this ?"), prompt("this", TALL, WIDE, "where ?"), prompt(WIDE, "what ?")]


@dataclass(frozen=True)
class Task:
    """What a pipeline is called, what it is made of, and the same without it.

    Attributes:
        parts: the model and arguments of the pipeline that prepare its inputs.
        items, options: what is asked, one by one.
        by_hand: (model, item) -> what the pipeline says to it.
        value: what of its answer that is.
    """

    name: str
    config: PruneConfig
    parts: Callable[[], tuple[PreTrainedModel, dict[str, Any]]]
    items: list[Any]
    options: dict[str, Any]
    by_hand: Callable[[PreTrainedModel, Any], Any]
    value: Callable[[Any], Any]


def pixels(picture: Image.Image) -> torch.Tensor:
    return ViTImageProcessor(size=SIDE)(picture, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def probabilities(model: PreTrainedModel, picture: Image.Image) -> dict[str, float]:
    (shares,) = model(pixels(picture)).logits.softmax(-1).tolist()
    return {model.config.id2label[i]: share for i, share in enumerate(shares)}


@torch.no_grad()
def states(model: PreTrainedModel, picture: Image.Image) -> list[list[float]]:
    return model(pixels(picture)).last_hidden_state[0].tolist()


@torch.no_grad()
def fitting(model: CLIPModel, picture: Image.Image) -> dict[str, float]:
    inputs = tiny_clip()[1](text=[f"a {name}" for name in LABELS], images=picture, return_tensors="pt", padding=True)
    (shares,) = model(**inputs).logits_per_image.softmax(-1).tolist()
    return dict(zip(LABELS, shares, strict=True))


def answer(model: PreTrainedModel, chat: Any) -> str:
    inputs = inputs_of("llava", chat)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor_of("llava").decode(tokens, skip_special_tokens=True)).strip()


def shares(answers: list[dict[str, Any]]) -> dict[str, float]:
    return {answer["label"]: answer["score"] for answer in answers}


def left_padded() -> Any:
    """As checkpoints for generation come, and as batches of several lengths need it, dense too."""
    processor = copy.deepcopy(processor_of("llava"))
    processor.tokenizer.padding_side = "left"
    return processor


TASKS = [
    Task(
        "image-classification",
        ToMeConfig(),
        lambda: (tiny_model("vit", ViTForImageClassification), {"image_processor": ViTImageProcessor(size=SIDE)}),
        PICTURES,
        {"top_k": TINY["num_labels"]},
        probabilities,
        shares,
    ),
    Task(
        "image-feature-extraction",
        SalienceMergeConfig(exact_last_block=False),
        lambda: (tiny_model("vit", ViTModel), {"image_processor": ViTImageProcessor(size=SIDE)}),
        PICTURES,
        {},
        states,
        lambda answers: answers[0],
    ),
    Task(
        "zero-shot-image-classification",
        ToMeConfig(),
        lambda: (
            tiny_clip()[0],
            {"image_processor": tiny_clip()[1].image_processor, "tokenizer": tiny_clip()[1].tokenizer},
        ),
        PICTURES,
        {"candidate_labels": LABELS, "hypothesis_template": "a {}"},
        fitting,
        shares,
    ),
    Task(
        "image-text-to-text",
        DivPruneConfig(keep_ratio=0.3),
        lambda: (model_of("llava"), {"processor": left_padded()}),
        CHATS,
        {"max_new_tokens": 4, "return_full_text": False},
        answer,
        lambda answers: answers[0]["generated_text"].strip(),
    ),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def close(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert actual == pytest.approx(expected, abs=1e-5)
    elif isinstance(expected, str):
        assert actual == expected
    else:
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.fixture
def _auto() -> Iterator[None]:
    enable_auto()
    yield
    disable_auto()


@every_task
def test_answers_are_those_of_the_model(task: Task) -> None:
    """Alone and in batches from a generator, which a pipeline takes for a dataset."""
    model, parts = task.parts()
    dense = [task.by_hand(model, item) for item in task.items]
    pipe = pipeline(task.name, model=prune(model, task.config), device="cpu", **parts)
    expected = [task.by_hand(model, item) for item in task.items]
    assert expected != dense
    with record(model) as rec:
        said = pipe(task.items[0], **task.options)
    close(task.value(said), expected[0])
    kept = list(rec.kept.values())[-1]
    assert 0 < kept.shape[1] < find_adapter(model).shape(model).num_prunable, "of one image, which the model saw"
    batches = list(pipe((item for item in task.items), batch_size=2, **task.options))
    for answers, of_item in zip(batches, expected, strict=True):
        close(task.value(answers), of_item)


@pytest.mark.slow
@every_task
@pytest.mark.usefixtures("_auto")
def test_a_checkpoint_that_carries_its_config_is_pruned(task: Task, tmp_path: Path) -> None:
    model, parts = task.parts()
    save_pretrained(prune(model, task.config), tmp_path)
    for part in parts.values():
        part.save_pretrained(tmp_path)
    pipe = pipeline(task.name, model=str(tmp_path), device="cpu", **parts)
    assert current_config(pipe.model) == task.config
    close(task.value(pipe(task.items[0], **task.options)), task.by_hand(model, task.items[0]))


@pytest.mark.slow
def test_evaluate_takes_the_model_and_no_pipeline() -> None:
    """evaluate 0.4.6 asks whether a pipeline is one of TensorFlow's models, of which Transformers 5 has none."""
    evaluate, datasets = pytest.importorskip("evaluate"), pytest.importorskip("datasets")

    class Share(evaluate.Metric):
        def _info(self) -> Any:
            features = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("int32")))
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
            return {"share": sum(map(int.__eq__, predictions, references)) / len(references)}

    model = prune(tiny_model("vit", ViTForImageClassification), ToMeConfig())
    with torch.no_grad():
        labels = [int(model(pixels(picture)).logits.argmax()) for picture in PICTURES]
    rows = datasets.Dataset.from_dict({"image": PICTURES, "label": [labels[0], *labels[1:-1], 1 - min(labels[-1], 1)]})
    right = sum(a == b for a, b in zip(labels, rows["label"], strict=True)) / len(labels)
    asked = {"data": rows, "metric": Share(), "label_mapping": model.config.label2id, "device": -1}
    evaluator = evaluate.evaluator("image-classification")
    scores = evaluator.compute(model, feature_extractor=ViTImageProcessor(size=SIDE), **asked)
    assert scores["share"] == pytest.approx(right)
    pipe = pipeline("image-classification", model=model, image_processor=ViTImageProcessor(size=SIDE), device="cpu")
    with pytest.raises(AttributeError, match="TFPreTrainedModel"):
        evaluator.compute(pipe, **asked)
