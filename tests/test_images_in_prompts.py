"""How a pruned vision-language model knows its images: how many tokens each has, and which of them are newlines.

What is right comes from elsewhere: the dense model's own features, with a sentinel for its newline; each image alone.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from hf_tokenprune import prune, record
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.cost import cost
from hf_tokenprune.errors import TokenPruneError, UnsupportedModelError

from .decoder_families import (
    FAMILIES,
    IMAGE,
    ONCE,
    SUPPORTED,
    VOCABULARY,
    Case,
    Inputs,
    adapter_of,
    built,
    collate,
    image_features,
    is_image,
    lengths,
    run,
    sample,
    stages_of,
    tiny_vlm,
    video_features,
)
from .decoder_prompts import BY_TOKEN, in_one, of_images
from .decoder_visuals import encoded_images, family_of
from .test_contract_decoders import close, each_once, every_family, id_of

PINPOINTS = [[9, 18], [18, 9], [18, 18], [27, 9], [27, 27]]
SIZES = [(18, 18), (5, 20), (20, 7), (40, 31), (26, 9)]
"""Of images in pixels; a crop has 9 by 9, so they are cut and unpadded in different ways."""


def looks_at_each_image_alone(family: str, case: Case) -> bool:
    model = built(family)
    stages = stages_of(model, case.config(model))
    return not case.in_layers and all(stage.budget == "image" and not stage.reads_question for stage in stages)


ALONE = [pair for pair in SUPPORTED if looks_at_each_image_alone(*pair)]
"""Methods of which what stays of an image does not depend on what stands around it."""

NEWLINES = [
    (family, case)
    for family, case in ALONE
    if case.method in ("divprune", "visionzip") and hasattr(built(family).model, "image_newline")
]
"""A choice in the decoder and one in the tower, in families with newlines."""


def has_grids(family: str) -> bool:
    """Whether prompts tell the rows and columns of images."""
    return "image_grid_thw" in sample(tiny_vlm(family), "I")


every_alone = pytest.mark.parametrize("pair", ALONE, ids=id_of)


def of_any_size(family: str, **overrides: Any) -> PreTrainedModel:
    """A model that cuts images into grids of several shapes, and scales down early if it does that at all."""
    fields = {"vision_aspect_ratio": "anyres_max_2"} if family == "llava_onevision" else {}
    return tiny_vlm(family, image_grid_pinpoints=PINPOINTS, **fields, **overrides)


def prompt(model: PreTrainedModel, sizes: list[tuple[int, int]], between: int = 1, seed: int = 0) -> Inputs:
    """Images of these sizes with ``between`` words between them and three at both ends."""
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision_config.image_size
    samples = []
    for size in sizes:
        crops = image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, side)
        samples.append((torch.randn(1, crops, 3, side, side, generator=generator), torch.tensor([size])))
    ids = [1, 2, 3]
    for pixels, size in samples:
        ids += [IMAGE] * len(image_features(model, pixels, size)) + [4] * between
    ids += [5, 6, 7]
    most = max(pixels.shape[1] for pixels, _ in samples)
    padded = [torch.cat([p, p.new_zeros(1, most - p.shape[1], *p.shape[2:])], 1) for p, _ in samples]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.cat(padded),
        "image_sizes": torch.cat([size for _, size in samples]),
    }


def newlines_of(dense: PreTrainedModel, inputs: Inputs) -> set[int]:
    """Which image tokens are newlines, by number: where the stock model puts its newline, made unmistakable."""
    newline = dense.model.image_newline
    stock = newline.detach().clone()
    with torch.no_grad():
        newline.fill_(12345.0)
        features = image_features(dense, inputs["pixel_values"], inputs["image_sizes"])
        newline.copy_(stock)
    return set((features == 12345.0).all(-1).nonzero().flatten().tolist())


def kept_of(model: PreTrainedModel, inputs: Inputs, row: int = 0) -> list[int]:
    """Numbers of the image tokens that are left at last."""
    with record(model) as rec:
        run(model, inputs)
    return [number for number in list(rec.kept.values())[-1][row].tolist() if number >= 0]


# -- newlines --------------------------------------------------------------------------------------------------------

PRECISIONS = ["float32", "autocast bfloat16", "autocast float16", "bfloat16 tower", "bfloat16"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("pair", NEWLINES, ids=id_of)
def test_newlines_are_known_in_any_precision(pair, call, precision) -> None:
    """Protected ones all stay and are no candidates; the others leave with their rows where the tower chooses."""
    family, case = pair
    model = of_any_size(family)
    inputs = prompt(model, SIZES)
    expected = newlines_of(model, inputs)
    assert expected
    protect = case.method == "divprune"
    prune(model, case.config(model, **({"newlines": "protect"} if protect else {})))
    context: Any = contextlib.nullcontext()
    if precision.startswith("autocast"):
        context = torch.autocast("cpu", dtype=getattr(torch, precision.split()[1]))
    elif precision.startswith("bfloat16"):
        parts = [model.model.vision_tower, model.model.multi_modal_projector] if "tower" in precision else [model]
        for part in parts:
            part.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with record(model) as rec, context:
        if call == "forward":
            run(model, inputs)
        else:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    kept = list(rec.kept.values())[-1][0].tolist()
    assert kept and not expected & set(kept)
    words = int((~is_image(inputs)).sum())
    assert rec.tokens[0] == words + len(kept) + (len(expected) if protect else 0)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "family", [family for family, _ in NEWLINES if hasattr(built(family).config, "video_token_id")]
)
def test_newlines_of_videos(family, precision, call) -> None:
    """Where a family has any; an image beside them has its own."""
    model = tiny_vlm(family)
    inputs = sample(model, "..VV.I..V..")
    newline = model.model.image_newline
    stock = newline.detach().clone()
    with torch.no_grad():
        newline.fill_(12345.0)
        features = video_features(model, inputs["pixel_values_videos"])
        image = image_features(model, inputs["pixel_values"], inputs["image_sizes"])
        newline.copy_(stock)
    of_two = 2 * len(features) // 3
    found = torch.cat([features[:of_two], image, features[of_two:]]).eq(12345.0).all(-1).nonzero()
    expected = set(found.flatten().tolist())
    prune(model, Case("divprune").config(model, newlines="protect"))
    with record(model) as rec, torch.autocast("cpu", enabled=precision != "float32"):
        if call == "forward":
            run(model, inputs)
        else:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    kept = rec.kept["entrance"][0].tolist()
    assert kept and not expected & set(kept)
    assert rec.tokens[0] == int((~is_image(inputs)).sum()) + len(kept) + len(expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if hasattr(built(f).config, "image_grid_pinpoints")])
@pytest.mark.parametrize("size", SIZES)
def test_cost_counts_the_tokens_and_newlines_of_an_image_of_any_size(family, size) -> None:
    model = of_any_size(family)
    inputs = prompt(model, [size])
    shape = adapter_of(model).shape(model, size)
    assert (shape.image_tokens, shape.newline_tokens) == (int(is_image(inputs).sum()), len(newlines_of(model, inputs)))
    assert shape.tower_images == inputs["pixel_values"].shape[1]


def test_images_that_are_not_cut_because_there_are_several() -> None:
    """LLaVA-OneVision: ``batch_num_images`` above 1 leaves images whole, with one newline at the end."""
    model = of_any_size("llava_onevision")
    side, of_one = 9, 9 + 1
    ids = torch.tensor([[1, 2] + [IMAGE] * 2 * of_one + [3, 4]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 1, 3, side, side)}
    inputs |= {"image_sizes": torch.tensor([[18, 18], [9, 18]]), "batch_num_images": torch.tensor([2])}
    prune(model, Case("divprune").config(model, newlines="protect"))
    kept = kept_of(model, inputs)
    assert not {of_one - 1, 2 * of_one - 1} & set(kept)
    assert sum(number < of_one for number in kept) == len(kept) / 2


# -- how many tokens an image has ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "generate"])
@every_alone
def test_images_that_touch_keep_what_each_keeps_alone(pair, call) -> None:
    family, case = pair
    model = tiny_vlm(family)
    parts = "IiI" + ("VV" if "V" in family_of(model).kinds else "")
    pieces = [sample(model, part, seed) for seed, part in enumerate(parts)]
    words = sample(model, "..")
    together = in_one(model, [words, *pieces, words])
    prune(model, case.config(model))
    expected, before = [], 0
    for piece in pieces:
        alone = in_one(model, [words, piece, words])
        expected += [before + kept for kept in kept_of(model, alone)]
        before += int(is_image(piece).sum())
    with record(model) as rec:
        if call == "forward":
            run(model, together)
        else:
            model.generate(**together, max_new_tokens=1, do_sample=False)
    assert list(rec.kept.values())[-1][0].tolist() == expected


def llava(tower: str, strategy: str, **more: Any) -> PreTrainedModel:
    return tiny_vlm("llava", vision_config={"model_type": tower}, vision_feature_select_strategy=strategy, **more)


TOWERS = [
    (tower, strategy) for tower in ("clip_vision_model", "siglip_vision_model") for strategy in ("default", "full")
]


@pytest.mark.parametrize("side", [20, 28])
@pytest.mark.parametrize("in_call", [None, "default", "full"])
@pytest.mark.parametrize(("tower", "strategy"), TOWERS)
def test_an_image_is_as_long_as_its_features(tower, strategy, in_call, side) -> None:
    """Whatever the tower, the strategy of config and call, and the image."""
    model = llava(tower, strategy)
    more = {"interpolate_pos_encoding": True} if side > 20 else {}
    more |= {} if in_call is None else {"vision_feature_select_strategy": in_call}
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        made = model.get_image_features(pixel_values=pixels, return_dict=True, **more).pooler_output
    length = len(made[0])
    if side == 20 and in_call is None:
        assert adapter_of(model).shape(model).image_tokens == length
        assert cost(model, text_tokens=8).dense.layers[0].tokens_in == 8 + length
    inputs = {"input_ids": torch.tensor([[1, 2] + [IMAGE] * 2 * length + [3, 4]]), "pixel_values": pixels}
    prune(model, Case("divprune").config(model))
    if side > 20 and CACHE_NAME != "cache":
        pytest.skip("this Transformers hands interpolate_pos_encoding to the language model only")
    ids = torch.tensor([[1, 2] + [IMAGE] * length + [3, 4]])
    of_each = [kept_of(model, {"input_ids": ids, "pixel_values": image[None], **more}) for image in pixels]
    assert kept_of(model, {**inputs, **more}) == of_each[0] + [length + number for number in of_each[1]]


@pytest.mark.parametrize(("tower", "strategy"), TOWERS)
def test_a_tower_chooses_among_what_become_features(tower, strategy) -> None:
    """A patch that "default" drops behind the tower takes no place: of every image as many stay as were asked for."""
    model = llava(tower, strategy)
    has_cls = tower.startswith("clip")
    prune(model, Case("visionzip").config(model, dominant=3, contextual=2))
    pixels = torch.randn(12, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    features = image_features(model, pixels).view(12, -1, 32)
    kept = (~features[..., 0].isnan()).sum(1)
    assert kept.tolist() == [5 + (has_cls and strategy == "full")] * 12


# -- Pixtral: rows of patches with text between them -----------------------------------------------------------------

BREAK, END = VOCABULARY - 4, VOCABULARY - 3


def pixtral() -> PreTrainedModel:
    vision = {"model_type": "pixtral", "image_size": 64, "patch_size": 4, "head_dim": 8}
    return tiny_vlm(
        "llava", "mistral", vision_config=vision, vision_feature_layer=-1, vision_feature_select_strategy="full"
    )


def grids(*shapes: tuple[int, int], breaks: bool = True, seed: int = 0) -> Inputs:
    """Images of rows × columns patches, with break tokens behind the rows or without."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1, 2]
    pixels = torch.zeros(len(shapes), 3, 4 * max(r for r, _ in shapes), 4 * max(c for _, c in shapes))
    for image, (rows, columns) in zip(pixels, shapes, strict=True):
        image[:, : 4 * rows, : 4 * columns] = torch.randn(3, 4 * rows, 4 * columns, generator=generator)
        for row in range(rows):
            ids += [IMAGE] * columns + ([BREAK if row < rows - 1 else END] if breaks else [])
    return {
        "input_ids": torch.tensor([[*ids, 3, 4, 5]]),
        "attention_mask": torch.ones(1, len(ids) + 3, dtype=torch.long),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[4 * rows, 4 * columns] for rows, columns in shapes]),
    }


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("case", [case for family, case in ALONE if family == "llava"], ids=str)
def test_rows_of_an_image_share_its_budget(case, call) -> None:
    model = pixtral()
    if any(stage.where == "vision_tower" for stage in stages_of(tiny_vlm("llava"), case.config(model))):
        with pytest.raises(TokenPruneError, match="vision tower"):
            prune(model, case.config(model))
        return
    prune(model, case.config(model))
    whole = kept_of(model, grids((6, 8), breaks=False))
    assert len(whole) == round(0.4 * 48)
    inputs = grids((6, 8), (4, 10))
    with record(model) as rec:
        if call == "forward":
            run(model, inputs)
        else:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
    kept = rec.kept["entrance"][0].tolist()
    assert [number for number in kept if number < 48] == whole
    assert len(kept) - len(whole) == round(0.4 * 40)
    assert rec.tokens[0] == 2 + 6 + 4 + 3 + len(kept), "break tokens are text"


@pytest.mark.parametrize("shape", [(6, 8), (16, 16), (3, 11)])
def test_cost_counts_an_image_of_any_size_without_crops(shape) -> None:
    model = pixtral()
    size = (4 * shape[0], 4 * shape[1])
    features = image_features(model, torch.randn(1, 3, *size), torch.tensor([size]))
    report = cost(model, Case("fastv").config(model), image_size=size, text_tokens=8)
    assert report.dense.layers[0].tokens_in == 8 + len(features)
    assert cost(model, Case("fastv").config(model), text_tokens=8).dense.layers[0].tokens_in == 8 + 16 * 16


# -- placeholders ----------------------------------------------------------------------------------------------------


@every_family
def test_the_placeholder_may_change_while_pruned(family) -> None:
    """As after resize_token_embeddings: the dense model asks its config in every forward, so must the pruned one."""
    model = tiny_vlm(family)
    config, inputs = Case("divprune").config(model), sample(model, "..I...")
    prune(model, config)
    expected = kept_of(model, inputs)
    other = 0  # no word
    model.config.image_token_id = other
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = other
    assert kept_of(model, inputs) == expected


@each_once
def test_an_image_without_a_placeholder_is_an_error(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, "..I...")
    prune(model, case.config(model))
    model.config.image_token_id = 0
    match = r"image features or pixels, but input_ids has none .*image_token_id=0"
    with pytest.raises(UnsupportedModelError, match=match):
        run(model, inputs)
    with pytest.raises(UnsupportedModelError, match=match):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    assert run(model, text).logits.isfinite().all(), "words alone pass"


@pytest.mark.parametrize("family", [f for f in FAMILIES if len(adapter_of(built(f)).placeholders) > 1])
def test_placeholders_of_a_kind_that_was_not_given_are_an_error(family) -> None:
    model = tiny_vlm(family)
    inputs = sample(model, "..I..V..")
    prune(model, Case("divprune").config(model))
    del inputs["pixel_values_videos"]
    with pytest.raises(UnsupportedModelError, match="video placeholders but no pixel_values_videos"):
        run(model, inputs)


@every_family
def test_an_image_over_two_samples_is_an_error(family) -> None:
    """Transformers fills placeholders row by row and asks no more; old versions of SmolVLM ask for whole tiles."""
    model = tiny_vlm(family)
    inputs = sample(model, ".I.")
    length = int(is_image(inputs).sum())
    prune(model, Case("divprune").config(model))
    ids = torch.full((2, length), 1)
    ids[0, length // 2 :] = IMAGE
    ids[1, : length // 2] = IMAGE
    given = {name: tensor for name, tensor in inputs.items() if name not in BY_TOKEN}
    if has_grids(family):  # stock code would look for whole ones
        given |= {"mm_token_type_ids": (ids == IMAGE).long(), "position_ids": torch.zeros(3, *ids.shape).long()}
    with pytest.raises((UnsupportedModelError, ValueError), match=r"not together in one sample|not divisible"):
        run(model, {"input_ids": ids, **given})


# -- features of the caller ------------------------------------------------------------------------------------------

takes_features = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(type(tiny_vlm("llava")).forward).parameters,
    reason="this Transformers takes no features",
)


def encode(model: PreTrainedModel, inputs: Inputs) -> Any:
    return encoded_images(model, **of_images(inputs))


def words(inputs: Inputs) -> Inputs:
    """All but pixels, and what says how large images are."""
    return {name: tensor for name, tensor in inputs.items() if name in (*BY_TOKEN, "image_grid_thw")}


def as_features(encoded: Any, form: Callable[[Any], Any] = tuple) -> dict[str, Any]:
    """What people keep of encoders: nothing but ``pooler_output``, and DeepStack's features.

    Where that is a tensor of tiles (InternVL), stock models take no other form.
    """
    kept = {name: encoded[name] for name in ("deepstack_features",) if encoded.get(name) is not None}
    features = encoded.pooler_output
    taken = features if isinstance(features, torch.Tensor) else form(features)
    return {"image": type(encoded)(pooler_output=taken, **kept)}


@takes_features
@pytest.mark.parametrize("parts", ["...I....", "..Ii..I..."])
@pytest.mark.parametrize("pair", list(dict.fromkeys([*ONCE, *NEWLINES])), ids=id_of)
def test_features_kept_from_before_are_as_good_as_pixels(pair, parts) -> None:
    """Dense and pruned models read ``pooler_output`` alone."""
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, parts)
    prune(model, case.config(model))
    encoded = encode(model, inputs)
    with record(model) as expected:
        logits = run(model, inputs).logits
    ways = [{}, {"image_sizes": inputs["image_sizes"]}] if "image_sizes" in inputs else [{}]
    for more in ways:
        with record(model) as found:
            close(run(model, words(inputs), mm_encoder_outputs=as_features(encoded), **more).logits, logits)
        assert found.tokens == expected.tokens
        assert all(torch.equal(found.kept[name], kept) for name, kept in expected.kept.items())
    close(run(model, words(inputs), mm_encoder_outputs=as_features(encoded, list)).logits, logits)


@takes_features
@pytest.mark.parametrize("pair", NEWLINES, ids=id_of)
def test_features_whose_newlines_are_not_behind_rows_are_refused(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, "..I...")
    prune(model, case.config(model, **({"newlines": "protect"} if case.method == "divprune" else {})))
    encoded = encode(model, inputs)
    (features,) = encoded.pooler_output
    features[0] = features[-1]
    with pytest.raises(UnsupportedModelError, match="Pass image_sizes with the features"):
        run(model, words(inputs), mm_encoder_outputs=as_features(encoded))


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pair", NEWLINES, ids=id_of)
def test_images_of_many_sizes_in_a_padded_batch(pair, side) -> None:
    """Each sample keeps what it keeps alone."""
    family, case = pair
    model = of_any_size(family)
    samples = [
        prompt(model, sizes, between, seed) for seed, (sizes, between) in enumerate([(SIZES, 0), (SIZES[2:3], 1)])
    ]
    prune(model, case.config(model, **({"newlines": "protect"} if case.method == "divprune" else {})))
    batch = collate(samples, side)
    with record(model) as rec:
        cache = run(model, batch, use_cache=True)[CACHE_NAME]
    assert lengths(cache)[0] == rec.tokens[0] < batch["input_ids"].shape[1]
    kept = list(rec.kept.values())[-1]
    for row, inputs in enumerate(samples):
        assert [number for number in kept[row].tolist() if number >= 0] == kept_of(model, inputs)
