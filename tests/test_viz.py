"""``viz``: the picture and the page are there, and the page needs nothing outside it."""

import base64
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import ViTForImageClassification
from typer.testing import CliRunner, Result

from hf_tokenprune import PruneConfig
from hf_tokenprune.cli import app
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.demo.mosaics import CLIP_DIR, LLAVA_DIR, Mosaics, digit_pictures

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
pytest.importorskip("matplotlib", reason="pictures need it: pip install hf-tokenprune[plot]")
VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """A page as a tree that closes, with what its elements refer to and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.references: list[str] = []
        self.data = ""
        self.feed(text)
        assert not self.open, "not closed"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.references += [str(value) for name, value in attributes if name in ("src", "href", "action", "data")]
        self.is_data = dict(attributes).get("id") == "data"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script" and self.is_data:
            self.data += data


def viz(*args: object) -> Result:
    return CliRunner().invoke(app, ["viz", *map(str, args)])


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digit.png"
    load_digits_split("test")[0]["image"].save(path)
    return path


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "mosaic.png"
    Mosaics(digit_pictures("test"), 1)[0].image.save(path)
    return path


def page_of(path: Path) -> dict[str, Any]:
    """What a page shows, which refers to nothing outside it."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.references and not re.search(r"https?:|url\(|@import|fetch\(|XMLHttp", text), "nothing outside"
    assert page.seen.count("script") == 2 and "link" not in page.seen
    found: dict[str, Any] = json.loads(page.data)
    return found


@pytest.mark.slow
def test_a_picture_and_a_page_of_two_methods(digit: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "kept.png"
    nasty = "</script><b>&"
    chosen = ("-m", "tome", "-m", "zero_tprune", "-g", 0.12, "--expected", nasty, "--html", "--json")
    result = viz(MODEL_DIR, digit, *chosen, "--out", out)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["files"] == [str(out), str(out.with_suffix(".html"))]
    model = ViTForImageClassification.from_pretrained(MODEL_DIR)
    _, tome, zero = found["runs"]
    assert tome["name"] == "tome@0.12" and not zero["right"]
    assert tome["macs"] == cost(model, tome["config"]).pruned.macs <= 0.12e9
    assert Image.open(out).width > 600

    data = page_of(out.with_suffix(".html"))
    assert nasty in data["asked"] and [run["name"] for run in data["runs"]] == [
        "dense",
        "tome@0.12",
        "zero_tprune@0.12",
    ]
    assert data["places"] == ["as it came", *(f"behind block {i}" for i in range(6))]
    for run, told in zip(data["runs"], found["runs"], strict=True):
        assert len(run["at"]) == len(data["places"])
        left = dict(told["steps"])
        expected, shown = 196, []
        for i in range(6):
            expected = left.get(f"block {i}", [expected])[0]
            shown.append(expected)
        assert [run["pictures"][i]["kept"] for i in run["at"]] == [196, *shown]
        for each in run["pictures"]:
            kind, _, code = each["source"].partition(",")
            assert kind == "data:image/jpeg;base64" and Image.open(BytesIO(base64.b64decode(code))).size == (336, 336)
    assert {run["verdict"] for run in data["runs"]} == {"changed"} and json.loads(data["runs"][1]["config"]) == tome[
        "config"
    ]


def test_a_question_to_a_vision_language_model(mosaic: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    question = ("--question", "what is at row 1 column 1 ?", "--new-tokens", 4)
    result = viz(LLAVA_DIR, mosaic, "-m", "divprune", "-m", "fastv", "-s", "keep_ratio=0.5", *question, "--out", out)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and "of 256 tokens" in result.output
    data = page_of(out)
    assert data["places"][:3] == ["as it came", "behind the entrance", "behind layer 0"]
    divprune, fastv = ([run["pictures"][i]["kept"] for i in run["at"]] for run in data["runs"][1:])
    behind = data["places"].index(f"behind layer {PruneConfig.for_method('fastv').layer}")
    assert set(divprune[1:]) == {128} and set(fastv[:behind]) == {256} and set(fastv[behind:]) == {128}


@pytest.mark.parametrize("show", ["importance", "chart"])
@pytest.mark.slow
def test_other_pictures_in_other_formats(show: str, digit: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.svg"
    result = viz(MODEL_DIR, digit, "-m", "evit", "--show", show, "--out", out)
    assert result.exit_code == 0 and "<svg" in out.read_text(), result.output


@pytest.mark.slow
def test_classes_of_a_model_with_a_text_tower(mosaic: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("1\n2\n3\n")
    args = CLIP_DIR, mosaic, "-m", "tome", "--class-names", tmp_path / "names.txt", "--out", tmp_path / "a.png"
    result, other = (viz(*args, "--template", template) for template in ("the {}", "one {} among others"))
    assert result.exit_code == 0 and other.exit_code == 0, result.output + other.output
    assert "dense: 256 of 256 tokens" in result.output and other.output != result.output
    alike = viz(*args)  # the packaged tokenizer knows no "photo", and no digit with a full stop
    assert alike.exit_code == 1 and "the texts of all 3 classes are one to the model" in alike.output


def test_a_template_needs_names(mosaic: Path, tmp_path: Path) -> None:
    result = viz(CLIP_DIR, mosaic, "-m", "tome", "--template", "a {}", "--out", tmp_path / "a.png")
    assert result.exit_code == 1 and "--template has no effect without --class-names" in result.stderr


def test_without_class_names_it_is_said_what_is_missing(mosaic: Path, tmp_path: Path) -> None:
    result = viz(CLIP_DIR, mosaic, "-m", "tome", "--out", tmp_path / "a.html")
    assert result.exit_code == 0 and "give --class-names FILE" in result.stderr
    assert [kind for _, kind in page_of(tmp_path / "a.html")["legend"]] == ["kept", "merged: one colour, one token"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((MODEL_DIR, "--out", "a.gif"), "--out a.gif: expected a name that ends in .png"),
        ((MODEL_DIR, "--out", "a.png", "--show", "all"), "--show all: expected one of tokens"),
        ((MODEL_DIR, "--out", "a.png", "--question", "what ?"), "--question has no effect on a model that answers no"),
        ((LLAVA_DIR, "--out", "a.png"), "give --question TEXT"),
        ((LLAVA_DIR, "--out", "a.png", "--question", "what ?", "-m", "tome"), "method 'tome' works on vision encoders"),
        ((MODEL_DIR, "--out", "a.png", "-m", "tome", "-g", "0.001"), "out of reach"),
    ],
)
def test_mistakes_get_one_line_that_helps(
    arguments: tuple, words: str, digit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, *options = arguments
    result = viz(model, digit, *options)
    assert result.exit_code == 1 and words in result.output and not [*tmp_path.iterdir()]
