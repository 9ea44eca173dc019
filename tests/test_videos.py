"""Methods that prune videos alone: every one on every family that has videos.

What stays must be what the method says of the dense model's own features, worked out here video by video; that the rest
follows from it is the reference's word, as for all methods.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_tokenprune import ConfigError, PruneConfig, StackConfig, UnsupportedModelError, prune, pruned, unprune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.adapters.decoder._frames import by_positions
from hf_tokenprune.adapters.decoder._images import ImageTokens
from hf_tokenprune.benchmark import benchmark
from hf_tokenprune.cost import cost
from hf_tokenprune.methods.evs import dissimilarity
from hf_tokenprune.methods.vidcom2 import vidcom2
from hf_tokenprune.recording import Record, record
from hf_tokenprune.registry import get_adapter
from hf_tokenprune.sharing import from_pretrained, save_pretrained
from hf_tokenprune.tokens import top_tokens

from .decoder_families import (
    FAMILIES,
    SUPPORTED,
    TEXTS,
    VIDEO_CASES,
    WITH_VIDEOS,
    Case,
    Inputs,
    adapter_of,
    built,
    collate,
    is_image,
    lengths,
    new_cache,
    run,
    sample,
    stages_of,
    tiny_vlm,
    with_keys,
)
from .decoder_prompts import in_one, of_videos, types_of
from .decoder_visuals import IMAGE, VIDEO, encoded_videos, family_of, video_features
from .families import snapshot
from .reference_decoder import newlines, positions_of, reference
from .test_contract_decoders import close, id_of
from .test_generate import STEPS, continued, greedy
from .test_images_in_prompts import takes_features, words
from .test_packed_samples import packed

ONE_VIDEO = "...V...."
VIDEO_FAMILIES = list(dict.fromkeys(family for family, _ in WITH_VIDEOS))

every_pair = pytest.mark.parametrize("pair", WITH_VIDEOS, ids=id_of)
each_once = pytest.mark.parametrize("pair", {case: (family, case) for family, case in WITH_VIDEOS}.values(), ids=id_of)


def prompts(model: PreTrainedModel) -> list[str]:
    """Of different lengths, without a video, with one and with two, of other frames, and with an image beside it: what
    a call of the family may hold."""
    family = family_of(model)
    images = [".I..V.", "..V.I..i.", "..I."] if "V" in family.kinds else []
    return [ONE_VIDEO, "....", "..V.V.", *images, *(["v.V..", ".vv......"] if "v" in family.videos else [])]


def kept_by(config: PruneConfig, video: Tensor) -> list[int]:
    """Which tokens of one ``video`` (F, P, D) a method keeps."""
    frames, per_frame = video.shape[:2]
    fraction = int(frames * per_frame * config.keep_ratio)
    if config.method == "evs":
        return top_tokens(dissimilarity(video[None]).flatten(1), max(per_frame, fraction))[0].tolist()
    return vidcom2(video[None], config.keep_ratio, max(frames, fraction))[0].tolist()


def expected_of(dense: PreTrainedModel, config: PruneConfig, parts: str, inputs: Inputs) -> list[int]:
    """Numbers of the image tokens of one prompt that stay: all of images, and newlines count, which always stay.

    Newlines themselves are not among them: records tell what may leave.
    """
    family, (types,) = family_of(dense), types_of(inputs)
    types = types[types > 0]
    of_video = (types == 2).nonzero().flatten()
    stays = (types == 1).nonzero().flatten().tolist()
    if not len(of_video):
        return stays
    features = video_features(dense, **of_videos(inputs))
    videos = [part for part in parts if part in "Vv"]
    start = 0
    for part in videos:
        end = start + len(features) // len(videos)  # "V" and "v" have as many tokens
        own = features[start : end - len(newlines(dense, features[start:end]))]
        video = own.unflatten(0, (family.frames[part], -1))
        stays += of_video[[start + number for number in kept_by(config, video)]].tolist()
        start = end
    return sorted(stays)


def kept_in(rec: Record, row: int = 0) -> list[int]:
    return [number for number in rec.kept["entrance"][row].tolist() if number >= 0] if rec.kept else []


def pruned_pair(
    family: str, case: Case, text: str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel, PruneConfig]:
    """(pruned, dense, the config)."""
    model, dense = tiny_vlm(family, text), tiny_vlm(family, text)
    config = case.config(dense)
    return prune(model, config), dense, config


# -- what stays ------------------------------------------------------------------------------------------------------


@every_pair
def test_what_stays_is_what_the_method_says_of_the_dense_features(pair) -> None:
    """In forward and in generate, which encodes before the forward; one prompt at a time and in a ragged batch."""
    model, dense, config = pruned_pair(*pair)
    alone = [sample(dense, parts, seed) for seed, parts in enumerate(prompts(dense))]
    expected = [expected_of(dense, config, parts, inputs) for parts, inputs in zip(prompts(dense), alone, strict=True)]
    assert any(len(numbers) < int(is_image(inputs).sum()) for numbers, inputs in zip(expected, alone, strict=True))
    for inputs, numbers in zip(alone, expected, strict=True):
        for way in (run, greedy):
            with record(model) as rec:
                way(model, inputs) if way is run else greedy(model, inputs, 2)
            assert kept_in(rec) == numbers
    for side in ("left", "right"):
        with record(model) as rec:
            run(model, collate(alone, side))
        assert [kept_in(rec, row) for row in range(len(alone))] == expected
    with record(model) as rec:
        greedy(model, collate(alone), 2)
    assert [kept_in(rec, row) for row in range(len(alone))] == expected


@pytest.mark.parametrize(
    ("pair", "text"), [(pair, text) for pair in WITH_VIDEOS for family, text in TEXTS if family == pair[0]]
)
def test_prefill_and_greedy_are_the_reference(pair, text) -> None:
    """Logits everywhere, states, tokens that enter each layer, and the cache; newline tokens of a video stay."""
    model, dense, config = pruned_pair(*pair, text)
    inputs = sample(dense, ONE_VIDEO, seed=3)
    with record(model) as rec:
        output = run(model, inputs, output_hidden_states=True)
    told = reference(dense, inputs, stages_of(dense, config), rec)
    expected = told.forward()
    length = inputs["input_ids"].shape[1]
    assert list(rec.tokens.values()) == expected.entering and expected.entering[-1] < length
    close(output.logits[0], expected.logits)
    for actual, states in zip(output.hidden_states, expected.states, strict=True):
        close(actual[0], states)
    always = newlines(dense, told.embeds[told.image])
    assert len(expected.survivors) == length - int(is_image(inputs).sum()) + rec.kept["entrance"].shape[1] + len(always)
    output = greedy(model, inputs, STEPS)
    tokens, logits = told.generate(STEPS)
    assert output.sequences[0, -STEPS:].tolist() == tokens
    close(torch.cat(output.logits), logits)
    assert lengths(output[CACHE_NAME]) == with_keys(model, [n + STEPS - 1 for n in expected.entering])


@every_pair
def test_a_batch_is_its_samples_alone(pair) -> None:
    model, dense, _ = pruned_pair(*pair)
    alone = [sample(dense, parts, seed) for seed, parts in enumerate(prompts(dense))]
    for side in ("left", "right"):
        batch = collate(alone, side)
        logits = run(model, batch).logits
        for row, inputs in enumerate(alone):
            close(logits[row][batch["attention_mask"][row].bool()], run(model, inputs).logits[0])


@every_pair
def test_without_a_video_all_is_dense(pair) -> None:
    """Text, and images, of which nothing leaves: bit for bit, in forward and generate."""
    model, dense, _ = pruned_pair(*pair)
    for batch in (collate([sample(dense, "....", 1), sample(dense, "..", 2)]), sample(dense, "..I..i...")):
        valid = batch["attention_mask"].bool()
        assert torch.equal(run(model, batch).logits[valid], run(dense, batch).logits[valid])
        assert torch.equal(*(each.generate(**batch, max_new_tokens=4, do_sample=False) for each in (model, dense)))


def repeats_videos(family: str) -> bool:
    """Whether the dense model makes sequences of prompts with videos: GLM-4V of Transformers 5.24 loses them, and old
    versions mix up several of one prompt."""
    dense = tiny_vlm(family)
    batch = collate([sample(dense, ONE_VIDEO, 1), sample(dense, "..V.V.", 2)])
    settings = {"num_beams": 2, "do_sample": False, "max_new_tokens": 1}
    try:
        output = dense.generate(**batch, **settings, return_dict_in_generate=True, output_logits=True)
    except (ValueError, RuntimeError):
        return False
    alone = run(dense, batch).logits[:, -1].repeat_interleave(2, 0)
    return torch.allclose(output.logits[0], alone, atol=1e-3)


@pytest.mark.parametrize("pair", [pair for pair in WITH_VIDEOS if repeats_videos(pair[0])], ids=id_of)
def test_beams_repeat_videos_with_their_frames(pair) -> None:
    """Prompts with several videos, of other frames but as many tokens where the family has them."""
    model, dense, config = pruned_pair(*pair)
    kinds = ["..vV..", "..V....v."] if "v" in family_of(dense).videos else ["..VV..", "..V....V."]
    alone = [sample(dense, parts, seed) for seed, parts in enumerate(kinds)]
    expected = [expected_of(dense, config, parts, inputs) for parts, inputs in zip(kinds, alone, strict=True)]
    with record(model) as rec:
        model.generate(**collate(alone), num_beams=3, do_sample=False, max_new_tokens=2)
    assert [kept_in(rec, row) for row in range(6)] == [numbers for numbers in expected for _ in range(3)]


@every_pair
def test_a_second_turn_with_a_second_video(pair) -> None:
    """Behind a kept cache, in ``generate``: its frames are compared with each other only."""
    model, dense, config = pruned_pair(*pair)
    first, second = sample(dense, "..V...", 1), sample(dense, "...V..", 2)
    stages, cache = stages_of(dense, config), new_cache(dense)
    with record(model) as rec:
        output = greedy(model, first, **{CACHE_NAME: cache})
    told = reference(dense, first, stages, rec).then(output.sequences[0, first["input_ids"].shape[1] :].tolist())
    whole = continued(told, second)
    with record(model) as rec:
        output = greedy(model, whole, **{CACHE_NAME: cache})
    assert kept_in(rec) == expected_of(dense, config, "V", second)
    tokens, logits = told.then_prompt(reference(dense, second, stages, rec)).generate(STEPS)
    assert output.sequences[0, whole["input_ids"].shape[1] :].tolist() == tokens
    close(torch.cat(output.logits), logits)


@every_pair
def test_samples_packed_in_a_row(pair) -> None:
    model, dense, config = pruned_pair(*pair)
    kinds = ["..V.V.", "....", "V.."]
    alone = [sample(dense, parts, seed) for seed, parts in enumerate(kinds)]
    row = packed(dense, alone)
    with record(model) as rec:
        logits = run(model, row, use_cache=False).logits[0]
    expected = [expected_of(dense, config, parts, inputs) for parts, inputs in zip(kinds, alone, strict=True)]
    assert [kept_in(rec, number) for number in range(3)] == expected
    close(logits, torch.cat([run(model, inputs).logits[0] for inputs in alone]))


GRIDS = [(1, 1, 1), (4, 1, 1), (2, 3, 3), (3, 3, 2), (5, 1, 4), (3, 4, 1), (1, 2, 5)]
"""(frames, rows, columns) in tokens."""


@pytest.mark.parametrize("seconds", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("family", [name for name in VIDEO_FAMILIES if get_adapter(name).position_axes > 1])
def test_positions_tell_frames(family, seconds) -> None:
    """Those that the stock model makes, also where frames are of the same time, or have a single row or token."""
    dense = built(family)
    merge = dense.config.vision_config.spatial_merge_size
    pieces = [family_of(dense).video_ids(math.prod(grid), grid[0]) for grid in GRIDS]
    ids = torch.tensor([[1, *(token for piece in pieces for token in piece), 2, 3]])
    here = (ids == IMAGE) | (ids == VIDEO)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": 2 * here.long(),
        "video_grid_thw": torch.tensor([(frames, merge * rows, merge * columns) for frames, rows, columns in GRIDS]),
        "second_per_grid_ts": torch.full((len(GRIDS),), seconds),
    }
    videos = [ImageTokens(math.prod(grid)) for grid in GRIDS]
    told = by_positions(videos, here, positions_of(dense, inputs)[:, None])
    assert [video.frames for video in told] == [frames for frames, _, _ in GRIDS]


# -- features of the caller ------------------------------------------------------------------------------------------


def features_alone(dense: PreTrainedModel, inputs: Inputs, count: int) -> dict[str, Any]:
    """``mm_encoder_outputs`` with features of ``count`` videos of one length, and nothing else."""
    features = video_features(dense, **of_videos(inputs)).unflatten(0, (count, -1))
    if hasattr(encoded := encoded_videos(dense, **of_videos(inputs)), "deepstack_features"):
        more = {"deepstack_features": encoded.deepstack_features}
        return {"video": type(encoded)(pooler_output=tuple(features), **more)}
    in_one_piece = hasattr(dense.model, "image_newline")
    return {"video": BaseModelOutputWithPooling(pooler_output=features if in_one_piece else tuple(features))}


@takes_features
@every_pair
def test_features_of_the_caller(pair) -> None:
    """Their lengths tell the frames, or positions do; without either the refusal says what to pass."""
    model, dense, config = pruned_pair(*pair)
    inputs = sample(dense, "..V.V..")
    given = words(inputs)
    given |= {name: inputs[name] for name in ("mm_token_type_ids",) if name in inputs}
    output = features_alone(dense, inputs, 2)
    if get_adapter(pair[0]).position_axes > 1:
        for positions in ({}, {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}):
            with pytest.raises(UnsupportedModelError, match=r"where frames begin.*Pass position_ids with axes"):
                run(model, {**given, **positions}, mm_encoder_outputs=dict(output))
        given["position_ids"] = reference(dense, inputs).positions[:, None]
        row = packed(dense, [inputs])
        by_token = ("input_ids", "mm_token_type_ids", "position_ids")
        twice = {name: torch.cat([row[name], row[name]], -1) for name in by_token}
        with pytest.raises(UnsupportedModelError, match="do not tell where frames begin"):
            run(model, twice, use_cache=False, mm_encoder_outputs=features_alone(dense, in_one(dense, [inputs] * 2), 4))
    with record(model) as rec:
        logits = run(model, given, mm_encoder_outputs=output).logits
    assert kept_in(rec) == expected_of(dense, config, "VV", inputs)
    close(logits, run(model, inputs).logits)


@takes_features
@pytest.mark.parametrize("pair", [pair for pair in WITH_VIDEOS if get_adapter(pair[0]).position_axes > 1], ids=id_of)
def test_positions_that_make_no_frames_of_one_length_are_refused(pair) -> None:
    model, dense, _ = pruned_pair(*pair)
    inputs = sample(dense, ONE_VIDEO)
    positions = reference(dense, inputs).positions[:, None].clone()
    positions[0, 0, is_image(inputs)[0].nonzero()[1]] += 50
    given = {**words(inputs), "mm_token_type_ids": inputs["mm_token_type_ids"], "position_ids": positions}
    with pytest.raises(UnsupportedModelError, match="do not tell where frames begin"):
        run(model, given, mm_encoder_outputs=features_alone(dense, inputs, 1))


@pytest.mark.parametrize("case", VIDEO_CASES, ids=str)
def test_pooled_frames_are_counted_as_the_stock_model_pools_them(case) -> None:
    """5 × 5 patches become 2 × 2 tokens a frame; features of another model, with part of a frame, are refused."""
    fields = {"vision_config": {"image_size": 15}, "spatial_pool_stride": 2}
    model, dense = (tiny_vlm("llava_next_video", **fields) for _ in range(2))
    prune(model, config := case.config(dense))
    inputs = sample(dense, ONE_VIDEO)
    assert int(is_image(inputs).sum()) == 4 * 4
    with record(model) as rec:
        run(model, inputs)
    assert kept_in(rec) == expected_of(dense, config, "V", inputs)
    dense.config.spatial_pool_stride = model.config.spatial_pool_stride = 1
    with pytest.raises(UnsupportedModelError, match="16 tokens, where a frame has 25"):
        run(model, inputs)


@takes_features
@every_pair
def test_a_piece_of_a_prompt_with_a_whole_video(pair) -> None:
    """Where a newline behind the last frame tells that it is whole, and one, it is pruned; elsewhere it is refused."""
    model, dense, _ = pruned_pair(*pair)
    inputs = sample(dense, ONE_VIDEO)
    whole, pieces = greedy(model, inputs), {"prefill_chunk_size": inputs["input_ids"].shape[1] - 2}
    if hasattr(dense.model, "apply_pooling"):
        found = greedy(model, inputs, **pieces)
        assert torch.equal(found.sequences, whole.sequences)
        assert lengths(found[CACHE_NAME]) == lengths(whole[CACHE_NAME])
    else:
        with pytest.raises(UnsupportedModelError, match="leave prefill_chunk_size out"):
            greedy(model, inputs, **pieces)


# -- beside other methods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair", [pair for pair in WITH_VIDEOS if (pair[0], Case("fastv")) in set(SUPPORTED)], ids=id_of
)
def test_a_method_inside_the_decoder_goes_on_from_there(pair) -> None:
    """It prunes images too, but no newline token between frames."""
    family, case = pair
    model, dense = tiny_vlm(family), tiny_vlm(family)
    config = StackConfig((case.config(dense), Case("fastv").config(dense)))
    inputs = sample(dense, prompts(dense)[3 if "V" in family_of(dense).kinds else 0])
    prune(model, config)
    with record(model) as rec:
        output = run(model, inputs)
    told = reference(dense, inputs, stages_of(dense, config), rec).forward()
    assert list(rec.tokens.values()) == told.entering
    assert told.entering[-1] < told.entering[0] < inputs["input_ids"].shape[1]
    close(output.logits[0], told.logits)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_nothing_may_leave_in_front_of_them(family) -> None:
    """Behind a choice in the tower a frame's tokens are no longer in the places of those of the frame before."""
    model = tiny_vlm(family)
    config = StackConfig((VIDEO_CASES[0].config(model), Case("visionzip").config(model)))
    with pytest.raises(UnsupportedModelError, match=r"compares the tokens of frames|cannot be chosen in the"):
        prune(model, config)


# -- what is refused, and what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VIDEO_CASES, ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if get_adapter(family).no_videos])
def test_families_without_videos_are_refused(family, case) -> None:
    model = tiny_vlm(family)
    before = snapshot(model)
    for refuses in (prune, cost):
        with pytest.raises(UnsupportedModelError, match=rf"prunes videos; this family .* \('{family}'\).* divprune"):
            refuses(model, case.config(model))
    assert snapshot(model) == before


@pytest.mark.parametrize("family", [family for family in VIDEO_FAMILIES if get_adapter(family).position_axes > 1][:1])
def test_a_video_without_types_is_told_how_to_make_them(family: str) -> None:
    model = prune(tiny_vlm(family), VIDEO_CASES[0].config(tiny_vlm(family)))
    inputs = {name: value for name, value in sample(model, "..V.").items() if name != "mm_token_type_ids"}
    with pytest.raises(UnsupportedModelError, match=r"videos without mm_token_type_ids.*videos=\.\.\."):
        model(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1))


@each_once
def test_what_counts_an_image_says_that_it_stays_whole(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    config = case.config(model)
    for count in (cost, benchmark):
        with pytest.raises(ConfigError, match=r"prunes videos only.*a prompt with one image.*pruned\(model, config\)"):
            count(model, config)
    with pytest.raises(ConfigError, match="prunes videos, and budgets are of a prompt with one image"):
        config.for_budget(model, keep=0.5)
    with pytest.raises(NotImplementedError, match="prunes videos, and schedules are of a prompt with one image"):
        config.with_counts(adapter_of(model).shape(model), {-1: 3})
    with pytest.raises(ConfigError, match="prunes nothing"):
        prune(model, case.config(model, keep_ratio=1.0))
    stack = StackConfig((config, Case("random").config(model, layers=(2,))))
    assert cost(model, stack).ratio < 1, "of an image, by the other method"


# -- nothing is lost -------------------------------------------------------------------------------------------------


@every_pair
def test_unprune_copies_and_files(pair, tmp_path) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs, before = sample(model, ONE_VIDEO), snapshot(model)
    dense = run(model, inputs).logits
    result = run(prune(model, case.config(model)), inputs).logits
    assert not torch.equal(result, dense)
    twin = copy.deepcopy(model)
    save_pretrained(twin, tmp_path)
    for same in (twin, from_pretrained(tmp_path, auto_class=type(model))):
        assert torch.equal(run(same, inputs).logits, result)
        assert torch.equal(run(unprune(same), inputs).logits, dense)
    assert snapshot(unprune(model)) == before
    assert torch.equal(run(model, inputs).logits, dense)


@every_pair
def test_bfloat16(pair) -> None:
    """The choice is made in float32, of features in the model's precision."""
    family, case = pair
    model, dense = (tiny_vlm(family).to(torch.bfloat16) for _ in range(2))
    inputs = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and name.startswith("pixel") else tensor
        for name, tensor in sample(model, ONE_VIDEO).items()
    }
    with pruned(model, config := case.config(model)), record(model) as rec:
        assert run(model, inputs).logits.isfinite().all()
    assert kept_in(rec) == expected_of(dense, config, "V", inputs)


@each_once
def test_gradients_reach_what_they_reach_in_the_dense_model(pair) -> None:
    family, case = pair
    model = tiny_vlm(family).train()
    inputs = sample(model, ONE_VIDEO)
    inputs["labels"] = inputs["input_ids"].masked_fill(is_image(inputs), -100)

    def reached() -> set[str]:
        model.zero_grad()
        model(**inputs).loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    dense = reached()
    prune(model, case.config(model))
    assert reached() == dense
