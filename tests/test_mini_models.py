"""The packaged CLIP and LLaVA see and answer; pruned they answer in batches what they answer one by one; and reports
count right."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    CLIPModel,
    LlavaForConditionalGeneration,
)
from typer.testing import CliRunner

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
pytest.importorskip("accelerate")

from hf_tokenprune import PruneConfig, TransPruneConfig, list_methods, pruned, record
from hf_tokenprune.cli import app
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.mosaics import CLIP_DIR, EMPTY, LLAVA_DIR, Layout, Mosaics, digit_pictures
from hf_tokenprune.demo.questions import KINDS, POSITIONS, MosaicQuestions, most_frequent, number_captions
from hf_tokenprune.demo.run import decoder_configs
from hf_tokenprune.engine import find_adapter
from hf_tokenprune.errors import DataError, TokenPruneError, UnsupportedModelError
from hf_tokenprune.evaluation import (
    Answers,
    AnswersReport,
    QuestionDataset,
    collect_answers,
    evaluate_answers,
    evaluate_zero_shot,
    load_images,
    load_questions,
    mean_text_tokens,
)
from hf_tokenprune.registry import get_method

TEST = digit_pictures("test")
CONFIGS = decoder_configs(AutoModelForImageTextToText.from_pretrained(LLAVA_DIR), 0.3)


@pytest.fixture(scope="module")
def llava() -> Any:
    return AutoModelForImageTextToText.from_pretrained(LLAVA_DIR).eval()


@pytest.fixture(scope="module")
def clip() -> Any:
    return AutoModelForZeroShotImageClassification.from_pretrained(CLIP_DIR).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(LLAVA_DIR)


def asked(n: int, layout: Layout = "crowded") -> QuestionDataset:
    return load_questions(list(MosaicQuestions(Mosaics(TEST, n, layout=layout))))


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


# -- the models ------------------------------------------------------------------------------------------------------


def test_weights_are_small_half_floats_of_stock_classes(llava: Any, clip: Any) -> None:
    for folder, model, stock in (
        (LLAVA_DIR, llava, LlavaForConditionalGeneration),
        (CLIP_DIR, clip, CLIPModel),
    ):
        assert type(model) is stock and model.dtype == torch.float32
        assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118
        assert f"{model.num_parameters():,} parameters" in card(folder)
    shape = cost(llava, text_tokens=12).dense
    assert shape.layers[0].tokens_in == 256 + 12


def test_the_llava_sees_with_the_clips_eyes(llava: Any, clip: Any) -> None:
    tower, last = dict(llava.model.vision_tower.named_parameters()), clip.vision_model.encoder.layers[-1]
    unread = {id(parameter) for part in (last, clip.vision_model.post_layernorm) for parameter in part.parameters()}
    for name, parameter in clip.vision_model.named_parameters():
        assert id(parameter) in unread or torch.equal(parameter, tower[name])


@pytest.mark.heavy
@pytest.mark.slow
def test_llava_answers_questions_about_digits_it_has_not_seen(llava: Any, processor: Any) -> None:
    report = evaluate_answers(llava, asked(100), processor, {}, batch_size=50, max_new_tokens=8, progress=False)
    (dense,) = report.rows
    assert dense.overall.n == 500 and dense.overall.accuracy >= 0.95
    assert list(dense.kinds) == list(KINDS)
    assert all(score.n == 100 and score.accuracy >= 0.9 for score in dense.kinds.values())
    reported = float(re.search(r"Exact match on .*: ([\d.]+) %", card(LLAVA_DIR)).group(1))  # type: ignore[union-attr]
    assert reported >= 95 and abs(100 * dense.overall.accuracy - reported) < 3, "the card is about 1000 questions"


@pytest.mark.heavy
@pytest.mark.slow
def test_llava_reads_small_digits_on_black(llava: Any, processor: Any) -> None:
    questions = asked(100, "sparse")
    (dense,) = evaluate_answers(llava, questions, processor, {}, batch_size=50, max_new_tokens=8, progress=False).rows
    assert dense.overall.n == 300 and all(score.accuracy >= 0.95 for score in dense.kinds.values())


@pytest.mark.heavy
@pytest.mark.slow
def test_clip_knows_which_digit_and_where(clip: Any) -> None:
    single = list(Mosaics(TEST, 200, single=True))
    processor = AutoProcessor.from_pretrained(CLIP_DIR)

    def accuracy(names: tuple[str, ...], template: str, labels: list[int]) -> float:
        images = load_images([{"image": m.image, "label": label} for m, label in zip(single, labels, strict=True)])
        report = evaluate_zero_shot(clip, images, processor, names, {}, templates=(template,), progress=False)
        return report.rows[0].accuracy or 0.0

    assert accuracy(TEST.names, "the {}", [max(mosaic.cells) for mosaic in single]) >= 0.95
    places = [next(i for i, label in enumerate(mosaic.cells) if label != EMPTY) for mosaic in single]
    assert accuracy(POSITIONS, "something at the {}", places) >= 0.95
    several = [m for m in Mosaics(TEST, 80) if max(map(m.cells.count, range(10))) > 1]
    right = 0
    for mosaic in several:
        label = most_frequent(mosaic.cells)
        names = [caption.text for caption in number_captions(label, TEST)]
        images = load_images([{"image": mosaic.image, "label": mosaic.cells.count(label) - 1}])
        report = evaluate_zero_shot(clip, images, processor, names, {}, templates=("{}",), progress=False)
        right += int(report.rows[0].accuracy or 0)
    assert right / len(several) > 0.6, "chance is a quarter"


def test_training_logs_end_where_the_cards_say() -> None:
    for folder in (CLIP_DIR, LLAVA_DIR):
        log = [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]
        assert f"{int(log[-1]['step']):,} steps" in card(folder)
        assert f"{log[-1]['minutes']:.0f} minutes" in card(folder)
        assert [line["step"] for line in log] == sorted(line["step"] for line in log)


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *CONFIGS])
def test_batches_answer_what_single_questions_answer(llava: Any, processor: Any, name: str | None) -> None:
    questions = asked(3)
    assert len({len(text.split()) for text in questions.questions}) > 2, "prompts of several lengths"

    def ask(batch_size: int) -> tuple[str, ...]:
        return collect_answers(llava, questions, processor, batch_size, 8, progress=False).texts

    if name is None:
        assert ask(15) == ask(1)
        return
    with pruned(llava, CONFIGS[name]):
        assert ask(15) == ask(1)


def test_every_method_that_prunes_images_is_compared(llava: Any) -> None:
    shape = find_adapter(llava).shape(llava)
    last = cost(llava).dense.layers[-1].tokens_out
    for name in list_methods("decoder"):
        if name in CONFIGS:
            assert CONFIGS[name].method == name
            assert cost(llava, CONFIGS[name]).pruned.layers[-1].tokens_out == last - 256 + int(0.3 * 256)
        else:
            assert all(stage.videos_only for stage in get_method(name)().stages_for(shape))


def test_text_decides_which_tokens_stay(llava: Any, processor: Any) -> None:
    questions = load_questions(list(MosaicQuestions(Mosaics(TEST, 1))))
    kept = []
    with pruned(llava, CONFIGS["transprune"]):
        for i in range(2):
            inputs = processor(
                images=[questions[i]["image"]], text=[f"user : <image> {questions.questions[i]} assistant :"],
                return_tensors="pt",
            )  # fmt: skip
            with record(llava) as rec:
                llava.generate(**inputs, max_new_tokens=1)
            kept.append(rec.kept["4"])
    assert kept[0].shape == kept[1].shape and not torch.equal(kept[0], kept[1])


def test_report_counts_by_kind() -> None:
    rows = [("a", "x", "yes", "yes", "no"), ("b", "x", "2", "3", "2."), ("c", "y", "no", "No", "no")]
    questions = load_questions([
        {"image": Mosaics(TEST, 1)[0].image, "question": q, "kind": kind, "answer": answer}
        for q, kind, answer, _, _ in rows
    ])  # fmt: skip
    dense, other = Answers(tuple(row[3] for row in rows), 2.0), Answers(tuple(row[4] for row in rows), 1.0)
    report = AnswersReport.from_answers(questions, dense, {"other": other}, {"dense": 8.0, "other": 2.0})
    first, second = report.rows
    assert (first.overall.accuracy, second.overall.accuracy) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert {kind: score.accuracy for kind, score in first.kinds.items()} == {"x": 0.5, "y": 1.0}
    assert {kind: (score.n, score.accuracy) for kind, score in second.kinds.items()} == {"x": (2, 0.5), "y": (1, 1.0)}
    assert second.overall.difference == 0.0 and second.kinds["x"].difference == 0.0
    assert second.overall.interval is not None and second.overall.interval[0] < 0 < second.overall.interval[1]
    assert second.agreement == pytest.approx(1 / 3) and first.agreement is None
    assert (second.speed_up, second.ideal_speed_up) == (None, 4.0), "they took no turns"
    assert (second.kl, second.kl_interval) == (None, None), "nobody measured it"
    assert first.questions_per_second is None and first.overall.difference is None
    assert "| x | y |" in report.to_markdown() and json.loads(json.dumps(report.to_dict()))["questions"] == 3
    with pytest.raises(TokenPruneError, match="2 answers to 3 questions"):
        AnswersReport.from_answers(questions, dense, {"short": Answers(("a", "b"), 1.0)})
    with pytest.raises(TokenPruneError, match="called 'dense'"):
        AnswersReport.from_answers(questions, dense, {"dense": other})
    report = AnswersReport.from_answers(questions, dense, {"other": replace(other, kl=(0.25, 0.0, 0.5))})
    assert report.rows[1].kl == 0.25 and report.rows[0].kl is None
    assert report.rows[1].kl_interval == pytest.approx((0.0, 0.25 + 1.96 * 0.25 / 3**0.5), rel=1e-4), "cut at 0"
    assert "0.25 [0, 0.533]" in report.summary()
    with pytest.raises(TokenPruneError, match="2 values of KL to 3 questions"):
        AnswersReport.from_answers(questions, dense, {"short": replace(other, kl=(0.0, 0.0))})


def test_prompts(llava: Any, processor: Any, clip: Any) -> None:
    questions = asked(1)
    chat = collect_answers(llava, questions, processor, 5, 8, progress=False).texts
    by_hand = collect_answers(llava, questions, processor, 5, 8, "user : <image> {} assistant :", progress=False).texts
    assert chat == by_hand
    texts = [len(f"<s> user : {text} assistant :".split()) for text in questions.questions]
    assert mean_text_tokens(llava, questions, processor) == round(sum(texts) / len(texts))
    with pytest.raises(TokenPruneError, match=r"has no \{\}"):
        collect_answers(llava, questions, processor, prompt="user : <image>")
    with pytest.raises(UnsupportedModelError, match="has no generate"):
        collect_answers(torch.nn.Linear(1, 1), questions, processor)
    with pytest.raises(TokenPruneError, match="no chat template"):
        collect_answers(llava, questions, AutoProcessor.from_pretrained(CLIP_DIR))


# -- from a shell ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about two mosaics, in a questions.jsonl."""
    path, lines = tmp_path_factory.mktemp("questions"), []
    for i, row in enumerate(MosaicQuestions(Mosaics(TEST, 2))):
        row.pop("image").save(path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", **row}))
    (path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.slow
def test_eval_of_llava_is_exact_match(folder: Path) -> None:
    arguments = [
        "eval",
        str(LLAVA_DIR),
        str(folder),
        "-m",
        "divprune",
        "-m",
        "random",
        "-g",
        "0.6",
        "--new-tokens",
        "6",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [row["name"] for row in data["rows"]] == ["dense", "divprune@0.6", "random@0.6"]
    assert data["questions"] == 10 and list(data["rows"][0]["kinds"]) == list(KINDS)
    assert data["rows"][0]["overall"]["accuracy"] >= 0.9
    assert all(0.55e9 < row["macs"] <= 0.6e9 for row in data["rows"][1:])
    assert all(row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1] for row in data["rows"][1:])
    assert PruneConfig.from_dict(data["configs"]["divprune@0.6"]).method == "divprune"
    text = CliRunner().invoke(app, [*arguments, "--limit", "5", "--markdown"])
    assert "5 questions" in text.stdout and "| run | all | vs dense | what |" in text.stdout
    assert "| agreement % | KL |" in text.stdout and "KL(dense || run) of the next token" in text.stdout
    for option, words in (
        (["--class-names", str(folder / "questions.jsonl")], "--class-names has no effect on a vision-language model"),
        (["--prompt", "no place"], "has no {}"),
        (["--split", "test"], "has no splits"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *option])
        assert refused.exit_code == 1 and words in refused.output


def test_a_broken_image_is_named(llava: Any, processor: Any, tmp_path: Path) -> None:
    row = MosaicQuestions(Mosaics(TEST, 1))[0]
    questions = load_questions([{**row, "image": b"not an image"}])
    with pytest.raises(DataError, match="item 0"):
        collect_answers(llava, questions, processor, progress=False)
    assert not llava.training


def test_variants_are_left_behind(llava: Any, processor: Any) -> None:
    config = TransPruneConfig(accumulate_layers=(1,), layers=(1,), keep_ratios=(0.3,))
    report = evaluate_answers(
        llava, asked(2), processor, {"t": partial(pruned, llava, config)}, batch_size=10, max_new_tokens=8,
        progress=False,
    )  # fmt: skip
    again = collect_answers(llava, asked(2), processor, 10, 8, progress=False)
    assert [row.name for row in report.rows] == ["dense", "t"]
    right = [text == answers[0] for text, answers in zip(again.texts, asked(2).answers, strict=True)]
    assert report.rows[0].overall.accuracy == sum(right) / len(right)
