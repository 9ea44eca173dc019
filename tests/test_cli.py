"""The command line as a user has it: what it prints, what it writes, what it says when something is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoProcessor, LlavaConfig
from typer.testing import CliRunner, Result

from hf_tokenprune import (
    DivPruneConfig,
    PruneConfig,
    RandomConfig,
    from_pretrained,
    get_preset,
    list_adapters,
    list_methods,
    list_presets,
    record,
)
from hf_tokenprune.cli import app
from hf_tokenprune.cli.options import parse_fields
from hf_tokenprune.config import FORMAT_VERSION
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.engine import default_config
from hf_tokenprune.registry import get_method

from .decoder_families import FAMILIES, small_size, tiny_vlm
from .llava_checkpoint import save_tiny_llava

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
DIGITS = str(MODEL_DIR)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty digits with a labels.csv."""
    path = tmp_path_factory.mktemp("digits")
    digits, rows = load_digits_split("test"), ["file,label"]
    for i in range(20):
        digits[i]["image"].save(path / f"{i}.png")
        rows.append(f"{i}.png,{digits[i]['label']}")
    (path / "labels.csv").write_text("\n".join(rows))
    return path


def test_list() -> None:
    data = json.loads(ok("list", "--json"))
    assert list(data["methods"]) == list_methods() and data["adapters"] == list_adapters()
    assert data["methods"]["divprune"]["keep_ratio"] == 0.098
    for kind in ("vision", "decoder"):
        assert [name for name, prunes in data["prunes"].items() if kind in prunes] == list_methods(kind)
    text = ok("list")
    assert all(name in text for name in [*list_methods(), *list_adapters()])
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert " decoder, vision " in rows["random"] and " vision " not in rows["divprune"]


def test_presets_lists_all_of_them_or_those_asked_for() -> None:
    data = json.loads(ok("presets", "--json"))
    assert list(data) == list_presets() and len(data) > 100
    assert all(PruneConfig.from_dict(entry["config"]) == get_preset(name).config for name, entry in data.items())
    some = json.loads(ok("presets", "-m", "tome", "--model", "deit-small", "--json"))
    assert list(some) == [name for name in list_presets() if name.startswith("tome/deit-small@")] and some
    text = ok("presets", "-m", "tome", "--model", "deit-small")
    assert [line.split()[0] for line in text.splitlines()[: len(some)]] == list(some)
    none = run("presets", "--model", "resnet")
    assert none.exit_code == 1 and "--model resnet; there are presets of" in none.output


def test_list_shows_every_field_with_its_default() -> None:
    """As -s takes it, so a line can be copied."""
    shown: dict[str, dict[str, Any]] = {}
    name = ""
    for line in ok("list").partition("model families")[0].splitlines()[1:]:
        if line.startswith("      "):
            shown[name].update(parse_fields(line.split()))
        else:
            name = line.split()[0]
            shown[name] = {}
    assert list(shown) == list_methods()
    for name, fields in shown.items():
        assert {"method": name, "format_version": FORMAT_VERSION, **fields} == get_method(name)().to_dict()


@pytest.mark.parametrize("family", ["vit", "llava"])
def test_without_a_method_it_is_what_prune_takes(tmp_path: Path, family: str) -> None:
    if family == "vit":
        path, model = DIGITS, AutoModelForImageClassification.from_pretrained(DIGITS)
    else:
        path, model = str(tmp_path), tiny_vlm(family)
        model.save_pretrained(path)
    expected = default_config(model)
    result = run("info", path, "--json")
    (row,) = json.loads(result.stdout).values()
    assert row["config"] == expected.to_dict()
    assert f"what prune(model) takes: {expected}" in result.stderr


def test_info_counts_tokens_and_macs() -> None:
    data = json.loads(ok("info", DIGITS, "-m", "random", "-s", "keep_ratios=0.5", "-s", "layers=[0,2]", "--json"))
    assert data["random"]["tokens_in"] == [197, 99, 99, 50, 50, 50]
    assert data["random"]["config"]["layers"] == [0, 2]
    assert "ideal speed-up" in ok("info", DIGITS, "-m", "random")


def test_several_methods_meet_several_budgets() -> None:
    names = ["random", "uniform", "zero_tprune"]
    methods = [part for name in names for part in ("-m", name)]
    data = json.loads(ok("info", DIGITS, *methods, "-g", 0.15, "-g", 0.1, "--json"))
    assert set(data) == {f"{name}@{budget}" for name in names for budget in ("0.15", "0.1")}
    for name, report in data.items():
        assert 0.95 <= report["pruned_macs"] / (float(name.split("@")[1]) * 1e9) <= 1.0


def test_apply_writes_a_checkpoint_that_prunes(tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    ok("apply", DIGITS, out, "-m", "random", "-s", "where=mid_block")
    assert (out / "prune_config.json").is_file() and (out / "preprocessor_config.json").is_file()
    assert not list(out.glob("*.bin")) and (out / "model.safetensors").is_file()
    model = from_pretrained(out)
    with record(model) as rec, torch.no_grad():
        model(torch.zeros(1, 3, 56, 56))
    assert rec.tokens[5] < rec.tokens[0] == 197
    assert json.loads(ok("info", out, "--json"))["random"]["config"]["where"] == "mid_block", "its own config"
    again = run("apply", DIGITS, out, "-m", "random")
    assert again.exit_code == 1 and "not an empty folder" in again.output


def test_apply_without_a_processor_says_so(tmp_path: Path) -> None:
    bare, out = tmp_path / "bare", tmp_path / "pruned"
    AutoModelForImageClassification.from_pretrained(DIGITS).save_pretrained(bare)
    result = run("apply", bare, out, "-m", "random", "--json")
    assert result.exit_code == 0
    assert "no processor was copied" in result.stderr and "preprocessor_config.json" in result.stderr
    assert json.loads(result.stdout)["path"] == str(out) and (out / "prune_config.json").is_file()


def test_eval_pairs_dense_and_pruned(folder: Path) -> None:
    data = json.loads(ok("eval", DIGITS, folder, "-m", "random", "-m", "zero_tprune", "--json"))
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == ["dense", "random", "zero_tprune"]
    assert all(row["n"] == 20 for row in rows.values())
    assert rows["dense"]["accuracy"] >= 0.9
    assert rows["random"]["macs"] < rows["dense"]["macs"]
    assert data["configs"]["zero_tprune"]["method"] == "zero_tprune"
    table = ok("eval", DIGITS, folder, "-m", "random", "--limit", 5, "--markdown")
    assert table.count("|") > 20


def test_bench_reports_beside_the_ideal() -> None:
    data = json.loads(ok("bench", DIGITS, "-m", "random", "-b", 1, "-b", 2, "--rounds", 1, "--threads", 1, "--json"))
    assert [row["batch_size"] for row in data["random"]["rows"]] == [1, 2]
    assert data["random"]["macs"]["ideal_speedup"] > 1
    text = ok("bench", DIGITS, "-m", "random", "-b", 1, "--rounds", 1, "--random-weights", "--dtype", "bfloat16")
    assert "bfloat16" in text


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    data = json.loads(ok("demo", "--out", tmp_path, "--limit", 24, "--json"))
    for part, kind, some in (
        ("digits", "vision", {"random", "zero_tprune"}),
        ("clip", "vision", {"random", "salience_merge"}),
        ("llava", "decoder", {"divprune", "transprune"}),
    ):
        names = [row["name"] for row in data[part]["rows"]]
        assert names[0] == "dense" and some < set(names[1:])
        assert set(names[1:]) - {"visionzip + transprune"} <= set(list_methods(kind))
    assert len(data["pictures"]) == 2
    assert all(Path(picture).stat().st_size > 1000 for picture in data["pictures"])
    assert (Path(data["checkpoint"]) / "prune_config.json").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("info", DIGITS, "-m", "zero"), "no such method"),
        (("info", DIGITS, "-m", "random", "-s", "keep_ratio=0.5"), "did you mean 'keep_ratios'"),
        (("info", DIGITS, "-m", "random", "-s", "keep_ratios"), "expected field=value"),
        (("info", DIGITS, "-m", "random", "-s", "layers=[9]", "-s", "keep_ratios=0.5"), "has 6 blocks"),
        (("info", DIGITS, "-m", "random", "-g", 5), "less than the dense model's"),
        (("info", DIGITS, "-m", "random", "-s", "layers=None"), "--set layers=None: values are JSON, null"),
        (("info", DIGITS, "-m", "exact", "-m", "tome", "-s", "r=3"), "no field 'r'"),
        (("info", DIGITS, "-m", "exact", "-m", "tome", "-s", "r=3"), "--set is for every --method"),
        (("info", DIGITS, "-s", "seed=1"), "no effect without --method"),
        (("info", DIGITS, "-m", "divprune"), "works on vision-language models"),
        (("info", DIGITS, "-m", "random", "--text-tokens", 9), "--text-tokens 9: has no effect"),
        (("bench", DIGITS, "-m", "random", "--new-tokens", 9), "--new-tokens 9: has no effect"),
        (("info", DIGITS, "-c", "/no/such/file.json"), "/no/such/file.json"),
        (("eval", DIGITS, "/no/such/folder", "-m", "random"), "/no/such/folder"),
        (("bench", DIGITS, "-m", "random", "--dtype", "int8"), "--dtype int8: expected float32, bfloat16 or float16"),
        (("apply", DIGITS, "/tmp/never", "-m", "random", "-m", "uniform"), "choose one"),
        (("apply", DIGITS, "/tmp/never", "-m", "random", "--push", "a/b/c"), "expected owner/name"),
        (("push", DIGITS, "me/never", "-m", "random", "-m", "uniform"), "push uploads one config, got 2"),
        (("push", DIGITS, "me/never", "-m", "divprune"), "works on vision-language models"),
        (("push", "/no/such/folder", "me/never"), "/no/such/folder"),
        (("push", DIGITS, "a/b/c"), "expected owner/name"),
    ],
)
def test_mistakes_get_one_line_that_helps(args: tuple, words: str) -> None:
    result = run(*args)
    assert result.exit_code == 1
    assert words in result.output and "Traceback" not in result.output


def test_a_push_that_cannot_be_meant_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments the other way round; an adapter, which no command takes for a model."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("adapter").mkdir()
    Path("adapter", "adapter_config.json").write_text("{}")
    for args, words in (
        (("push", "me/digits", "model"), "the folder comes first, then the repository, owner/name"),
        (("push", "me/digits", "./model"), "the folder comes first"),
        (("push", "adapter", "me/digits"), "`hf upload me/digits adapter` uploads it"),
        (("info", "adapter"), "holds an adapter of PEFT and no model"),
        (("serve", "adapter"), "merge_and_unload()"),
        (("push", "nowhere", "me/x"), "installation#offline-mode"),
    ):
        result = run(*args)
        assert result.exit_code == 1 and words in result.output and "Traceback" not in result.output


def test_a_corrupted_image_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\ngood.png,1\nbad.png,2\n")
    (tmp_path / "good.png").write_bytes((folder / "0.png").read_bytes())
    (tmp_path / "bad.png").write_bytes((folder / "1.png").read_bytes()[:100])
    result = run("eval", DIGITS, tmp_path, "-m", "random")
    assert result.exit_code == 1 and "bad.png" in result.output


def test_config_file_by_path(tmp_path: Path) -> None:
    path = RandomConfig(keep_ratios=0.5).save_pretrained(tmp_path / "half")
    for source in (path, path.parent):
        data = json.loads(ok("info", DIGITS, "-c", source, "--json"))
        (report,) = data.values()
        assert report["config"]["keep_ratios"] == 0.5


# -- vision-language models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.5-7B with no weights: a folder with a config.json."""
    path = tmp_path_factory.mktemp("sizes")
    LlavaConfig(architectures=["LlavaForConditionalGeneration"]).save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return path


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny one with weights and processor."""
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


def test_info_counts_prefill_decode_and_cache(sizes: Path) -> None:
    arguments = ("info", sizes, "-m", "transprune", "--text-tokens", 40, "--new-tokens", 8)
    data = json.loads(ok(*arguments, "--json"))["transprune"]
    assert data["tokens_in"] == [616] * 7 + [544] * 2 + [400] * 3 + [112] * 20
    assert (data["text_tokens"], data["new_tokens"]) == (40, 8)
    assert max(data["ratio"], data["kv_ratio"]) < data["decode_ratio"] < 1
    text = ok(*arguments)
    assert "KV cache" in text and "text tokens in, 8 new tokens out" in text


def test_budgets_are_of_the_prefill_with_its_text(sizes: Path) -> None:
    data = json.loads(
        ok("info", sizes, "-m", "divprune", "-m", "transprune", "-g", 2500, "--text-tokens", 99, "--json")
    )
    for report in data.values():
        assert 0.97 <= report["pruned_macs"] / 2.5e12 <= 1


def test_apply_writes_a_vision_language_checkpoint_with_its_processor(llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    assert "GMACs an image" in ok("apply", llava, out, "-m", "divprune", "-s", "keep_ratio=0.25")
    model, processor = from_pretrained(out), AutoProcessor.from_pretrained(out)
    photo = Image.radial_gradient("L").convert("RGB")
    inputs = processor(images=[photo], text=["USER: <image> what is this ? ASSISTANT:"], return_tensors="pt")
    with record(model) as rec:
        model.generate(**inputs, max_new_tokens=2)
    assert rec.kept["entrance"].shape == (1, 144)
    assert not list(out.glob("*.bin")) and (out / "model.safetensors").is_file()
    assert json.loads(ok("info", out, "--json"))["divprune"]["config"]["keep_ratio"] == 0.25


def test_bench_splits_prefill_and_decode(llava: Path) -> None:
    arguments = ("bench", llava, "-m", "divprune", "-b", 1, "--rounds", 1, "--text-tokens", 5, "--new-tokens", 2)
    data = json.loads(ok(*arguments, "--json"))["divprune"]
    (row,) = data["rows"]
    assert all(row[part]["dense_seconds"] > 0 for part in ("prefill", "decode", "end_to_end"))
    assert (data["macs"]["text_tokens"], data["macs"]["new_tokens"]) == (5, 2)
    text = ok(*arguments, "--random-weights", "--dtype", "bfloat16")
    assert "decode a token" in text and "bfloat16" in text


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_info_and_bench_of_every_family(family: str, tmp_path: Path) -> None:
    """On a checkpoint in a folder, at a size where images may have any."""
    model = tiny_vlm(family)
    model.save_pretrained(tmp_path)
    size = small_size(model)
    common = (tmp_path, "-m", "divprune", "-s", "keep_ratio=0.4", "--text-tokens", 5, "--new-tokens", 2)
    common += ("--image-size", "{}x{}".format(*size)) if size else ()
    expected = cost(model, DivPruneConfig(keep_ratio=0.4), size, text_tokens=5, new_tokens=2).to_dict()
    info = json.loads(ok("info", *common, "--json"))["divprune"]
    bench = json.loads(ok("bench", *common, "-b", 1, "--rounds", 1, "--random-weights", "--json"))["divprune"]
    assert {name: info[name] for name in expected} == bench["macs"] == expected
    (scaled,) = json.loads(ok("info", *common, "-g", 0.9e-9 * expected["dense_macs"], "--json")).values()
    assert scaled["pruned_macs"] <= 0.9 * expected["dense_macs"]


@pytest.mark.parametrize("size", ["400", "4x", "400,300"])
def test_image_sizes_are_two_numbers(sizes: Path, size: str) -> None:
    result = run("info", sizes, "-m", "divprune", "--image-size", size)
    assert result.exit_code == 1 and f"--image-size {size}: expected HEIGHTxWIDTH in pixels" in result.output


def test_eval_of_a_vision_language_model_needs_questions_and_compare_takes_none(
    sizes: Path, folder: Path, tmp_path: Path
) -> None:
    result = run("eval", sizes, folder, "-m", "divprune")
    assert result.exit_code == 1 and "write a questions.jsonl" in result.output
    result = run("compare", sizes, folder, "-m", "divprune", "-g", 1, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "is a vision-language model, and compare measures image classification" in result.output


def test_eval_of_clip_is_zero_shot(tmp_path: Path) -> None:
    """Class names come from the folders' names, or from a file; a classifier of its own takes none."""
    from .clip_checkpoint import save_tiny_clip

    clip = save_tiny_clip(tmp_path / "clip")
    for i, name in enumerate(["cat", "dog"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (40, 40), (90 * i, 80 * j, 50)).save(tmp_path / "images" / name / f"{j}.png")
    data = json.loads(ok("eval", clip, tmp_path / "images", "-m", "uniform", "--json"))
    assert [row["name"] for row in data["rows"]] == ["dense", "uniform"]
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    again = json.loads(ok("eval", clip, tmp_path / "images", "-m", "uniform", "--class-names", names, "--json"))
    assert again["rows"][1]["kl"] == data["rows"][1]["kl"]
    refused = run("eval", DIGITS, tmp_path / "images", "-m", "uniform", "--class-names", names)
    assert refused.exit_code == 1
    assert "--class-names has no effect" in refused.output


def test_search_finds_a_config_on_images_and_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    command = ("search", DIGITS, folder, "--out", tmp_path / "found", "-m", "salience_merge", "-g", 0.13)
    options = ("--limit", 10, "--batch-size", 5, "--strategy", "coordinate", "--trials", 3)
    data = json.loads(ok(*command, *options, "--json"))
    assert data["cost"] <= data["budget"] == 0.13e9 and data["settings"]["inputs"] == 10 and data["measured"] > 0
    written = json.loads((tmp_path / "found" / "search.json").read_text())
    assert written == data
    assert PruneConfig.from_pretrained(tmp_path / "found").to_dict() == data["config"]
    again = json.loads(ok(*command, *options, "--json"))
    assert again["config"] == data["config"] and again["measured"] == 0
    text = ok(*command, *options)
    assert "the rule of salience_merge at this budget: geometric_kl" in text and "GMACs (budget 0.130)" in text
    evaluated = json.loads(ok("eval", DIGITS, folder, "-c", tmp_path / "found", "--json"))
    assert [row["name"] for row in evaluated["rows"]] == ["dense", "found"]


@pytest.mark.parametrize(
    ("options", "free"),
    [
        ((), ["exact_last_block", "where"]),
        (("-s", "where=mid_block"), ["exact_last_block"]),  # its default, but said
        (("--free", "none"), []),
        (("-s", "where=mid_block", "--free", "where", "--free", "proportional_attention"), None),
    ],
)
def test_what_a_search_chooses_beside_the_counts(
    folder: Path, tmp_path: Path, options: tuple, free: list[str] | None
) -> None:
    command = ("search", DIGITS, folder, "--out", tmp_path / "found", "-m", "tome", "-g", 0.13, "--json", *options)
    data = json.loads(ok(*command, "--limit", 6, "--strategy", "monte_carlo", "--trials", 1))
    assert data["settings"]["free"] == (["where", "proportional_attention"] if free is None else free)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "give one of --gmacs, --ms and --speedup, got none"),
        (("-g", 0.1, "--ms", 5), "got --gmacs, --ms"),
        (("-g", 0.1, "--goal", "speed"), "--goal speed: expected one of geometric_kl, kl"),
        (("-g", 0.1, "--strategy", "guess"), "--strategy guess: expected one of dynamic"),
        (("-g", 0.1, "-s", "exact_last=true"), "no field 'exact_last'"),
        (("-g", 0.1, "--latency-batch", 8), "--latency-batch 8 has no effect"),
        (("-g", 0.1, "--synthetic"), "one of the two"),
        (("-g", 0.1, "--free", "layers"), "'layers' is no field with a few values"),
    ],
)
def test_mistakes_of_a_search(folder: Path, tmp_path: Path, options: tuple, words: str) -> None:
    result = run("search", DIGITS, folder, "--out", tmp_path / "out", "-m", "tome", "--limit", 4, *options)
    assert result.exit_code == 1 and words in result.output


@pytest.mark.slow
def test_search_without_images(tmp_path: Path) -> None:
    options = ("--out", tmp_path, "-m", "tome", "-g", 0.13, "--limit", 6, "--strategy", "monte_carlo", "--trials", 2)
    data = json.loads(ok("search", DIGITS, "--synthetic", *options, "--json"))
    assert data["settings"]["inputs"] == 6 and data["cost"] <= 0.13e9
    result = run("search", DIGITS, *options)
    assert result.exit_code == 1 and "give IMAGES to search on" in result.output


def test_a_preset_by_name() -> None:
    data = json.loads(ok("info", DIGITS, "-c", "salience_merge/deit-base@12g", "--json"))
    assert "salience_merge/deit-base@12g" in data
