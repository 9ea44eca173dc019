"""Zero-shot classification and retrieval against plain loops over one image and one text at a time."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    BertConfig,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from hf_tokenprune import UniformConfig, prune, pruned
from hf_tokenprune.errors import DataError, TokenPruneError, UnsupportedModelError
from hf_tokenprune.evaluation import evaluate_retrieval, evaluate_zero_shot, load_images, zero_shot_classifier
from hf_tokenprune.evaluation.loop import place
from hf_tokenprune.evaluation.zero_shot import ImageTower, SimilarityToClasses

from .clip_checkpoint import SIZES, letters, tiny_clip

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("cat", "dog", "owl", "bee", "fox", "eel", "ox", "ant")
TEMPLATES = ("a photo of a {}.", "{}", "a {} and a {}")
CONFIG = UniformConfig(keep_ratios=0.4)
POSITIONS = 40


def tiny_siglip(family: str = "siglip"):
    torch.manual_seed(0)
    text = {"vocab_size": len(letters()), "max_position_embeddings": POSITIONS, "projection_size": 32, **SIZES}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    tokenizer = letters()
    tokenizer.model_input_names = ["input_ids"]  # as SigLIP's own
    if family == "siglip":
        vision = {"image_size": 32, "patch_size": 4, **SIZES}
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, **special}))
        processor = SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    else:
        vision = {"num_patches": 64, "patch_size": 4, **SIZES}
        model = Siglip2Model(Siglip2Config(vision_config=vision, text_config={**text, **special}))
        # Siglip2Processor would set patch_size=16, whatever its image processor says.
        processor = SiglipProcessor(Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64), tokenizer)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50.0))
        model.logit_bias.fill_(-10.0)
    return model.eval(), processor


MODELS = {"clip": tiny_clip, "siglip": tiny_siglip, "siglip2": partial(tiny_siglip, "siglip2")}
every_family = pytest.mark.parametrize("family", MODELS)


def pictures(n: int) -> list[Image.Image]:
    """Square, blurred and of different brightness."""
    noise = torch.Generator().manual_seed(0)
    pixels = (255 * torch.rand(n, 4, 4, 3, generator=noise)).byte().numpy()
    return [
        Image.fromarray((each.astype(float) / (1 + i % 4)).astype("uint8")).resize((40, 40))
        for i, each in enumerate(pixels)
    ]


def labelled(n: int = 24):
    return load_images([{"image": image, "label": i % len(NAMES)} for i, image in enumerate(pictures(n))])


def similarity(model, processor, images, texts) -> np.ndarray:
    """Stock model, one image and one text at a time: ``(images, texts)`` cosines, without scale and bias."""
    padding = "max_length" if "siglip" in model.config.model_type else False

    def embed(image, text):
        inputs = processor(images=[image], return_tensors="pt")
        tokens = processor.tokenizer([text], padding=padding, max_length=POSITIONS, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs, **tokens)
        both = (each[0].double().numpy() for each in (output.image_embeds, output.text_embeds))
        return tuple(each / np.linalg.norm(each) for each in both)

    of_images = [embed(image, texts[0])[0] for image in images]
    of_texts = [embed(images[0], text)[1] for text in texts]
    return np.array([[image @ text for text in of_texts] for image in of_images])


def interval(before: list[bool], after: list[bool]) -> tuple[float, float]:
    """Bonett and Price (2012), equation for the adjusted Wald interval, in percentage points."""
    n = len(before)
    p12 = (sum(b and not a for b, a in zip(before, after, strict=True)) + 1) / (n + 2)
    p21 = (sum(a and not b for b, a in zip(before, after, strict=True)) + 1) / (n + 2)
    half = 1.959964 * math.sqrt((p12 + p21 - (p21 - p12) ** 2) / (n + 2))
    return 100 * (p21 - p12 - half), 100 * (p21 - p12 + half)


# -- texts


@every_family
@pytest.mark.parametrize("part", ["processor", "tokenizer"])
def test_classes_are_means_over_templates(family, part):
    model, processor = MODELS[family]()
    got = zero_shot_classifier(model, processor if part == "processor" else processor.tokenizer, NAMES, TEMPLATES)
    assert (got.shape, got.dtype, got.requires_grad) == ((len(NAMES), got.shape[1]), torch.float32, False)
    padding = "max_length" if family != "clip" else False
    for row, name in zip(got.numpy(), NAMES, strict=True):
        vectors = []
        for text in (f"a photo of a {name}.", name, f"a {name} and a {name}"):
            tokens = processor.tokenizer([text], padding=padding, max_length=POSITIONS, return_tensors="pt")
            with torch.no_grad():
                vector = model.text_model(**tokens).pooler_output[0]
                vector = (model.text_projection(vector) if family == "clip" else vector).double().numpy()
            vectors.append(vector / np.linalg.norm(vector))
        mean = np.mean(vectors, axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)


def test_texts_in_many_batches_and_of_any_length(monkeypatch):
    model, processor = tiny_clip()
    whole = zero_shot_classifier(model, processor, NAMES, TEMPLATES)
    monkeypatch.setattr("hf_tokenprune.evaluation.zero_shot._TEXTS", 5)
    torch.testing.assert_close(zero_shot_classifier(model, processor, NAMES, TEMPLATES), whole, rtol=0, atol=1e-5)
    long = zero_shot_classifier(model, processor, ["a" * 100, "a" * 100 + "b", "c"], ["{}"])  # 40 positions
    torch.testing.assert_close(long[0], long[1])


def test_default_template_and_braces_in_a_name():
    model, processor = tiny_clip()
    assert torch.equal(
        zero_shot_classifier(model, processor, NAMES), zero_shot_classifier(model, processor, NAMES, TEMPLATES[:1])
    )
    assert zero_shot_classifier(model, processor, ["{a} {0}"], ["a {} {x}"]).shape == (1, 16)


@every_family
def test_pruning_leaves_the_text_tower_alone(family):
    model, processor = MODELS[family]()
    dense = zero_shot_classifier(model, processor, NAMES, TEMPLATES)
    with pruned(model, CONFIG):
        assert torch.equal(zero_shot_classifier(model, processor, NAMES, TEMPLATES), dense)


def test_modes_are_put_back_and_dropout_is_off():
    model, processor = tiny_clip()
    model.text_model.encoder.layers[0].self_attn.dropout = 0.5
    model.train()
    model.text_projection.eval()
    assert torch.equal(zero_shot_classifier(model, processor, NAMES), zero_shot_classifier(model, processor, NAMES))
    assert (model.training, model.text_model.training, model.text_projection.training) == (True, True, False)


@pytest.mark.parametrize(
    ("names", "templates", "says"),
    [
        ([], TEMPLATES, r"class_names=\[\]: expected a sequence with a name for every class"),
        ("cat", TEMPLATES, "class_names='cat': expected a sequence"),
        (["cat", " "], TEMPLATES, r"class_names\[1\]=' ' is no text"),
        (["cat", 3], TEMPLATES, r"class_names\[1\]=3 is no text"),
        (["cat", "dog", "cat"], TEMPLATES, "class_names: 'cat' comes twice"),
        (NAMES, (), r"templates=\(\): expected a sequence of at least one text"),
        (NAMES, "a {}", "templates='a {}': expected a sequence"),
        (NAMES, ("{}", "a photo"), r"template 'a photo' has no {}; put it where the class name goes"),
    ],
)
def test_bad_names_and_templates(names, templates, says):
    model, processor = tiny_clip()
    with pytest.raises(DataError, match=says):
        zero_shot_classifier(model, processor, names, templates)
    with pytest.raises(DataError, match=says):
        evaluate_zero_shot(model, labelled(2), processor, names, {}, templates)


def test_texts_that_the_model_cannot_tell_apart():
    """Such as prompts that are cut in front of the name, or words that a tokenizer does not know."""
    model, processor = tiny_clip()
    long = "a" * 60 + " {}"
    says = r"the texts of all 8 classes are one to the model, such as 'a+ \w+': shorter ones, or words that it knows"
    with pytest.raises(DataError, match=says):
        zero_shot_classifier(model, processor, NAMES, (long,))
    assert zero_shot_classifier(model, processor, NAMES, (long, "{}")).shape == (8, 16)
    assert zero_shot_classifier(model, processor, NAMES[:1], (long,)).shape == (1, 16)


def test_models_and_processors_that_cannot_do_it():
    model, processor = tiny_clip()
    with pytest.raises(
        UnsupportedModelError, match=r"CLIPVisionModel has no get_image_features, get_text_features, log"
    ):
        zero_shot_classifier(model.vision_model, processor, NAMES)
    with pytest.raises(UnsupportedModelError, match="AutoModelForZeroShotImageClassification"):
        evaluate_retrieval(nn.Identity(), [("a.png", "a")], processor, {})
    with pytest.raises(TokenPruneError, match="CLIPImageProcessorPil reads no text; pass AutoProcessor"):
        zero_shot_classifier(model, processor.image_processor, NAMES)
    with pytest.raises(DataError, match="class_names is None: the images do not say"):
        evaluate_zero_shot(model, labelled(2), processor, labelled(2).classes, {})


# -- classification


@every_family
def test_classification_matches_a_plain_loop(family):
    model, processor = MODELS[family]()
    images, n = labelled(), 24
    report = evaluate_zero_shot(
        model, images, processor, NAMES, {"half": lambda: pruned(model, CONFIG)}, macs={"half": 1e9}, progress=False
    )
    texts = [f"a photo of a {name}." for name in NAMES]
    scale = math.exp(model.logit_scale.item())
    dense = scale * similarity(model, processor, pictures(n), texts)
    with pruned(model, CONFIG):
        less = scale * similarity(model, processor, pictures(n), texts)

    def correct(logits, k):
        return [i % len(NAMES) in np.argsort(-row, kind="stable")[:k] for i, row in enumerate(logits)]

    def softmax(row):
        return np.exp(row) / np.exp(row).sum()

    first, second = report.rows
    assert (first.name, second.name, first.n, report.labelled, second.macs) == ("dense", "half", n, n, 1e9)
    for row, logits in ((first, dense), (second, less)):
        assert row.accuracy == np.mean(correct(logits, 1))
        assert row.top5_accuracy == np.mean(correct(logits, 5))
    for k, difference, got in (
        (1, second.accuracy_difference, second.accuracy_interval),
        (5, second.top5_difference, second.top5_interval),
    ):
        assert difference == pytest.approx(100 * (np.mean(correct(less, k)) - np.mean(correct(dense, k))))
        assert got == pytest.approx(interval(correct(dense, k), correct(less, k)), abs=1e-4)
    assert second.agreement == np.mean(dense.argmax(1) == less.argmax(1))
    kl = np.mean([np.sum(softmax(a) * np.log(softmax(a) / softmax(b))) for a, b in zip(dense, less, strict=True)])
    assert second.kl == pytest.approx(kl, rel=1e-2)
    assert kl > 1e-4, "pruning changes something"


def test_clip_logits_are_those_of_the_model():
    """The KL of a model against itself with another scale, which only logits with the scale in them show."""
    model, processor = tiny_clip()

    class Louder:
        def __enter__(self):
            model.logit_scale.data += math.log(2.0)

        def __exit__(self, *error):
            model.logit_scale.data -= math.log(2.0)

    report = evaluate_zero_shot(model, labelled(5), processor, NAMES, {"loud": Louder}, progress=False)
    inputs = processor(
        images=pictures(5), text=[f"a photo of a {name}." for name in NAMES], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
    want = nn.functional.kl_div((2 * logits).log_softmax(1), logits.softmax(1), reduction="batchmean")
    assert report.rows[1].kl == pytest.approx(want.item(), rel=1e-3)
    assert report.rows[1].agreement == 1.0


def test_texts_are_embedded_once_and_images_pruned():
    model, processor = tiny_clip()
    texts, tokens = [], []
    model.text_model.register_forward_hook(lambda *_: texts.append(1))
    model.vision_model.encoder.layers[-1].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    evaluate_zero_shot(
        model, labelled(3), processor, NAMES, {"a": lambda: pruned(model, CONFIG)}, batch_size=3, progress=False
    )
    assert len(texts) == 1
    assert tokens[0] == tokens[2] == 65, "the warm-up, and the batch"
    assert tokens[1] == tokens[3] < 65
    assert prune(model, CONFIG) is model, "it was left dense"


def test_two_towers_that_were_put_together_are_pruned_through_one():
    """A VisionTextDualEncoder has no adapter, its image tower has."""
    clip, processor = tiny_clip()
    text = BertConfig(vocab_size=len(processor.tokenizer), **SIZES)
    torch.manual_seed(0)
    joint = VisionTextDualEncoderConfig.from_vision_text_configs(clip.config.vision_config, text, projection_dim=16)
    model = VisionTextDualEncoderModel(joint).eval()
    variants = {"a": lambda: pruned(model.vision_model, CONFIG)}
    report = evaluate_zero_shot(model, labelled(6), processor, NAMES, variants, progress=False)
    assert report.rows[1].kl > 0
    pairs = [(image, ["a cat", "an owl"]) for image in pictures(3)]
    recalls = evaluate_retrieval(model, pairs, processor, variants, progress=False)
    assert [row.name for row in recalls.rows] == ["dense", "a"]


@every_family
def test_batch_size_changes_nothing(family):
    model, processor = MODELS[family]()
    variants = {"half": lambda: pruned(model, CONFIG)}
    reports = [
        evaluate_zero_shot(model, labelled(7), processor, NAMES, variants, batch_size=size, progress=False)
        for size in (1, 3, 32)
    ]
    for report in reports[1:]:
        for row, want in zip(report.rows, reports[0].rows, strict=True):
            assert (row.accuracy, row.top5_accuracy, row.agreement) == (
                want.accuracy,
                want.top5_accuracy,
                want.agreement,
            )
        assert report.rows[1].kl == pytest.approx(reports[0].rows[1].kl, rel=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_similarities_in_float32_of_a_model_in_bfloat16(autocast):
    """In bfloat16 logits of 20 and more would be rounded to eighths."""
    model, processor = tiny_clip()
    if not autocast:
        model.bfloat16()
    classes = zero_shot_classifier(model, processor, NAMES)
    assert classes.dtype == torch.float32
    pixels = processor(images=pictures(3), return_tensors="pt")["pixel_values"].to(model.dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        embeddings = ImageTower(model)(pixel_values=pixels)
        logits = SimilarityToClasses(model, classes)(pixel_values=pixels)
    assert embeddings.dtype == logits.dtype == torch.float32
    want = math.exp(model.logit_scale.item()) * embeddings.double().numpy() @ classes.double().numpy().T
    np.testing.assert_allclose(logits.numpy(), want, rtol=1e-5, atol=1e-6)
    report = evaluate_zero_shot(model, labelled(7), processor, NAMES, {"same": model_as_it_is}, progress=False)
    assert report.rows[1].kl == 0


def test_a_dispatched_model_stays_where_it_is():
    model, _ = tiny_clip()
    model.hf_device_map = {"": "cpu"}
    place(ImageTower(model), SimpleNamespace(device=torch.device("meta")))
    assert model.device.type == "cpu"


class model_as_it_is:  # noqa: N801
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_labels_and_class_folders(tmp_path):
    model, processor = tiny_clip()
    for name in ("dog", "cat"):
        (tmp_path / name).mkdir()
        pictures(1)[0].save(tmp_path / name / "1.png")
    images = load_images(tmp_path)
    report = evaluate_zero_shot(model, images, processor, images.classes, {}, progress=False)
    assert (report.labelled, report.rows[0].accuracy) == (2, 0.5)  # the same picture, one of them called right
    found = evaluate_zero_shot(model, images, processor, ["dog", "bird", "Cat"], {}, progress=False)
    assert (found.labelled, found.classes) == (2, "classes by name"), "fewer, and in another order"
    with pytest.raises(DataError, match="the images have 2 classes"):
        evaluate_zero_shot(model, images, processor, ["a", "b", "c"], {}, progress=False)
    with pytest.raises(DataError, match="label 2 is outside the model's 2 classes"):
        evaluate_zero_shot(model, labelled(3), processor, NAMES[:2], {}, progress=False)
    with pytest.raises(TokenPruneError, match="a run is called 'dense'"):
        evaluate_zero_shot(model, images, processor, images.classes, {"dense": model_as_it_is}, progress=False)


# -- retrieval


def pairs(n: int = 12) -> list:
    """One, two or three captions an image, all different: ties are tested with vectors made by hand."""
    words = [f"{NAMES[i % 8]} and {NAMES[(3 * i + i // 8) % 8]}" for i in range(3 * n)]
    assert len(set(words)) == 3 * n
    found = []
    for i, image in enumerate(pictures(n)):
        own = words[3 * i : 3 * i + 1 + i % 3]
        found.append((image, own[0] if len(own) == 1 else own))
    return found


def naive_hits(similar: np.ndarray, owner: list[int], k: int) -> tuple[list[bool], list[bool]]:
    """From (images, captions) similarities: for every image, and for every caption."""
    images = [any(owner[j] == i for j in np.argsort(-row, kind="stable")[:k]) for i, row in enumerate(similar)]
    captions = [owner[j] in np.argsort(-column, kind="stable")[:k] for j, column in enumerate(similar.T)]
    return images, captions


@every_family
def test_retrieval_matches_a_plain_loop(family, monkeypatch):
    monkeypatch.setattr("hf_tokenprune.evaluation.retrieval._QUERIES", 5)  # fewer than there are
    model, processor = MODELS[family]()
    data, ks = pairs(), (1, 2, 5)
    captions = [(i, c) for i, (_, own) in enumerate(data) for c in ([own] if isinstance(own, str) else own)]
    owner, texts = [i for i, _ in captions], [text for _, text in captions]
    report = evaluate_retrieval(
        model,
        data,
        processor,
        {"half": lambda: pruned(model, CONFIG)},
        ks=ks,
        macs={"dense": 2e9, "half": 1e9},
        batch_size=5,
        progress=False,
    )
    assert (report.images, report.captions) == (len(data), len(texts))
    dense_row, row = report.rows
    assert (dense_row.name, row.name) == ("dense", "half")
    assert (dense_row.macs, row.macs, dense_row.ideal_speed_up, row.ideal_speed_up) == (2e9, 1e9, None, 2.0)
    assert dense_row.speed_up is None
    dense = similarity(model, processor, [image for image, _ in data], texts)
    with pruned(model, CONFIG):
        less = similarity(model, processor, [image for image, _ in data], texts)
    for i, k in enumerate(ks):
        for got, got_dense, before, after in zip(
            (row.image_to_text[i], row.text_to_image[i]),
            (dense_row.image_to_text[i], dense_row.text_to_image[i]),
            naive_hits(dense, owner, k),
            naive_hits(less, owner, k),
            strict=True,
        ):
            assert (got_dense.k, got_dense.recall) == (k, np.mean(before))
            assert (got_dense.difference, got_dense.interval) == (None, None)
            assert (got.k, got.recall) == (k, np.mean(after))
            assert got.difference == pytest.approx(100 * (np.mean(after) - np.mean(before)))
            assert got.interval == pytest.approx(interval(before, after), abs=1e-4)


def test_recall_by_hand():
    """Embeddings that are set. Images: east, north, north. Captions: east; north-east and north; west."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.logit_scale = nn.Parameter(torch.zeros(()))
            self.config = tiny_clip()[0].config
            self.device = torch.device("cpu")

        def get_text_features(self, input_ids):  # a tensor, as before Transformers 5
            return torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])[input_ids]

        def get_image_features(self, pixel_values):
            return pixel_values

    class Tokens(dict):
        def to(self, device):
            return self

    def processor(images=None, text=None, **kwargs):
        if text is None:
            return {"pixel_values": torch.tensor([[3.0, 0.0] if images[0].width == 1 else [0.0, 2.0]])}
        return Tokens(input_ids=torch.tensor(list(map(int, text))))

    east, north = Image.new("RGB", (1, 1)), Image.new("RGB", (2, 1))
    data = [(east, "0"), (north, ["1", "2"]), (north, ["3"])]
    (row,) = evaluate_retrieval(Towers(), data, processor, {}, ks=(1, 2, 3, 4), progress=False).rows
    # Places of the best own caption: 1, 1 and 4 (behind 2, 1, and 0, with which west ties for the third place).
    assert [each.recall for each in row.image_to_text] == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1])
    # Places of the own image: 1; 2 (all tie, up to rounding east comes first); 1; 2 (behind the equal one in front).
    assert [each.recall for each in row.text_to_image] == pytest.approx([2 / 4, 1, 1, 1])


def test_retrieval_report_as_text_and_json():
    model, processor = tiny_clip()
    report = evaluate_retrieval(
        model, pairs(4), processor, {"a|b": lambda: pruned(model, CONFIG)}, ks=[1, 3], progress=False
    )
    data = report.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert (data["images"], data["captions"]) == (4, 7)
    assert [each["k"] for each in data["rows"][1]["text_to_image"]] == [1, 3]
    lines = report.summary().splitlines()
    assert lines[0] == "4 images with 7 captions, every run on the same ones."
    table = lines[2:7]
    assert len({len(line) for line in table}) == 1, "columns align"
    assert table[0].split("  ")[0] == "run"
    for title in ("R@1 %", "R@1 vs dense", "R@3 %", "R@3 vs dense"):
        assert title in table[0]
    assert "GMACs" not in table[0]
    assert [line.split("  ")[0] for line in table[1:]] == ["dense", "dense", "a|b", "a|b"]
    assert ["image to text" in line for line in table[1:]] == [True, False, True, False]
    cells = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in cells}) == 1


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        ([], {}, "there are no pairs"),
        ([("a.png", [])], {}, r"pair 0 has the captions \[\]"),
        ([("a.png", "a"), ("b.png", ["a", ""])], {}, r"pair 1 has the captions \['a', ''\]"),
        ([("a.png", "a"), "b.png"], {}, "pair 1 is of type str; expected"),
        ([("none.png", "a")], {}, "cannot read the image of pair 0"),
        ([("a.png", "a")], {"ks": ()}, r"ks=\(\): expected ascending"),
        ([("a.png", "a")], {"ks": (0, 1)}, r"ks=\(0, 1\): expected ascending"),
        ([("a.png", "a")], {"ks": (5, 1)}, r"ks=\(5, 1\): expected ascending"),
        ([("a.png", "a")], {"variants": {"dense": None}}, "a run is called 'dense'"),
        ([("a.png", "a")], {"macs": {"b": 1.0}}, "macs of 'b'"),
    ],
)
def test_bad_pairs(data, options, says):
    model, processor = tiny_clip()
    with pytest.raises(TokenPruneError, match=says):
        evaluate_retrieval(model, data, processor, **{"variants": {}, "progress": False, **options})


# -- other processes

TWO_PROCESSES = """
import sys
import torch
from accelerate import Accelerator
from tests.test_zero_shot import both_reports

accelerator = Accelerator()
assert accelerator.num_processes == 2
torch.save(both_reports(), f"{sys.argv[1]}/{accelerator.process_index}.pt")
"""


def both_reports() -> list[dict]:
    model, processor = tiny_clip()
    variants = {"half": lambda: pruned(model, CONFIG)}
    options = {"batch_size": 2, "progress": False}
    return [
        evaluate_zero_shot(model, labelled(11), processor, NAMES, variants, TEMPLATES, **options).to_dict(),
        evaluate_retrieval(model, pairs(11), processor, variants, **options).to_dict(),
    ]


SPEEDS = ("images_per_second", "speed_up", "speed_up_quartiles")


def without_speed(value):
    if isinstance(value, dict):
        return {k: without_speed(v) for k, v in value.items() if k not in SPEEDS}
    return [without_speed(part) for part in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, *launch.split(), str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone = without_speed(both_reports())
    for rank in (0, 1):
        classes, recalls = without_speed(torch.load(tmp_path / f"{rank}.pt"))
        assert recalls == alone[1]
        for row, want in zip(classes["rows"], alone[0]["rows"], strict=True):
            assert {k: v for k, v in row.items() if "kl" not in k} == {k: v for k, v in want.items() if "kl" not in k}
        kl, want = (report["rows"][1]["kl"] for report in (classes, alone[0]))
        assert kl == pytest.approx(want, rel=1e-3)  # batches are cut differently
