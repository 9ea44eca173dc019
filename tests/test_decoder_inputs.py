"""What pruned vision-language models refuse, each with a message that says what to do, and with model and cache as they
were: a later, ordinary call works. And odd inputs that they take."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    DynamicCache,
    EncoderDecoderCache,
    MistralConfig,
    PreTrainedModel,
    StaticCache,
    ViTForImageClassification,
)

from hf_tokenprune import FastVConfig, PruneConfig, TransPruneConfig, prune, record
from hf_tokenprune.adapters.decoder import LAYER_CLASSES
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.errors import ConfigError, PruneStateError, TokenPruneError, UnsupportedModelError
from hf_tokenprune.registry import get_method

from .decoder_families import (
    CASES,
    DEPTH,
    FAMILIES,
    ONCE,
    SUPPORTED,
    TEXTS,
    Case,
    Inputs,
    adapter_of,
    attached,
    collate,
    image_features,
    is_image,
    lengths,
    new_cache,
    run,
    sample,
    tiny_vlm,
    with_keys,
)
from .families import snapshot
from .reference_decoder import axes, newlines, positions_of, reference
from .test_contract_decoders import ONE_IMAGE, close, each_once, every_family, everywhere, id_of, prompts


def ready(family: str = "llava", case: Case | None = None, **model: object) -> tuple[PreTrainedModel, Inputs]:
    """A pruned model and a prompt with an image."""
    vlm = tiny_vlm(family, **model)
    inputs = sample(vlm, ONE_IMAGE)
    return prune(vlm, (case or Case("pyramiddrop")).config(vlm)), inputs


def placed(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """With positions, where they have several axes: stock code makes these from input_ids and a mask (B, T) alone."""
    positions = positions_of(model, inputs)
    return inputs if len(positions) == 1 else {**inputs, "position_ids": axes(positions)}


def one_of(family: str) -> Case:
    """A case that a family supports: of those that are tried on each family."""
    return next(case for name, case in reversed(ONCE) if name == family)


@contextmanager
def refused(model: PreTrainedModel, inputs: Inputs, match: str, error: type = UnsupportedModelError) -> Iterator[None]:
    """Within: a call that is refused; then the same model works as before."""
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    before = {**snapshot(model), "attributes": None}  # generate keeps notes of its own on a model
    with pytest.raises(error, match=match):
        yield
    assert {**snapshot(model), "attributes": None} == before
    cache = new_cache(model)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False, **{CACHE_NAME: cache}).equal(expected)
    assert lengths(cache)[-1] < inputs["input_ids"].shape[1]


# -- modes of generate and forward -----------------------------------------------------------------------------------


@each_once
def test_a_static_cache_is_refused(pair) -> None:
    """Its layers all have one length; and a generate that failed leaves nothing behind for the next."""
    model, inputs = ready(*pair)
    with refused(model, inputs, r"with a StaticCache.*Use a DynamicCache .*leave cache_implementation out"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100)
    with refused(model, inputs, "with a StaticCache"):
        run(model, inputs, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 0


def test_caches_that_cut_or_nest_their_layers_are_refused() -> None:
    model, inputs = ready()
    sliding = DynamicCache(config=MistralConfig(sliding_window=16, num_hidden_layers=DEPTH))
    with refused(model, inputs, r"with a DynamicCache of \['DynamicSlidingWindowLayer'\].*Use a DynamicCache"):
        run(model, inputs, **{CACHE_NAME: sliding})
    with refused(model, inputs, r"with a EncoderDecoderCache.*Use a DynamicCache"):
        run(model, inputs, **{CACHE_NAME: EncoderDecoderCache(DynamicCache(), DynamicCache())})


@each_once
def test_prefill_in_chunks_is_refused(pair) -> None:
    model, inputs = ready(*pair)
    with refused(model, inputs, "leave prefill_chunk_size out"):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, prefill_chunk_size=16)


@each_once
def test_a_mask_for_every_query_is_refused(pair) -> None:
    model, inputs = ready(*pair)
    length = inputs["input_ids"].shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for masks in (mask, {"full_attention": mask}):
        with refused(model, inputs, r"takes a \(batch, length\) attention_mask"):
            run(model, {**placed(model, inputs), "attention_mask": masks})


def test_paged_attention_is_refused() -> None:
    model, inputs = ready()
    config = model.model.language_model.config
    stock = config._attn_implementation
    with refused(model, inputs, "'paged|sdpa' .continuous batching. cannot hold layers of different lengths"):
        config._attn_implementation_internal = "paged|sdpa"
        try:
            run(model, inputs)
        finally:
            config._attn_implementation_internal = stock


@each_once
def test_placeholders_without_an_image_are_refused(pair) -> None:
    model, inputs = ready(*pair)
    bare = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with refused(model, inputs, "image placeholders but no pixel_values"):
        run(model, bare)


@each_once
def test_embeddings_whose_images_cannot_be_told_are_refused(pair) -> None:
    """Features already scattered into inputs_embeds look like any other embedding."""
    model, inputs = ready(*pair)
    embeds = reference(tiny_vlm(pair[0]), inputs).embeds[None]
    with refused(model, inputs, "inputs_embeds without image placeholders: .*Pass input_ids and pixel_values"):
        run(model, {"inputs_embeds": embeds})


@each_once
def test_embeddings_with_placeholders_are_taken(pair) -> None:
    model, inputs = ready(*pair)
    expected = run(model, inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {name: tensor for name, tensor in placed(model, inputs).items() if name != "input_ids"}
    assert torch.equal(run(model, {**given, "inputs_embeds": embeds}).logits, expected)


@each_once
def test_more_placeholders_than_features_are_an_error(pair) -> None:
    """Whatever the installed Transformers says to this, it still says."""
    model, inputs = ready(*pair)
    image = is_image(inputs)[0].nonzero().flatten()
    ids = inputs["input_ids"].clone()
    ids[0, image[-1] + 1] = ids[0, image[-1]]
    with pytest.raises(Exception) as stock:
        run(tiny_vlm(pair[0]), {**inputs, "input_ids": ids})
    with refused(model, inputs, re.escape(str(stock.value)), stock.type):
        run(model, {**inputs, "input_ids": ids})


@each_once
def test_features_of_another_model_are_refused(pair) -> None:
    """Where tokens are chosen in the vision tower: features from elsewhere were never chosen among. Nothing silent."""
    family, case = pair
    model, inputs = ready(family, case)
    stages = adapter_of(model).states(model)[0].stages
    if stages[0].where != "vision_tower":
        pytest.skip("chooses in the decoder, whoever made the features")
    dense = tiny_vlm(family)
    model.model.get_image_features, stock = dense.model.get_image_features, model.model.get_image_features
    with pytest.raises(PruneStateError, match=r"the vision tower dropped nothing, so .* had no effect"):
        run(model, inputs)
    model.model.get_image_features = stock
    assert run(model, inputs).logits.isfinite().all()


def takes_several_layers(family: str) -> bool:
    """Whether the stock model itself reads features of several layers: InternVL says so and cannot."""
    if not hasattr(AutoConfig.for_model(family), "vision_feature_layer"):
        return False
    try:
        sample(tiny_vlm(family, vision_feature_layer=[-2, -1]), ONE_IMAGE)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize(
    "family", [family for family, case in SUPPORTED if case.method == "visionzip" and takes_several_layers(family)]
)
@pytest.mark.parametrize("wanted", [[-2, -1], [1]], ids=str)
def test_features_of_several_layers_need_a_choice_in_the_decoder(family, wanted) -> None:
    model = tiny_vlm(family, vision_feature_layer=wanted)
    inputs = sample(model, ONE_IMAGE)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"vision_feature_layer=\[.*need one block's output"):
        prune(model, Case("visionzip").config(model))
    assert snapshot(model) == before
    prune(model, Case("divprune").config(model))
    with record(model) as rec:
        run(model, inputs)
    assert rec.kept


@pytest.mark.parametrize("layer", [-1, 1])
def test_another_feature_layer_in_the_call(layer) -> None:
    """An argument of the forward against the config: refused or obeyed, never half of each."""
    model, inputs = ready("llava", Case("cls_attention"))
    try:
        output = run(model, inputs, vision_feature_layer=layer, use_cache=True)
    except TokenPruneError:
        return
    assert output.logits.isfinite().all()
    assert lengths(output[CACHE_NAME])[-1] < inputs["input_ids"].shape[1]


# -- models that prune refuses ---------------------------------------------------------------------------------------


def refused_by_prune(model: PreTrainedModel, case: Case, match: str) -> None:
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=match):
        prune(model, case.config(tiny_vlm("llava")))
    assert snapshot(model) == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sliding_window_is_refused(case) -> None:
    model = tiny_vlm("llava", "mistral", text_config={"sliding_window": 16})
    refused_by_prune(model, case, r"sliding window.*text_config.sliding_window = None")


def test_sliding_layers_are_refused() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 4}
    refused_by_prune(tiny_vlm("llava", "qwen2", text_config=sliding), Case("divprune"), "sliding window")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_unknown_language_model_is_refused(case) -> None:
    model = tiny_vlm("llava", text_config={"model_type": "gemma"})
    known = ", ".join(sorted(LAYER_CLASSES))
    refused_by_prune(model, case, f"the language model is a 'gemma'; its layers are known for {known}")


def test_an_unknown_vision_tower_is_refused_where_it_chooses() -> None:
    """And only there: the decoder does not ask where features come from."""
    tower = {"model_type": "dinov2", "num_hidden_layers": 3}
    for name in ("visionzip", "cls_attention"):
        model = tiny_vlm("llava", vision_config=tower)
        before = snapshot(model)
        with pytest.raises(TokenPruneError, match="vision tower"):
            prune(model, Case(name).config(tiny_vlm("llava")))
        assert snapshot(model) == before
    model = tiny_vlm("llava", vision_config=tower)
    inputs = sample(model, ONE_IMAGE)
    prune(model, Case("divprune").config(tiny_vlm("llava")))
    assert lengths(run(model, inputs, use_cache=True)[CACHE_NAME])[0] < inputs["input_ids"].shape[1]


def test_a_changed_layer_is_refused() -> None:
    model = tiny_vlm("llava")
    layer = model.model.language_model.layers[5]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    refused_by_prune(model, Case("divprune"), "decoder layer 5 has a forward of its own")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_without_a_decoder_is_refused(case) -> None:
    from .families import tiny_model

    if "vision" in get_method(case.method).prunes:
        pytest.skip("prunes vision encoders too")
    model = tiny_model("vit", ViTForImageClassification)
    before = snapshot(model)
    message = r"works on vision-language models with a decoder; this model is .*Methods for it: .*zero_tprune"
    with pytest.raises(UnsupportedModelError, match=message):
        prune(model, case.config(tiny_vlm("llava")))
    assert snapshot(model) == before


# -- configs that prune refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", SUPPORTED, ids=id_of)
def test_a_config_that_prunes_nothing_is_refused(pair) -> None:
    """Nothing silent: an official code does nothing when its environment variables are missing."""
    family, case = pair
    model = tiny_vlm(family)
    config = keeping_all(case.config(model))
    if case.parts is not None:
        parts = tuple(keeping_all(part) for part in getattr(config, case.parts))
        config = dataclasses.replace(config, **{case.parts: parts})
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"prunes nothing on this model: every layer keeps all \d+ tokens"):
        prune(model, config)
    assert snapshot(model) == before


def keeping_all(config: PruneConfig) -> PruneConfig:
    """The config with everything kept that it names."""
    fields = {f.name for f in dataclasses.fields(config)}
    kept: dict[str, Any] = {"keep_ratio": 1.0, "dominant": 1000, "contextual": 1000}
    ratios = getattr(config, "keep_ratios", None)
    kept["keep_ratios"] = tuple(1.0 for _ in ratios) if isinstance(ratios, tuple) else 1.0
    return dataclasses.replace(config, **{name: value for name, value in kept.items() if name in fields})


def test_newlines_can_only_be_protected_where_there_are_any() -> None:
    model = tiny_vlm("llava")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"newlines='protect' .*this model has no newline tokens to protect"):
        prune(model, Case("divprune").config(model, newlines="protect"))
    assert snapshot(model) == before


@pytest.mark.parametrize("layers", [(7,), (3, 9)], ids=str)
def test_layers_that_do_not_exist_are_refused(layers) -> None:
    model = tiny_vlm("llava")
    before = snapshot(model)
    config = TransPruneConfig(layers=layers, accumulate_layers=(2,), keep_ratios=(0.5, 0.25)[: len(layers)])
    with pytest.raises(ConfigError, match=r"layers=.*layers of 0\.\.6, each with a layer behind it.*has 8 layers"):
        prune(model, config)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", [case for case in CASES if case.in_layers], ids=str)
def test_no_token_leaves_behind_the_last_layer(case: Case) -> None:
    """There is no layer that could begin without it, whatever the method."""
    model = tiny_vlm("llava")
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"0\.\.6, each with a layer behind it.*this model has 8 layers"):
        prune(model, case.config(model, layers=(6, 7)))
    assert snapshot(model) == before
    prune(model, case.config(model, layers=(5, 6)))
    inputs = sample(model, ONE_IMAGE)
    output = run(model, inputs, output_hidden_states=True, use_cache=True)
    five, six, seven = lengths(output[CACHE_NAME])[5:]
    assert inputs["input_ids"].shape[1] == five > six > seven
    assert {states.shape[1] for states in output.hidden_states} == {five}


# -- odd inputs that work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32], ids=str)
def test_masks_of_any_dtype(dtype) -> None:
    model = tiny_vlm("llava")
    batch = collate(prompts(model))
    prune(model, Case("transprune").config(model))
    expected = run(model, batch).logits
    assert torch.equal(run(model, {**batch, "attention_mask": batch["attention_mask"].to(dtype)}).logits, expected)


@each_once
def test_positions_of_the_caller(pair) -> None:
    """Positions count from wherever the caller starts: the rotary embedding knows differences only."""
    model, inputs = ready(*pair)
    positions = axes(positions_of(model, inputs))
    close(run(model, inputs, position_ids=positions + 17).logits, run(model, inputs).logits)
    assert torch.equal(run(model, inputs, position_ids=positions).logits, run(model, inputs).logits)


@each_once
def test_output_attentions_are_of_the_tokens_that_were_there(pair) -> None:
    family, case = pair
    model, inputs = ready(family, case, attention="eager")
    with record(model) as rec:
        attentions = run(model, inputs, output_attentions=True).attentions
    assert [attention.shape[-2:] for attention in attentions] == with_keys(model, [(n, n) for n in rec.tokens.values()])


@each_once
def test_a_forward_without_a_mask(pair) -> None:
    model, inputs = ready(*pair)
    expected = run(model, inputs).logits
    assert torch.equal(run(model, {k: v for k, v in inputs.items() if k != "attention_mask"}).logits, expected)


@every_family
def test_what_looks_like_a_newline_is_one_only_in_an_image(family) -> None:
    model = tiny_vlm(family)
    if not hasattr(model.model, "image_newline"):
        pytest.skip("a family without newlines")
    inputs = sample(model, ONE_IMAGE)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = model.model.image_newline
    inputs["input_ids"][0, 1] = 5
    always = newlines(model, reference(model, inputs).embeds[is_image(inputs)[0]])
    prune(model, Case("divprune").config(model, newlines="protect"))
    with record(model) as rec:
        run(model, inputs)
    assert not always & set(rec.kept["entrance"][0].tolist())
    assert rec.tokens[0] == inputs["input_ids"].shape[1] - int(is_image(inputs).sum()) + len(always) + len(
        rec.kept["entrance"][0]
    )


@pytest.mark.parametrize(("family", "text"), TEXTS)
def test_the_attention_implementation_may_change_while_pruned(family, text) -> None:
    model = tiny_vlm(family, text)
    inputs = sample(model, ONE_IMAGE)
    prune(model, one_of(family).config(model))
    expected = run(model, inputs).logits
    model.set_attn_implementation("eager")
    close(run(model, inputs).logits, expected)
    model.set_attn_implementation("sdpa")
    assert torch.equal(run(model, inputs).logits, expected)


def test_features_do_not_depend_on_hidden_states_being_asked_for() -> None:
    model, inputs = ready("llava", Case("visionzip"))
    first = run(model, inputs).logits
    assert torch.equal(run(model, inputs, output_hidden_states=True).logits, first)
    features = image_features(model, inputs["pixel_values"])
    assert torch.equal(image_features(model, inputs["pixel_values"]).isnan(), features.isnan())


def test_images_of_one_size_after_another() -> None:
    """Crops of one image size after another through one model: nothing is remembered between forwards."""
    model = tiny_vlm(FAMILIES[1])
    batches = [sample(model, parts, seed) for seed, parts in enumerate([ONE_IMAGE, "..i..", "I.", ONE_IMAGE])]
    dense = [run(model, inputs).logits for inputs in batches]
    with attached(model, *everywhere(model)):
        assert all(
            torch.equal(run(model, inputs).logits, logits) for inputs, logits in zip(batches, dense, strict=True)
        )
    assert AutoConfig.for_model(FAMILIES[1]).model_type == FAMILIES[1]


def test_a_budget_for_what_is_refused_is_refused() -> None:
    """Layers that are recurrent have no attention to read: no config for it either."""
    with pytest.raises(UnsupportedModelError, match=r"linear_attention.*divprune"):
        FastVConfig(layer=2).for_budget(tiny_vlm("qwen3_5"), keep=0.5)


@pytest.mark.parametrize("case", [Case("divprune"), Case("fastv")], ids=str)
def test_positions_of_other_tokens_are_refused(case: Case) -> None:
    """A dense model raises too. What stays here would be rotated by the positions of what stood in front."""
    model, inputs = ready("llava", case)
    length = inputs["input_ids"].shape[1]
    for wrong in (length - 1, length + 3):
        with pytest.raises(UnsupportedModelError, match=rf"position_ids of {wrong} tokens for {length} "):
            run(model, inputs, position_ids=torch.arange(wrong)[None])
    assert run(model, inputs, position_ids=torch.arange(length)[None]).logits.isfinite().all()
