"""Labels that come as names: found among the model's own, whatever their order and number, or refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from hf_tokenprune.cli import app
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.errors import ConfigError, DataError
from hf_tokenprune.evaluation import ImageDataset, load_images
from hf_tokenprune.evaluation.accelerator import accelerator_on
from hf_tokenprune.evaluation.classes import in_classes_of
from hf_tokenprune.evaluation.preprocess import PreprocessedImages

datasets = pytest.importorskip("datasets")
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
NAMES = dict(enumerate(["tench, Tinca tinca", "crane", "crane", "maillot", "maillot, tank suit", "great white_shark"]))
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def named(*classes: str) -> ImageDataset:
    n = len(classes)
    return ImageDataset([None] * n, list(classes), list(range(n)), classes)


def labels(images: ImageDataset, names: dict[int, str] = NAMES) -> list[int | None]:
    found, how = in_classes_of(images, names)
    assert how == "classes by name" and found.classes is None
    return list(found.labels)


def test_names_in_another_order_and_fewer() -> None:
    assert labels(named("maillot", "tench, Tinca tinca")) == [3, 0]
    assert labels(named("Great-White Shark", "TINCA_TINCA", "tank suit")) == [5, 0, 4]


def test_a_name_of_several_classes_is_taken_by_its_place_if_the_others_are_in_theirs() -> None:
    assert labels(named("tench", "crane", "crane2", "maillot", "tank suit", "great white shark")) == list(range(6))
    for classes in (("crane",), ("crane", "tench", "crane2", "maillot", "tank suit", "great white shark")):
        with pytest.raises(DataError, match=r"'crane' \(classes \[1, 2\]\)"):
            labels(named(*classes))


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (("tench", "shark"), r"1 of 2 classes .* 'shark' \(none\); call them as the model does.*--no-labels"),
        (("a", "b", "c", "d", "e", "f"), "6 of 6 classes"),  # as many, and no reason to take them in this order
        (("tench", "Tinca tinca"), "'tench', 'Tinca tinca' are one class"),
        (("n01440764",), "WordNet ids have an order only if all 1000 are there"),
    ],
)
def test_what_is_refused(classes: tuple[str, ...], says: str) -> None:
    with pytest.raises(DataError, match=says):
        labels(named(*classes))


def test_all_wordnet_ids_are_in_their_order() -> None:
    ids = [f"n{7919 * (999 - i) % 10**8:08d}" for i in range(1000)]
    names = {i: f"class {i}" for i in range(1000)}
    found, how = in_classes_of(named(*ids), names)
    assert how is not None and "1000 WordNet ids" in how
    assert [found.labels[i] for i in sorted(range(1000), key=ids.__getitem__)] == list(range(1000))
    with pytest.raises(DataError):
        in_classes_of(named(*ids[:999]), names)


@pytest.mark.parametrize("names", [None, {i: f"class {i}" for i in range(12)}, {i: f"{i}" for i in range(12)}])
def test_numbers_are_class_numbers_and_never_sorted_as_text(names: dict[int, str] | None, tmp_path: Path) -> None:
    for number in ("0", "1", "2", "007", "10", "11"):
        (tmp_path / number).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / number / "x.png")
    images = load_images(tmp_path)
    assert images.classes == ("0", "1", "2", "007", "10", "11")
    if names == {i: f"{i}" for i in range(12)}:  # 007 is a name here, and not one of the model
        with pytest.raises(DataError, match="1 of 6 classes"):
            in_classes_of(images, names)
        return
    by_text = replace(images, classes=("0", "007", "1", "10", "11", "2"))  # as a ClassLabel has them
    for given, expected in ((images, [0, 1, 2, 7, 10, 11]), (by_text, [0, 7, 1, 10, 11, 2])):
        found, how = in_classes_of(replace(given, labels=range(6)), names)
        assert (list(found.labels), found.classes, how) == (expected, None, "classes by number")


def test_numbers_that_are_names_of_the_model_are_names() -> None:
    assert labels(named("3", "1"), {0: "1", 1: "2", 2: "3"}) == [2, 0]
    with pytest.raises(DataError, match="1 of 2 classes"):
        labels(named("0", "1"), {0: "1", 1: "2"})


def test_a_class_number_that_the_model_has_not(tmp_path: Path) -> None:
    (tmp_path / "10").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "10" / "x.png")
    found, _ = in_classes_of(load_images(tmp_path), None)
    with pytest.raises(DataError, match=r"label 10 is outside the model's 10 classes"):
        PreprocessedImages(found, lambda **_: {}).check_labels(10)


@pytest.mark.parametrize("column", ["image_column", "label_column"])
def test_a_column_of_a_folder_is_refused(column: str, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(DataError, match=f"{column}='x' has no effect on the files in"):
        load_images(tmp_path, **{column: "x"})


@pytest.mark.parametrize("command", ["eval", "compare", "search"])
def test_class_names_in_another_encoding_are_one_line(command: str, tmp_path: Path) -> None:
    from hf_tokenprune.demo.mosaics import CLIP_DIR

    (tmp_path / "cat").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "cat" / "1.png")
    (tmp_path / "names.txt").write_bytes("Käse".encode("latin-1"))
    given = [command, str(CLIP_DIR), str(tmp_path), "-m", "tome", "--class-names", str(tmp_path / "names.txt")]
    given += [] if command == "eval" else ["--out", str(tmp_path / "out"), "-g", "0.2"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert "names.txt: not a text file in UTF-8" in result.output


def test_labels_are_left_out_in_the_words_of_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\nx.png,0.5\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    result = CliRunner().invoke(app, ["eval", str(MODEL_DIR), str(tmp_path), "-m", "tome"])
    assert "--no-labels" in result.output and "label_column" not in result.output
    result = CliRunner().invoke(app, ["eval", str(MODEL_DIR), str(tmp_path), "-m", "tome", "--label-column", "k"])
    assert "(--label-column), or evaluate without labels (--no-labels)" in result.output


def test_splits_are_no_classes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / split / "cat" / "1.png")
    with pytest.raises(DataError, match="holds the splits 'train', 'val'; name one"):
        load_images(tmp_path)
    assert load_images(tmp_path, split="val").classes == ("cat",)


# -- from a shell


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def evaluated(source: Path, *options: object) -> dict[str, Any]:
    result = run("eval", MODEL_DIR, source, "-m", "random", "--json", *options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def digits() -> list[dict[str, Any]]:
    split = load_digits_split("test")
    return [split[i] for i in range(12)]


def test_one_set_in_every_form_has_one_accuracy(digits: list[dict[str, Any]], tmp_path: Path) -> None:
    numbers = [int(digit["label"]) for digit in digits]
    folders, listed = tmp_path / "folders", tmp_path / "listed"
    listed.mkdir()
    for i, (digit, number) in enumerate(zip(digits, numbers, strict=True)):
        (folders / str(number)).mkdir(parents=True, exist_ok=True)
        digit["image"].save(folders / str(number) / f"{i}.png")
        digit["image"].save(listed / f"{i}.png")
    assert len(list(folders.iterdir())) < 10, "fewer classes than the model has"
    lines = [f"{i}.png,{number},{WORDS[number]}" for i, number in enumerate(numbers)]
    (listed / "labels.csv").write_text("\n".join(["file,which,word", *lines]))
    order = [str(i) for i in (3, 1, 4, 5, 9, 2, 6, 8, 7, 0)]
    features = datasets.Features({"img": datasets.Image(), "digit": datasets.ClassLabel(names=order)})
    rows = {"img": [digit["image"] for digit in digits], "digit": [order.index(str(number)) for number in numbers]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / "test.parquet")

    expected = evaluated(listed, "--label-column", "which")
    assert expected["classes"] is None and expected["rows"][0]["accuracy"] >= 0.8
    columns = ("--image-column", "img", "--label-column", "digit")
    for found in (
        evaluated(folders),
        evaluated(tmp_path / "set", *columns),
        evaluated(tmp_path / "set" / "test.parquet", *columns),
    ):
        assert found["classes"] == "classes by name" and found["labelled"] == 12
        for row, other in zip(found["rows"], expected["rows"], strict=True):
            assert row["accuracy"] == other["accuracy"]
    without = evaluated(listed, "--no-labels", "--device", "cpu", "--dtype", "bfloat16")
    assert without["labelled"] == 0 and without["rows"][1]["accuracy"] is None and without["rows"][1]["kl"] > 0
    for options, says in (
        ((), "--label-column"),
        (("--label-column", "word"), "are not one class of the model"),
        (("--label-column", "which", "--no-labels"), "has no effect with --no-labels"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--dtype", "int8"), "--dtype int8: expected"),
    ):
        refused = run("eval", MODEL_DIR, listed, "-m", "random", *options)
        assert refused.exit_code == 1 and says in refused.output, refused.output


def test_a_device_and_several_processes_contradict_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(num_processes=2, device="one of two", is_main_process=True)
    monkeypatch.setattr("accelerate.Accelerator", lambda: accelerator)
    assert accelerator_on(None) is accelerator
    with pytest.raises(ConfigError, match="--device cpu: a launcher started 2 processes"):
        accelerator_on(torch.device("cpu"))
    accelerator.num_processes = 1
    placed = accelerator_on(torch.device("meta"))
    assert placed.device.type == "meta" and placed.is_main_process and accelerator.device == "one of two"
