"""The digits on canvases, and the ViT packaged with them."""

import re
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")

from hf_tokenprune.demo import digits
from hf_tokenprune.demo.digits import CANVAS, LABELS, MODEL_DIR, load_digits_split, render
from hf_tokenprune.errors import DataError


def test_split_is_disjoint_stratified_and_does_not_follow_the_seed():
    train, test = load_digits_split("train", seed=5), load_digits_split("test")
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(train.source + test.source) == list(range(1797))
    assert test.source == load_digits_split("test", seed=5).source
    # Another split would test the packaged model on digits it has seen.
    assert test.source[:5] == [1496, 188, 705, 820, 413]
    counts = np.bincount(test.labels, minlength=len(LABELS))
    assert counts.min() >= 34 and counts.max() <= 38


def test_items_are_what_datasets_and_pipelines_take():
    test = load_digits_split("test")
    item = test[0]
    assert item["image"].size == (CANVAS, CANVAS) and item["image"].mode == "RGB"
    assert item["label"] == test.labels[0]
    assert len(list(test)) == len(test)
    with pytest.raises(IndexError):
        test[len(test)]


def test_canvases_are_deterministic_and_differ_by_seed():
    test, again, other = (load_digits_split("test", seed) for seed in (0, 0, 1))
    assert test[7]["image"].tobytes() == again[7]["image"].tobytes()
    assert test[7]["image"].tobytes() != other[7]["image"].tobytes()


def test_most_of_a_canvas_is_dim_clutter():
    canvases = np.stack([np.asarray(load_digits_split("test")[i]["image"])[..., 0] for i in range(50)])
    bright = (canvases > 140).mean(axis=(1, 2))
    assert bright.min() > 0.02 and bright.max() < 0.3


def test_spread_moves_the_digit():
    digit = np.full((8, 8), 16)
    far = [_centre_of_ink(render(digit, np.random.default_rng(i), spread=1.0)) for i in range(30)]
    centred = [_centre_of_ink(render(digit, np.random.default_rng(i), spread=0.0)) for i in range(30)]
    assert np.abs(np.array(centred) - (CANVAS - 1) / 2).max() < 1
    assert np.ptp(far, axis=0).min() > 12


def test_unknown_split_and_missing_sklearn_say_what_to_do(monkeypatch):
    with pytest.raises(DataError, match="'train' or 'test'"):
        load_digits_split("validation")
    digits.originals.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=re.escape("pip install hf-tokenprune[demo]")):
        load_digits_split("test")


def test_packaged_model_is_small_quiet_and_as_accurate_as_its_card_says(recwarn, caplog):
    import torch
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 4_000_000
    model = AutoModelForImageClassification.from_pretrained(MODEL_DIR).eval()
    processor = ViTImageProcessorPil.from_pretrained(MODEL_DIR)
    assert type(model).__name__ == "ViTForImageClassification"
    assert tuple(model.config.id2label.values()) == LABELS
    assert not recwarn.list and not caplog.records

    test = load_digits_split("test")
    pixels = processor([item["image"] for item in test], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        predicted = torch.cat([model(batch).logits.argmax(-1) for batch in pixels.split(120)])
    accuracy = 100 * (predicted == torch.tensor(test.labels)).float().mean().item()
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    reported = float(re.search(r"Test accuracy: ([\d.]+) %", card).group(1))
    assert accuracy >= reported - 0.5  # another CPU may turn a digit on the edge
    assert reported >= 97


def test_auto_image_processor_reads_the_packaged_file_without_a_warning(recwarn, caplog):
    import torch
    from transformers import AutoImageProcessor, ViTImageProcessorPil

    try:
        processor = AutoImageProcessor.from_pretrained(MODEL_DIR)
    except ImportError:
        pytest.skip("older transformers have no AutoImageProcessor without torchvision")
    assert not recwarn.list and not caplog.records
    image = load_digits_split("test")[0]["image"]
    expected = ViTImageProcessorPil.from_pretrained(MODEL_DIR)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(image, return_tensors="pt")["pixel_values"], expected, rtol=0, atol=1e-6)


def _centre_of_ink(image) -> np.ndarray:
    """(y, x) in pixels."""
    return np.argwhere(np.asarray(image)[..., 0] > 140).mean(axis=0)
