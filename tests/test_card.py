"""Model cards and what a config says it fits; the Hub itself is in ``tests/test_hub.py``."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import ViTForImageClassification
from transformers.pipelines import SUPPORTED_TASKS

from hf_tokenprune import (
    PruneConfig,
    StackConfig,
    ToMeConfig,
    UniformConfig,
    list_methods,
    prune,
    record,
    save_pretrained,
    unprune,
)
from hf_tokenprune.engine import find_adapter, plan
from hf_tokenprune.errors import ConfigError
from hf_tokenprune.evaluation.answers_report import Answers, AnswersReport
from hf_tokenprune.evaluation.loop import Logits
from hf_tokenprune.evaluation.questions import QuestionDataset
from hf_tokenprune.evaluation.report import PairedReport
from hf_tokenprune.evaluation.retrieval import Recall, RetrievalReport, RetrievalRow
from hf_tokenprune.registry import get_method
from hf_tokenprune.sharing.card import BEGIN, END, config_card, model_card
from hf_tokenprune.sharing.fit import fits

from .decoder_families import FAMILIES, SUPPORTED, WITH_VIDEOS, tiny_vlm
from .families import images, supported_classes, tiny_model

NAMING = [
    (name, kind)
    for name in list_methods()
    if {"layer", "layers"} & {field.name for field in dataclasses.fields(get_method(name))}
    for kind in sorted(get_method(name).prunes)
]
"""Methods whose configs can name layers, and what they prune."""


def vit() -> ViTForImageClassification:
    return tiny_model("vit", ViTForImageClassification)


def paired(*names: str) -> PairedReport:
    generator, labels = torch.Generator().manual_seed(0), torch.arange(40) % 5
    dense, *others = (Logits(torch.randn(40, 5, generator=generator), labels, 1.0) for _ in range(1 + len(names)))
    return PairedReport.from_logits(dense, dict(zip(names, others, strict=True)))


def naming(method: str, layer: int) -> PruneConfig:
    """A config of the method that prunes in this layer, or after it, and in no later one."""
    fields = {field.name for field in dataclasses.fields(get_method(method))}
    if "layer" in fields:
        return PruneConfig.for_method(method, layer=layer)
    asked: dict[str, Any] = {"layers": [layer]}
    if "keep_ratios" in fields:
        asked["keep_ratios"] = [0.5]
    if "accumulate_layers" in fields:
        asked["accumulate_layers"] = [layer]
    return PruneConfig.for_method(method, **asked)


# -- what a config fits ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:pruning after block")
@pytest.mark.parametrize(("method", "kind"), NAMING)
def test_the_depth_that_is_said_is_the_least(method: str, kind: str) -> None:
    config, model = naming(method, 4), vit() if kind == "vision" else tiny_vlm("llava")
    shape, words = find_adapter(model).shape(model), {"vision": "encoders with", "decoder": "decoder of"}[kind]
    (least,) = map(int, re.findall(rf"{words} at least (\d+)", fits(config)))
    for depth in (least, least + 1, 3 * least):
        plan(config, dataclasses.replace(shape, depth=depth))
    with pytest.raises(ConfigError):
        plan(config, dataclasses.replace(shape, depth=least - 1))


@pytest.mark.parametrize("method", list_methods())
def test_what_names_no_layer_says_the_kind_alone(method: str) -> None:
    said = fits(get_method(method)())
    assert ("vision encoders" in said) == ("vision" in get_method(method).prunes)
    assert ("with a decoder" in said) == ("decoder" in get_method(method).prunes)
    if getattr(get_method(method)(), "layers", None) is None and method not in ("dart", "fastv", "stack"):
        assert "at least" not in said


def test_of_a_stack_the_deepest_counts_and_the_tower_is_told_apart() -> None:
    parts = [PruneConfig.for_method("fastv", layer=3), ToMeConfig(layers=(8,), r=0.5)]
    assert fits(StackConfig(tuple(parts))) == (
        "vision-language models with a decoder of at least 5 layers and a vision tower of at least 9 blocks"
    )


# -- the card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "cls"), supported_classes(), ids=lambda value: getattr(value, "__name__", value))
def test_the_task_is_one_that_a_pipeline_has_for_this_class(family: str, cls: type) -> None:
    data = model_card(tiny_model(family, cls), PruneConfig.for_method("random"), "me/x").data
    task = data.pipeline_tag
    if task is None:
        assert not cls.__name__.endswith("ForImageClassification")
        return
    autos = SUPPORTED_TASKS[task]["pt"]
    found = [auto._model_mapping[type(cls.config_class())] for auto in autos]
    assert any(cls is each or (isinstance(each, tuple) and cls in each) for each in found)
    assert (task == "image-classification") == ("ForImageClassification" in cls.__name__)
    assert data.library_name == "transformers" and data.tags == ["hf_tokenprune", "token-pruning", "random"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_vision_language_models_say_so(family: str) -> None:
    card = model_card(tiny_vlm(family), PruneConfig.for_method("divprune", keep_ratio=0.5), "me/x")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "layer 7" in card.text and "KV cache" in card.text


@pytest.mark.parametrize("method", list_methods())
def test_every_method_makes_a_card(method: str) -> None:
    """Of a model too where nothing can be counted for one image, and of the config alone."""
    if "vision" in get_method(method).prunes:
        model, config = vit(), get_method(method)()
    else:
        family, case = next(each for each in (*SUPPORTED, *WITH_VIDEOS) if each[1].method == method)
        model = tiny_vlm(family)
        config = case.config(model)
    for card in (model_card(model, config, "me/x"), config_card(config, "me/x")):
        assert f'"method": "{method}"' in card.text
        assert ModelCard(str(card)).data.tags == card.data.tags


def test_tokens_layer_by_layer_are_those_that_are_recorded() -> None:
    model = prune(vit(), config := ToMeConfig(layers=(1, 3), r=0.3))
    with record(model) as rec, torch.no_grad():
        model(images())
    rows = re.findall(r"^block (\d+) +(\d+) +\d+ ", model_card(model, config, "me/x").text, flags=re.MULTILINE)
    assert [(int(block), int(tokens)) for block, tokens in rows] == [(i, rec.tokens[i]) for i in range(8)]


def test_the_base_model_is_the_repository_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no folder, though it may have been moved since, or lie below another one."""
    model, config = vit(), ToMeConfig()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for cached in ("facebook/deit-small-patch16-224", "there/folder", "me/x"):
        (tmp_path / "hub" / f"models--{cached.replace('/', '--')}").mkdir(parents=True)
    (tmp_path / "there" / "folder").mkdir(parents=True)
    for name, base in {
        **{"facebook/deit-small-patch16-224": "facebook/deit-small-patch16-224", "me/x": None, "": None},
        **{"there/folder": None, "./folder": None, str(tmp_path): None, "folder": None},
        **{"out/final": None, "C:\\out/final": None, "~/final": None},
    }.items():
        model.config.name_or_path = name
        assert model_card(model, config, "me/x").data.base_model == base, name


def test_a_card_in_another_encoding_is_named(tmp_path: Path) -> None:
    model = prune(vit(), "tome")
    (tmp_path / "README.md").write_text("# Caf\xe9\n", encoding="latin-1")
    with pytest.raises(ConfigError, match=r"README\.md is not in UTF-8.* save it in that"):
        save_pretrained(model, tmp_path, reports={"me/digits": paired("tome")})
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"], "said before anything is saved"


# -- results ---------------------------------------------------------------------------------------------------------


def test_results_are_those_of_this_run_and_go_with_its_config() -> None:
    model, config, report = vit(), ToMeConfig(), paired("tome", "uniform")
    theirs = "---\nmodel-index:\n- name: theirs\n  results:\n  - task: {type: x}\n    dataset: {type: d, name: D}\n"
    theirs += "    metrics: [{type: accuracy, value: 0.5}]\n---\n# Theirs\n"
    card = model_card(model, config, "me/x", ModelCard(theirs), reports={"me/digits": report})
    own = card.data.eval_results[1:]
    row = report.rows[1]
    assert {result.metric_type: result.metric_value for result in own} == {
        **{"accuracy": row.accuracy, "top5_accuracy": row.top5_accuracy, "agreement": row.agreement, "kl": row.kl},
    }
    assert {(result.dataset_type, result.task_type) for result in own} == {("me/digits", "image-classification")}
    assert report.to_markdown() in card.text
    again = model_card(model, config, "me/x", ModelCard(str(card)))  # pushed again, the same config
    assert str(again) == str(card)
    other = model_card(model, ToMeConfig(r=0.5), "me/x", ModelCard(str(card)))
    (left,) = other.data.eval_results
    assert left.dataset_name == "D" and "### Evaluation" not in other.text and other.data.model_name == "theirs"
    new = model_card(model, config, "me/x", ModelCard(str(card)), reports={"me/letters": paired("any name")})
    assert {result.dataset_name for result in new.data.eval_results} == {"D", "me/letters"}
    assert "me/digits" not in new.text


def test_a_report_that_does_not_say_which_run_it_is() -> None:
    with pytest.raises(ConfigError, match="the pruned runs a, b, none of them called 'tome'"):
        model_card(vit(), ToMeConfig(), "me/x", reports={"me/digits": paired("a", "b")})


def test_it_is_said_before_anything_is_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of them called 'tome'"):
        save_pretrained(prune(vit(), "tome"), tmp_path / "new", reports={"me/digits": paired("a", "b")})
    with pytest.raises(ConfigError, match="repo_id='a/b/c': expected owner/name"):
        save_pretrained(prune(vit(), "tome"), tmp_path / "new", push_to_hub=True, repo_id="a/b/c")
    assert not (tmp_path / "new").exists()


def test_reports_of_answers_and_of_retrieval() -> None:
    questions = QuestionDataset([None] * 2, ["?"] * 2, [("yes",), ("no",)], [None] * 2)  # type: ignore[arg-type]
    answers = AnswersReport.from_answers(
        questions, Answers(("yes", "no"), 1.0), {"divprune": Answers(("yes", "yes"), 1.0, kl=(0.25, 0.75))}
    )
    recalls = RetrievalRow("dense", (Recall(1, 0.5),), (Recall(1, 0.25),))
    retrieval = RetrievalReport((recalls, dataclasses.replace(recalls, name="divprune")), images=4, captions=4)
    card = model_card(
        tiny_vlm("llava"),
        PruneConfig.for_method("divprune", keep_ratio=0.5),
        "me/x",
        reports={"q": answers, "r": retrieval},
    )
    assert {(each.dataset_type, each.metric_type): each.metric_value for each in card.data.eval_results} == {
        **{("q", "exact_match"): 0.5, ("q", "agreement"): 0.5, ("q", "kl"): 0.5},
        **{("r", "image_to_text_recall_at_1"): 0.5, ("r", "text_to_image_recall_at_1"): 0.25},
    }


def test_reports_without_a_push_write_the_card_beside_the_model(tmp_path: Path) -> None:
    model = prune(vit(), "tome")
    save_pretrained(model, tmp_path)
    assert not (tmp_path / "README.md").exists(), "as stock saving"
    (tmp_path / "README.md").write_text("# Mine\n")
    save_pretrained(model, tmp_path, reports={"me/digits": paired("tome")})
    text = (tmp_path / "README.md").read_text()
    assert "# Mine" in text and "On me/digits: 40 images" in text
    assert unprune(model) is model


def test_words_behind_a_mark_whose_end_is_lost_stay() -> None:
    config = UniformConfig()
    card = ModelCard(f"# A\n{BEGIN}\nold\n\n## My own words\nprecious\n")
    for _ in range(3):
        card = model_card(vit(), config, "me/r", card)
        assert "precious" in card.text
    assert card.text.count(END) == 1


def test_a_config_beside_a_model_says_so_and_a_model_beside_a_config_too() -> None:
    config = UniformConfig()
    card = config_card(config, "me/r", model_card(vit(), config, "me/r"), beside="model")
    assert "There is no model here" not in card.text and card.data["library_name"] == "transformers"
    alone = config_card(config, "me/r")
    assert "There is no model here" in alone.text and alone.data["library_name"] == "hf_tokenprune"
    assert model_card(vit(), config, "me/r", alone).data["library_name"] == "transformers"
