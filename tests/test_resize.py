"""Fewer image tokens by fewer pixels: as many as the processor makes, and what the model makes of them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessorPil, Siglip2ImageProcessorPil, ViTImageProcessorPil
from typer.testing import CliRunner

from hf_tokenprune.cli import app
from hf_tokenprune.cost import cost
from hf_tokenprune.errors import TokenPruneError
from hf_tokenprune.evaluation import (
    collect_answers,
    collect_logits,
    evaluate_answers,
    evaluate_paired,
    evaluate_zero_shot,
    interpolated_positions,
    load_images,
    load_questions,
    resized,
)
from hf_tokenprune.evaluation.run import macs_of, resizes

from .clip_checkpoint import tiny_clip
from .decoder_families import tiny_vlm
from .decoder_visuals import FAMILIES
from .families import first_tensor, inputs_for, snapshot, supported_classes, takes, tiny_model
from .llava_checkpoint import save_photo, save_tiny_llava
from .real_processors import KINDS, model_of, processor_of
from .test_real_processors import LARGE, TALL, WIDE, can_be_had, picture

PICTURES = (LARGE, TALL, WIDE)
RATIOS = (0.6, 0.42, 0.3)
AVAILABLE = [family for family in FAMILIES if can_be_had(family)]
every_family = pytest.mark.parametrize("family", AVAILABLE)
every_ratio = pytest.mark.parametrize("ratio", RATIOS)


def made(processor: Any, family: str, *pictures: Image.Image) -> dict[str, Any]:
    text = " ".join([KINDS[family].image] * len(pictures)) + " what is this ?"
    return dict(processor(images=[list(pictures)], text=[text], return_tensors="pt"))


def count(family: str, inputs: dict[str, Any]) -> int:
    """Tokens that stand for the picture in a prompt; the ends of its rows are tokens of it too."""
    processor = processor_of(family)
    marks = [getattr(processor, f"image_{part}_token", None) for part in ("break", "end")]
    ids = {model_of(family).config.image_token_id, *map(processor.tokenizer.convert_tokens_to_ids, filter(None, marks))}
    return sum(number in ids for number in inputs["input_ids"].flatten().tolist())


def possible(family: str, ratio: float, image: Image.Image) -> bool:
    try:
        resized(processor_of(family), ratio).plan(image.height, image.width)
    except TokenPruneError:
        return False
    return True


POSSIBLE = [
    pytest.param(family, ratio, image, id=f"{family}-{ratio}-{image.height}x{image.width}")
    for family in AVAILABLE
    for ratio in RATIOS
    for image in PICTURES
    if possible(family, ratio, image)
]


@pytest.mark.parametrize(("family", "ratio", "image"), POSSIBLE)
def test_as_many_tokens_as_the_processor_makes_and_no_more_than_asked(
    family: str, ratio: float, image: Image.Image
) -> None:
    small = resized(processor_of(family), ratio)
    inputs = made(small, family, image)
    usual, kept = count(family, made(processor_of(family), family, image)), count(family, inputs)
    plan = small.plan(image.height, image.width)
    assert (plan.usual, plan.kept) == (usual, kept) and 0 < kept <= ratio * usual
    assert small.mean_tokens() == (usual, kept)


def test_every_family_has_a_ratio_that_can_be_had() -> None:
    assert {case.values[0] for case in POSSIBLE} == set(AVAILABLE)


@pytest.mark.parametrize(("family", "ratio", "image"), POSSIBLE)
def test_models_take_what_resized_processors_make(family: str, ratio: float, image: Image.Image) -> None:
    model = model_of(family).eval()
    inputs = made(resized(processor_of(family), ratio), family, image)
    with interpolated_positions(model):
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2


@every_family
def test_all_of_the_tokens_are_those_of_the_processor_itself(family: str) -> None:
    model, image = model_of(family).eval(), LARGE
    small = resized(processor_of(family), 1)
    inputs, usual = made(small, family, image), made(processor_of(family), family, image)
    for name, value in usual.items():
        assert torch.equal(torch.as_tensor(inputs[name]), torch.as_tensor(value)), name
    with torch.no_grad():
        dense = model(**usual).logits
        with interpolated_positions(model):
            assert torch.equal(model(**inputs).logits, dense)


@every_family
def test_the_processor_given_stays_as_it_is(family: str) -> None:
    processor = processor_of(family)
    before, usual = copy.deepcopy(processor.image_processor.to_dict()), made(processor, family, WIDE)
    small = resized(processor, 0.9)
    assert isinstance(small, type(processor)) and small.tokenizer is processor.tokenizer
    made(small, family, LARGE)
    assert processor.image_processor.to_dict() == before and type(processor) is not type(small)
    again = made(processor, family, WIDE)
    assert all(torch.equal(torch.as_tensor(again[name]), torch.as_tensor(usual[name])) for name in usual)


@every_family
def test_a_chat_template_goes_the_same_way(family: str) -> None:
    small = resized(processor_of(family), 0.7)
    content = [{"type": "image", "image": LARGE}, {"type": "text", "text": "what is this ?"}]
    how: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = small.apply_chat_template([{"role": "user", "content": content}], **how)
    assert count(family, inputs) == small.plan(LARGE.height, LARGE.width).kept
    texts = [processor(text=["what ?"])["input_ids"] for processor in (small, processor_of(family))]
    assert torch.equal(*map(torch.as_tensor, texts))


@pytest.mark.parametrize("mode", ["P", "1"])
def test_pictures_with_a_palette_are_resized_in_their_colours(mode: str) -> None:
    """Indices into a palette cannot be averaged: PIL takes the nearest pixel instead, whatever it is asked for."""
    small, image = resized(processor_of("qwen2_vl"), 0.5), LARGE.convert(mode)
    found, expected = (made(small, "qwen2_vl", picture)["pixel_values"] for picture in (image, image.convert("RGB")))
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@every_family
def test_each_of_several_pictures_is_as_alone_or_refused(family: str) -> None:
    """Where the number of tiles is a setting of the call, pictures that want another do not get what fits the first."""
    small = resized(processor_of(family), 0.7)
    plans = [small.plan(image.height, image.width) for image in (LARGE, TALL)]
    if family == "llava_onevision":
        with pytest.raises(TokenPruneError, match="cuts no tiles of several images of one prompt"):
            made(small, family, LARGE, TALL)
    elif plans[0].settings == plans[1].settings:
        assert count(family, made(small, family, LARGE, TALL)) == sum(plan.kept for plan in plans)
    else:
        with pytest.raises(TokenPruneError, match=r"give one image a call \(batch_size=1\)"):
            made(small, family, LARGE, TALL)


def test_tiles_by_a_setting_are_refused_in_calls_that_need_two() -> None:
    small = resized(processor_of("internvl"), 0.45)
    assert small.plan(300, 300).settings != small.plan(300, 100).settings, "an example that is none tells nothing"
    with pytest.raises(TokenPruneError, match="different settings"):
        made(small, "internvl", picture(300, 300), picture(100, 300))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_no_smaller_picture_comes_nearer_from_below(family: str) -> None:
    """By trying them."""
    processor, (height, width) = copy.copy(processor_of(family)), (180, 240)
    usual = count(family, made(processor, family, Image.new("RGB", (width, height))))
    sizes = [(round(height * step / 256), round(width * step / 256)) for step in range(256, 8, -4)]
    if family == "qwen2_vl":  # without a least size
        processor.image_processor = copy.copy(processor.image_processor)
        most = processor.image_processor.size["longest_edge"]
        processor.image_processor.size = {"shortest_edge": 1, "longest_edge": most}
    else:  # down to a tile
        sizes = [size for size in sizes if max(size) >= 56]
    counts = [count(family, made(processor, family, Image.new("RGB", (w, h)))) for h, w in sizes]
    for ratio in (0.9, 0.8, 0.7, 0.65):
        kept = resized(processor_of(family), ratio).plan(height, width).kept
        assert kept >= max(number for number in counts if number <= ratio * usual)


def test_no_number_of_tiles_comes_nearer_from_below() -> None:
    processor, image = processor_of("internvl"), picture(140, 60)
    given: dict[str, Any] = {"images": [image], "text": ["<IMG_CONTEXT>"], "return_tensors": "pt"}
    counts = [count("internvl", dict(processor(**given, max_patches=most))) for most in range(1, 13)]
    for ratio in (0.9, 0.7, 0.5, 0.3):
        kept = resized(processor, ratio).plan(60, 140).kept
        assert kept == max(number for number in counts if number <= ratio * counts[-1])


ENCODERS = [
    (DeiTImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}), (32, 36)),
    (ViTImageProcessorPil(size={"height": 32, "width": 32}), (32, 32)),
]


@pytest.mark.parametrize(("processor", "sizes"), ENCODERS, ids=["crops", "resizes"])
@pytest.mark.parametrize(("ratio", "side"), [(1, 32), (0.99, 28), (0.77, 28), (0.76, 24), (0.25, 16), (0.016, 4)])
def test_sizes_of_an_encoder(processor: Any, sizes: tuple[int, int], ratio: float, side: int) -> None:
    """Of 8 x 8 patches of 4 x 4 pixels: the largest square of them. A crop keeps its part of the picture."""
    small = resized(processor, ratio, patch_size=4)
    for image in PICTURES:
        pixels = small(images=image, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, side, side)
    assert small.plan(100, 100)[:2] == (64, (side // 4) ** 2)
    if ratio < 1:
        by_hand = type(processor)(
            **{
                **processor.to_dict(),
                **({"crop_size": {"height": side, "width": side}} if sizes[0] != sizes[1] else {}),
                "size": {name: round(value * side / 32) for name, value in dict(processor.size).items()},
            }
        )
        assert torch.equal(pixels, by_hand(images=WIDE, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("side", range(1, 14))
def test_a_ratio_that_is_a_count_over_all_gives_that_count(side: int) -> None:
    """8 · 8 / 196 · 196 is less than 64 in floating point."""
    small = resized(ViTImageProcessorPil(size={"height": 224, "width": 224}), side**2 / 14**2, patch_size=16)
    assert small.plan(100, 100)[:2] == (196, side**2)


def test_sizes_that_are_not_square() -> None:
    small = resized(ViTImageProcessorPil(size={"height": 32, "width": 64}), 0.3, patch_size=(4, 8))
    assert small(images=WIDE, return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 32)
    assert small.plan(9, 9)[:2] == (64, 16)


def test_a_number_of_patches() -> None:
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64)
    small = resized(processor, 0.4)
    assert small(images=LARGE, return_tensors="pt")["pixel_values"].shape[1] == small.plan(9, 9).kept == 25
    assert processor.max_num_patches == 64


def resizable() -> list[Any]:
    """Encoders that take pixels of a size and have an argument to interpolate positions, or do it anyway."""
    found = [
        (family, cls)
        for family, cls in supported_classes()
        if takes(cls, "interpolate_pos_encoding") and not takes(cls, "bool_masked_pos")
    ]
    assert len({family for family, _ in found}) >= 5
    return [pytest.param(*each, id=f"{each[0]}-{each[1].__name__}") for each in found]


@pytest.mark.parametrize(("family", "cls"), resizable())
@pytest.mark.parametrize("side", [24, 32, 40])
def test_positions_are_those_of_the_models_own_argument(family: str, cls: Any, side: int) -> None:
    model = tiny_model(family, cls)
    before, inputs = snapshot(model), inputs_for(model, torch.randn(2, 3, side, side))
    with torch.no_grad():
        expected = first_tensor(model(**{**inputs, "interpolate_pos_encoding": True}))
        inputs.pop("interpolate_pos_encoding", None)
        with interpolated_positions(model):
            found = first_tensor(model(**inputs))
    assert torch.equal(found, expected)
    assert snapshot(model) == before


@pytest.mark.parametrize("family", [family for family in AVAILABLE if "next" in family or "onevision" in family])
def test_pictures_do_not_shrink_below_a_tile(family: str) -> None:
    """It would save no tile, and what is in them would be lost."""
    for ratio in (0.7, 0.6, 0.5):
        for image in (LARGE, WIDE, TALL):
            if possible(family, ratio, image):
                assert max(resized(processor_of(family), ratio).plan(image.height, image.width).size) >= 56


def test_hooks_leave_when_something_goes_wrong() -> None:
    model = model_of("llava")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="wrong"), interpolated_positions(model):
        raise RuntimeError("wrong")
    assert snapshot(model) == before


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), 33])
def test_ratios_out_of_range(ratio: float) -> None:
    with pytest.raises(TokenPruneError, match=r"expected a number in \(0, 1\]"):
        resized(processor_of("llava"), ratio)


class Nothing:
    """Takes images and has no sizes."""


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (Nothing(), "Nothing has no size to change"),
        (ViTImageProcessorPil(size={"height": 32, "width": 32}), "give patch_size"),
        (DeiTImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False), "crops or resizes to one size"),
        (processor_of("internvl").image_processor, "give that of the whole model"),
    ],
    ids=["no size", "no patches", "any size", "tiles"],
)
def test_processors_without_a_size_to_change(processor: Any, message: str) -> None:
    with pytest.raises(TokenPruneError, match=message):
        resized(processor, 0.5)


def test_fewer_tokens_than_there_can_be() -> None:
    with pytest.raises(TokenPruneError, match=r"at least 1 of the usual 16 .* keep at least 0\.063$"):
        made(resized(processor_of("llava"), 0.05), "llava", WIDE)
    small = resized(processor_of("llava_next"), 0.1)
    with pytest.raises(TokenPruneError, match=r"keep at least 0\.\d+") as told:
        made(small, "llava_next", LARGE)
    least = float(str(told.value).split()[-1])
    plan = resized(processor_of("llava_next"), least).plan(LARGE.height, LARGE.width)
    assert least - 0.001 < plan.kept / plan.usual <= least


def test_what_is_no_picture_of_pillow_is_refused() -> None:
    small = resized(processor_of("llava"), 0.5)
    with pytest.raises(TokenPruneError, match="of type ndarray; resized processors take PIL images"):
        small(images=[np.zeros((8, 8, 3), dtype=np.uint8)], text=["<image> what ?"])
    with pytest.raises(TokenPruneError, match="videos are not resized"):
        small(videos=[[WIDE]], text=["<video> what ?"])


def test_a_run_of_an_evaluation_sees_images_through_its_own_processor() -> None:
    pytest.importorskip("accelerate")
    (family, cls) = next(each for each in supported_classes() if each[1].__name__ == "ViTForImageClassification")
    model, processor = tiny_model(family, cls), ENCODERS[1][0]
    rows = [{"image": image, "label": i} for i, image in enumerate([*PICTURES, picture(60, 60, 9), picture(40, 80)])]
    small = {f"resize@{ratio}": resized(processor, ratio, patch_size=4) for ratio in (0.3, 1)}
    variants = {name: lambda: interpolated_positions(model) for name in small}
    common: dict[str, Any] = {"batch_size": 2, "progress": False}
    report = evaluate_paired(model, load_images(rows), processor, variants, processors=small, **common)
    with interpolated_positions(model):
        alone = collect_logits(model, load_images(rows), small["resize@0.3"], **common).logits
    dense = collect_logits(model, load_images(rows), processor, **common).logits
    first, shrunk, same = report.rows
    labels = torch.arange(len(rows))
    assert (first.accuracy, shrunk.accuracy) == tuple(
        float((x.argmax(1) == labels).double().mean()) for x in (dense, alone)
    )
    usual, other = dense.double().log_softmax(1), alone.double().log_softmax(1)
    kl = (usual.exp() * (usual - other)).sum(1).mean()
    assert shrunk.kl == pytest.approx(float(kl), rel=1e-4) and shrunk.kl > 0
    assert same.kl == 0 and same.agreement == 1
    with pytest.raises(TokenPruneError, match="processors of 'other', but the variants are"):
        evaluate_paired(model, load_images(rows), processor, variants, processors={"other": processor}, **common)


def test_zero_shot_too() -> None:
    pytest.importorskip("accelerate")
    model, processor = tiny_clip()
    rows = [{"image": image, "label": i % 2} for i, image in enumerate(PICTURES)]
    small = {"small": resized(processor, 0.3, patch_size=4), "same": resized(processor, 1, patch_size=4)}
    report = evaluate_zero_shot(
        *(
            model,
            load_images(rows),
            processor,
            ["a", "b"],
            {name: lambda: interpolated_positions(model) for name in small},
        ),
        processors=small,
        progress=False,
    )
    _, shrunk, same = report.rows
    assert same.kl == 0 < shrunk.kl
    assert small["small"].mean_tokens() == (64, 16)


@pytest.mark.parametrize("family", [family for family in AVAILABLE if family in ("llava", "qwen2_5_vl")])
def test_answers_of_a_run_with_its_own_processor(family: str) -> None:
    pytest.importorskip("accelerate")
    model, processor = model_of(family), processor_of(family)
    rows = [{"image": image, "question": "what is this ?", "answer": "red"} for image in (*PICTURES, picture(80, 90))]
    small = {"small": resized(processor, 0.3), "same": resized(processor, 1)}
    variants = {name: lambda: interpolated_positions(model) for name in small}
    common: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 6, "progress": False}
    questions = load_questions(rows)
    report = evaluate_answers(model, questions, processor, variants, processors=small, **common)
    with interpolated_positions(model):
        alone = collect_answers(model, questions, resized(processor, 0.3), **common)
    dense = collect_answers(model, questions, processor, **common)
    agreement = sum(one == other for one, other in zip(alone.texts, dense.texts, strict=True)) / len(rows)
    assert [row.agreement for row in report.rows] == [None, agreement, 1.0]


def test_eval_adds_rows(tmp_path: Path) -> None:
    """Of a vision-language model without a method, and of an encoder beside one."""
    pytest.importorskip("accelerate")
    llava = save_tiny_llava(tmp_path / "llava")
    save_photo(tmp_path / "photo.png")
    line = {"image": "photo.png", "question": "what is this ?", "answer": "red"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(line))
    options = ["--resize", "0.33", "--resize", "1", "--new-tokens", "2", "--device", "cpu"]
    done = CliRunner().invoke(app, ["eval", str(llava), str(tmp_path), *options, "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [row["name"] for row in data["rows"]] == ["dense", "resize@0.33", "resize@1"]
    assert data["image_tokens"]["resize@0.33"] == {"usual": 576, "kept": 13**2} and data["configs"] == {}
    dense, small, same = (row["macs"] for row in data["rows"])
    assert same == dense and small < 0.4 * dense
    assert data["rows"][2]["agreement"] == 1
    table = CliRunner().invoke(app, ["eval", str(llava), str(tmp_path), "-m", "divprune", *options])
    assert "resize@0.33: 169 of 576 tokens an image" in table.stdout
    refused = CliRunner().invoke(app, ["eval", str(llava), str(tmp_path), "--resize", "1.5"])
    assert refused.exit_code == 1 and "expected a number in (0, 1]" in refused.output


def test_macs_of_a_resized_encoder_are_those_of_its_size() -> None:
    (family, cls) = next(each for each in supported_classes() if each[1].__name__ == "ViTForImageClassification")
    model = tiny_model(family, cls)
    small = resizes(model, ENCODERS[1][0], [0.6, 1])
    dense, fewer, same = macs_of(model, {}, small=small).values()
    assert dense == same and fewer == cost(model, image_size=(24, 24)).dense.macs


def test_macs_of_a_resized_llava_are_those_of_one_made_for_the_size() -> None:
    model, smaller = (tiny_vlm("llava", vision_config={"patch_size": 14, "image_size": side}) for side in (56, 42))
    small = resizes(model, processor_of("llava"), [0.6, 1])
    dense, fewer, same = macs_of(model, {}, 10, small).values()
    assert dense == same and fewer == cost(smaller, text_tokens=10).dense.macs


def test_macs_of_a_resized_qwen_are_those_of_the_smaller_picture() -> None:
    model, processor = model_of("qwen2_5_vl"), copy.copy(processor_of("qwen2_5_vl"))
    side = cost(model).image_size
    assert side is not None
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.size = {"shortest_edge": 784, "longest_edge": side[0] * side[1]}
    small = resizes(model, processor, [0.25])
    dense, fewer = macs_of(model, {}, 10, small).values()
    half = (side[0] // 2, side[1] // 2)
    assert fewer == cost(model, image_size=half, text_tokens=10).dense.macs < dense


@pytest.mark.parametrize("family", [family for family in AVAILABLE if family in ("llava_next", "internvl", "smolvlm")])
def test_macs_of_tiles_are_not_made_up(family: str) -> None:
    """How many an image has depends on it."""
    model = model_of(family)
    assert list(macs_of(model, {}, 10, resizes(model, processor_of(family), [0.8]))) == ["dense"]
