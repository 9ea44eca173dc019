"""Int8 of torchao with pruning: in either order the same, and unprune gives the quantised model back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel, TorchAoConfig, ViTForImageClassification

from hf_tokenprune import DivPruneConfig, PruneConfig, UnsupportedModelError, from_pretrained, prune, record, unprune
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR
from hf_tokenprune.export import export, load_exported

from .decoder_families import sample, tiny_vlm
from .families import first_tensor, fitting, images, inputs_for, methods_for, supported_classes, tiny_model

torchao = pytest.importorskip("torchao.quantization")
PAIRS = fitting(supported_classes(), map(PruneConfig.for_method, methods_for("vision")))
OF_METHOD, OF_CLASS = ({case[by]: case for case in PAIRS}.values() for by in (1, 0))
CASES = [*OF_METHOD, *(pytest.param(*case, marks=pytest.mark.slow) for case in OF_CLASS if case not in OF_METHOD)]
"""Every method with one of the model classes, and every model class with one of the methods."""


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return model


@pytest.mark.parametrize(
    ("pair", "config"),
    CASES,
    ids=lambda value: value[1].__name__ if isinstance(value, tuple) else value.method,
)
def test_in_either_order(pair: tuple[str, type[PreTrainedModel]], config: PruneConfig) -> None:
    model, pixels = tiny_model(*pair), images()
    inputs = inputs_for(model, pixels)
    dense = first_tensor(quantized(tiny_model(*pair))(**inputs))
    assert not torch.equal(dense, first_tensor(model(**inputs)))  # it is quantised indeed
    first, second = quantized(tiny_model(*pair)), quantized(prune(tiny_model(*pair), config))
    assert cost(first, config) == cost(model, config)
    prune(first, config)
    with record(first) as rec:
        assert torch.equal(first_tensor(first(**inputs)), first_tensor(second(**inputs)))
    assert config.method == "exact" or min(rec.tokens.values()) < rec.tokens[0]
    for each in (first, second):
        assert torch.equal(first_tensor(unprune(each)(**inputs)), dense)


def test_a_vision_language_model() -> None:
    family = "llava"
    inputs, config = sample(tiny_vlm(family), "....I......"), DivPruneConfig(keep_ratio=0.5)
    dense = quantized(tiny_vlm(family))(**inputs).logits
    first, second = prune(quantized(tiny_vlm(family)), config), quantized(prune(tiny_vlm(family), config))
    answers = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (first, second)]
    assert torch.equal(*answers)
    assert not torch.equal(first(**inputs).logits, dense)
    for each in (first, second):
        assert torch.equal(unprune(each)(**inputs).logits, dense)


def test_loaded_quantized_by_transformers() -> None:
    settings = TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    model = from_pretrained(MODEL_DIR, "tome", quantization_config=settings)
    dense = AutoModelForImageClassification.from_pretrained(MODEL_DIR, quantization_config=settings)
    pixels = images(2, 56)
    pruned_logits = model(pixels).logits
    assert not torch.equal(pruned_logits, dense(pixels).logits)
    assert torch.equal(prune(dense, "tome")(pixels).logits, pruned_logits)
    assert torch.equal(unprune(model)(pixels).logits, unprune(dense)(pixels).logits)


@pytest.mark.slow
def test_the_graph_of_torch_is_quantized_too_and_other_formats_are_refused(tmp_path: Path) -> None:
    model = quantized(tiny_model("vit", ViTForImageClassification, num_hidden_layers=2))
    prune(model, PruneConfig.for_method("uniform", layers=(0,), keep_ratios=0.5))
    found = load_exported(export(model, tmp_path / "torch", "torch-export"))(images(5))["logits"]
    torch.testing.assert_close(found, model(images(5)).logits, atol=1e-4, rtol=0)
    for format in ("onnx", "openvino"):
        with pytest.raises(UnsupportedModelError, match=r"Int8Tensor.*int8=True"):
            export(model, tmp_path / format, format)
