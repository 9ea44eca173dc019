"""What is exported computes what the pruned model does, for batches of any size, and says so beside the file."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    CLIPModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    Siglip2VisionModel,
    ViTForImageClassification,
    ViTModel,
)
from typer.testing import CliRunner

from hf_tokenprune import ConfigError, PruneConfig, ToMeConfig, UnsupportedModelError, prune, pruned
from hf_tokenprune.benchmark import benchmark, engines
from hf_tokenprune.cli import app
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.engine import find_adapter
from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation import load_images, load_processor
from hf_tokenprune.export import export, load_exported, run
from hf_tokenprune.export.formats import FILES, Format

from .clip_checkpoint import save_tiny_clip, tiny_clip
from .decoder_families import tiny_vlm
from .families import images, refused, supported_classes, tiny_model
from .test_contract_families import KINDS
from .test_export_shapes import CONFIGS

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
TRAINED = {"atol": 1e-4, "rtol": 1e-4}
"""Logits of real weights are larger, and so is what two orders of summation differ by; the order is up to the CPU."""
CLASSES = [pair for pair in supported_classes() if not find_adapter(tiny_model(*pair)).no_graph]
ONE_OF_EACH_KIND = [config for config in CONFIGS if config.method in {kind.method for kind in KINDS}]
FORMATS: list[Format] = list(FILES)


def small(cls: type[PreTrainedModel], family: str, config: PruneConfig | None, depth: int = 2) -> Any:
    """Exporters take a second for each block that prunes."""
    model = tiny_model(family, cls, num_hidden_layers=depth)
    return model if config is None else prune(model, config)


def vit(config: PruneConfig | None = None, depth: int = 2) -> Any:
    return small(ViTForImageClassification, "vit", config, depth)


def a_config(model: PreTrainedModel) -> PruneConfig:
    """Of the methods that read and merge, the first that a model takes."""
    configs = map(PruneConfig.for_method, ("tome", "zero_tprune", "uniform"))
    return next(config for config in configs if not refused(model, config))


def outputs_of(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """By hand, of the model as its users call it."""
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            features = model.get_image_features(pixels).pooler_output
            return {"image_embeds": features / features.norm(dim=-1, keepdim=True)}
        inputs = find_adapter(model).image_inputs(model, pixels)
        return {name: value for name, value in model(**inputs).items() if isinstance(value, Tensor)}


def assert_equal_to(model: Any, path: Path, size: int = 32) -> None:
    """Traced with two images, it takes one, and five."""
    exported = load_exported(path, threads=1)
    for batch in (1, 5):
        pixels = images(batch, size)
        found, expected = exported(pixels), outputs_of(model, pixels)
        assert list(found) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, *CONFIGS], ids=lambda config: config.method if config else "dense")
def test_every_method_in_onnx_runtime(config: PruneConfig | None, tmp_path: Path) -> None:
    model = vit(config)
    assert_equal_to(model, export(model, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("pair", CLASSES, ids=lambda pair: pair[1].__name__)
def test_every_model_class_in_onnx_runtime(pair: tuple[str, type[PreTrainedModel]], tmp_path: Path) -> None:
    family, cls = pair
    model = small(cls, family, None, depth=1)
    prune(model, a_config(model))
    assert_equal_to(model, export(model, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("config", ONE_OF_EACH_KIND, ids=lambda config: config.method)
def test_a_method_of_each_kind_as_a_graph_of_torch(config: PruneConfig, tmp_path: Path) -> None:
    """Blocks that choose tokens have regions without autocast, which such files cannot hold."""
    model = vit(config)
    assert_equal_to(model, export(model, tmp_path, "torch-export"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tome", "zero_tprune"])
def test_in_openvino(method: str, tmp_path: Path) -> None:
    model = small(CLIPVisionModelWithProjection, "clip_vision_model", PruneConfig.for_method(method))
    assert_equal_to(model, export(model, tmp_path, "openvino"))


def test_as_a_graph_of_torch_and_what_lies_beside_it(tmp_path: Path) -> None:
    config = PruneConfig.for_method("uniform", layers=(0,), keep_ratios=0.5)
    model = small(ViTModel, "vit", config)
    file = export(model, tmp_path / "out", "torch-export", processor=load_processor(MODEL_DIR))
    assert file == tmp_path / "out" / "model.pt2"
    assert_equal_to(model, file.parent)
    names = {path.name for path in file.parent.iterdir()}
    assert names == {"model.pt2", "config.json", "prune_config.json", "preprocessor_config.json"}
    assert PruneConfig.from_pretrained(file.parent) == config
    assert load_processor(file.parent).size == load_processor(MODEL_DIR).size


def test_a_dense_model_of_a_pruned_checkpoint_says_nothing_of_pruning(tmp_path: Path) -> None:
    model = vit(depth=1).train()
    model.config.prune_config = ToMeConfig().to_dict()  # as stock from_pretrained leaves it
    file = export(model, tmp_path, "torch-export")
    assert "prune_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "prune_config.json").exists()
    assert model.training and model.config.prune_config == ToMeConfig().to_dict()
    assert_equal_to(model.eval(), file)


@pytest.mark.slow
def test_images_of_another_size(tmp_path: Path) -> None:
    model = vit(PruneConfig.for_method("uniform", layers=(0,), keep_ratios=0.5))
    assert_equal_to(model, export(model, tmp_path, "torch-export", image_size=(40, 40)), size=40)
    with pytest.raises(ConfigError, match="at least one patch"):
        export(model, tmp_path / "none", "torch-export", image_size=(2, 40))


@pytest.mark.slow
def test_zero_shot_from_the_command_line(tmp_path: Path) -> None:
    """Held against the stock model, which reads every text together with the images."""
    model, processor = tiny_clip()
    save_tiny_clip(tmp_path / "clip")
    (tmp_path / "names.txt").write_text("red\nblue\ngreen\n")
    command = ["export", str(tmp_path / "clip"), str(tmp_path / "out"), "--onnx", "-m", "tome", "-s", "r=4"]
    classes = ["--class-names", str(tmp_path / "names.txt"), "--template", "a {}."]
    result = CliRunner().invoke(app, [*command, *classes, "--json"])
    assert result.exit_code == 0, result.output
    file = Path(json.loads(result.stdout)["path"])
    assert json.loads((file.parent / "config.json").read_text())["id2label"] == {"0": "red", "1": "blue", "2": "green"}
    assert (file.parent / "preprocessor_config.json").is_file()
    texts = processor(text=["a red.", "a blue.", "a green."], return_tensors="pt", padding=True)
    pixels = images(5)
    with torch.no_grad(), pruned(model, ToMeConfig(r=4)):
        expected = model(pixel_values=pixels, **texts).logits_per_image
    torch.testing.assert_close(load_exported(file)(pixels)["logits"], expected, **TOLERANCE)


@pytest.mark.heavy
@pytest.mark.slow
def test_the_same_classes_of_digits_and_in_int8_nearly_all(tmp_path: Path) -> None:
    import onnx

    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    model = AutoModelForImageClassification.from_pretrained(MODEL_DIR).eval()
    processor, digits = load_processor(MODEL_DIR), load_digits_split("test")
    pixels = processor(images=[digits[i]["image"] for i in range(100)], return_tensors="pt")["pixel_values"]
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    prune(model, "salience_merge")
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        finer = copy.deepcopy(model).double()(pixel_values=pixels.double()).logits.float()
    found = load_exported(export(model, tmp_path / "float"))(pixels)["logits"]
    # Two pairs of tokens may be as near to each other but for rounding; then either may be merged first.
    errors = torch.stack([(found - either).abs().amax(1) for either in (expected, finer)])
    assert errors.amin(0).max() <= TOLERANCE["atol"]
    assert errors[0].median() <= TOLERANCE["atol"] / 10
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    file = export(model, tmp_path / "int8", int8=True)
    kinds = [node.op_type for node in onnx.load(file).graph.node]
    assert kinds.count("MatMulInteger") == len(linear)
    same = load_exported(file)(pixels)["logits"].argmax(-1) == expected.argmax(-1)
    assert same.float().mean() >= 0.95


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize("method", ["salience_merge", "tome", "zero_tprune"])
def test_the_same_classes_of_photographs(method: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "deit-tiny-patch16-224"
    model = prune(AutoModelForImageClassification.from_pretrained(folder).eval(), method)
    photos = load_images(shared / "data" / "nips17_dev", limit=40)
    processor = load_processor(folder)
    pixels = processor(images=[photos[i]["image"] for i in range(40)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
    found = load_exported(export(model, tmp_path))(pixels)["logits"]
    torch.testing.assert_close(found, expected, **TRAINED)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tensorrt"}, "format='tensorrt': expected one of onnx, torch-export, openvino"),
        ({"format": "openvino", "int8": True}, "nncf.quantize"),
        ({"format": "torch-export", "int8": True}, "torchao"),
        ({"class_names": ["a", "b"]}, "ViTForImageClassification has no text tower"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export(vit(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"vision-language model.*hf-tokenprune serve"):
        export(tiny_vlm("llava"), tmp_path)
    with pytest.raises(UnsupportedModelError, match="positions image by image"):
        export(tiny_model("siglip2_vision_model", Siglip2VisionModel), tmp_path)
    with pytest.raises(ConfigError, match="needs processor="):
        export(tiny_model("clip", CLIPModel), tmp_path, class_names=["a", "b"])
    with pytest.raises(ConfigError, match="is not an empty folder"):
        export(vit(), Path(__file__).parent)
    assert not any(tmp_path.iterdir())


def test_a_forward_that_looks_at_values_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = vit(depth=1)
    model.classifier.register_forward_pre_hook(lambda module, args: None if args[0].sum() > 0 else args)
    with pytest.raises(UnsupportedModelError, match=r"torch.export makes no graph of this ViTForImageClassification"):
        export(model, tmp_path, "torch-export")


def test_wherever_it_is_interrupted_no_file_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(program: object, file: Path, format: Format, int8: bool) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "trace", lambda *args: None)
    monkeypatch.setattr(run, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(vit(depth=1), tmp_path, "torch-export")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "module"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_without_the_engine_it_says_what_to_install(
    format: Format, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"hf-tokenprune\[{format}\]"):
        export(vit(depth=1), tmp_path, format)


def test_there_is_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected model.onnx, model.pt2, model.xml"):
        load_exported(tmp_path)


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize("engine", engines.ENGINES)
def test_bench_times_exports_of_the_three_arms(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pruned one is the pruned model's, and the one whose decision costs nothing has as many tokens left."""
    config = PruneConfig.for_method("evit", layers=(0,), keep_ratios=0.5)
    model, loaded = small(ViTModel, "vit", None), []
    monkeypatch.setattr(engines, "load_exported", lambda file: loaded.append(load_exported(file)) or loaded[-1])
    report = benchmark(model, config, batch_sizes=(1, 3), rounds=3, warmup=0, threads=1, engine=engine)
    assert [row.batch_size for row in report.rows] == [1, 3] and report.environment["engine"].startswith(engine)
    assert all(row.dense_seconds > 0 and row.dense_operations is None for row in report.rows)
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["dense_peak_bytes"] is None
    assert engine in report.summary()
    dense, kept, given = (run(images(5))["last_hidden_state"] for run in loaded)
    torch.testing.assert_close(dense, outputs_of(model, images(5))["last_hidden_state"], **TOLERANCE)
    with pruned(model, config):
        torch.testing.assert_close(kept, outputs_of(model, images(5))["last_hidden_state"], **TOLERANCE)
    assert given.shape == kept.shape


def test_engines_that_there_are_not() -> None:
    config = PruneConfig.for_method("uniform")
    for model, options, message in (
        (vit(), {"engine": "tensorrt"}, "expected pytorch, onnxruntime or openvino"),
        (vit(), {"engine": "onnxruntime", "dtype": torch.bfloat16}, "on cpu in bfloat16"),
    ):
        with pytest.raises(ConfigError, match=message):
            benchmark(model, config, (1,), rounds=1, warmup=0, **options)


def test_threads_are_those_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("onnxruntime")
    given: list[int] = []

    class Session:
        def __init__(self, file: Path, options: Any, providers: list[str]) -> None:
            given.append(options.intra_op_num_threads)

        def get_outputs(self) -> list[Any]:
            return []

    monkeypatch.setattr(runtime, "InferenceSession", Session)
    (tmp_path / "model.onnx").touch()
    load_exported(tmp_path, threads=3)
    load_exported(tmp_path)
    assert given == [3, torch.get_num_threads()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "choose one of --onnx, --torch-export, --openvino, got 0"),
        (["--onnx", "--openvino"], "got 2"),
        (["--onnx", "--dense", "-m", "tome"], "leave out -m, -g and -c, or --dense"),
        (["--openvino", "--int8"], "--int8 is for ONNX"),
        (["--torch-export", "-m", "tome", "-m", "evit"], "export writes one config, got 2"),
    ],
)
def test_the_command_says_what_does_not_fit(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(MODEL_DIR), str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1
    assert message in result.output
