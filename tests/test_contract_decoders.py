"""What every registered vision-language family owes, over its language models, with every method that prunes decoders:
exact counts, what an independent slow loop computes, exact undo, and no surprises with what people do to models."""

import copy
import dataclasses
import io
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_tokenprune import from_pretrained, prune, pruned, record, save_pretrained, unprune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.cost import cost
from hf_tokenprune.engine import counts
from hf_tokenprune.errors import ConfigError, UnsupportedModelError
from hf_tokenprune.recording import Record
from hf_tokenprune.registry import get_method
from hf_tokenprune.signals import Reduction, Signals, Stage, TextRows, Transition

from .decoder_families import (
    CASES,
    DEPTH,
    FAMILIES,
    OF_TEXT,
    ONCE,
    REFUSED,
    SUPPORTED,
    TEXTS,
    VOCABULARY,
    Case,
    Inputs,
    adapter_of,
    attached,
    built,
    closed_places,
    collate,
    image_features,
    is_image,
    lengths,
    may_renumber,
    run,
    sample,
    shape_of,
    stages_of,
    takes_any_tower,
    texts_of,
    tiny_vlm,
    with_keys,
)
from .decoder_prompts import of_images
from .decoder_visuals import family_of
from .families import snapshot
from .reference_decoder import cross_entropy, newlines, reference

ONE_IMAGE = "....I......"


def id_of(pair: tuple[str, Case]) -> str:
    return "-".join(map(str, pair))


every_method = pytest.mark.parametrize("pair", SUPPORTED, ids=id_of)
each_once = pytest.mark.parametrize("pair", ONCE, ids=id_of)
every_method_and_text = pytest.mark.parametrize(
    ("pair", "text"), [(pair, text) for pair in SUPPORTED for text in texts_of(pair[0])]
)
every_family = pytest.mark.parametrize("family", FAMILIES)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    """Up to a part of the largest entry: sums are rounded by the size of what they add up, not by what they come to."""
    largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, atol=atol * largest, rtol=1e-5)


def same(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual, expected)


def has_experts(model: PreTrainedModel) -> bool:
    return getattr(model.config.get_text_config(), "num_experts", None) is not None


ACROSS_KERNELS = 1e-4
"""How near SDPA and eager attention are: they round differently, and norms behind the halves of a layer enlarge it."""


def prompts(model: PreTrainedModel) -> list[Inputs]:
    """Prompts of different lengths with none, one and several images, of several sizes where the family has them."""
    parts = [ONE_IMAGE, "..", "..I.i...", "i....."]
    if "V" in family_of(model).kinds:
        parts += ["...V..", ".I..V."]
    return [sample(model, part, seed) for seed, part in enumerate(parts)]


# -- counts ----------------------------------------------------------------------------------------------------------


@every_method
def test_tokens_leave_as_scheduled(pair) -> None:
    """In forward and in generate the cache really gets shorter, by what the engine says."""
    family, case = pair
    model = tiny_vlm(family)
    config, inputs = case.config(model), sample(model, ONE_IMAGE)
    length = inputs["input_ids"].shape[1]
    shape = shape_of(model)
    assert int(is_image(inputs).sum()) == shape.num_prunable
    entering, left = [length] * DEPTH, {}
    for stage, before, after in counts(stages_of(model, config), shape):
        assert after < before
        entering[stage.layer + 1 :] = [length - shape.num_prunable + after] * (DEPTH - stage.layer - 1)
        left[stage.name] = after
    assert entering[-1] < length

    prune(model, config)
    with record(model) as rec:
        cache = run(model, inputs, use_cache=True)[CACHE_NAME]
    assert list(rec.tokens.values()) == entering
    assert lengths(cache) == with_keys(model, entering)
    assert {name: kept.shape[1] for name, kept in rec.kept.items()} == left
    with record(model) as rec:
        cache = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)[CACHE_NAME]
    assert list(rec.tokens.values()) == entering
    assert lengths(cache) == with_keys(model, [n + 3 for n in entering])


@every_method
def test_kept_sets_shrink_and_ascend(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    prune(model, case.config(model))
    batch = prompts(model)
    with record(model) as rec:
        run(model, collate(batch))
    for row, inputs in enumerate(batch):
        left = set(range(int(is_image(inputs).sum())))
        for kept in rec.kept.values():
            now = [number for number in kept[row].tolist() if number >= 0]
            assert kept[row].tolist() == now + [-1] * (kept.shape[1] - len(now)), "filling is behind"
            assert now == sorted(set(now)) and set(now) <= left
            left = set(now)
        assert bool(left) == bool(is_image(inputs).any()), "of every image something stays"


@every_method
def test_the_default_config_fits_or_says_why_not(pair) -> None:
    """Made for models of 24 to 32 layers and hundreds of image tokens, so on a tiny one either may be."""
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    before, config, number = snapshot(model), case.default, int(is_image(inputs).sum())
    try:
        prune(model, config)
    except ConfigError as error:
        assert "this model" in str(error)
        assert snapshot(model) == before
    else:  # an image of any size may be one that loses nothing
        loses = any(stage.num_kept(number) < number for stage in stages_of(model, config))
        held = lengths(run(model, inputs, use_cache=True)[CACHE_NAME])[-1]
        assert (held < inputs["input_ids"].shape[1]) == loses


@pytest.mark.parametrize("pair", REFUSED, ids=id_of)
def test_what_a_family_cannot_do_is_refused(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    before = snapshot(model)
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"(vision tower|decoder layer).*[Uu]se .*divprune"):
        prune(model, case.config(tiny_vlm("llava")))
    assert snapshot(model) == before
    with pytest.raises((ConfigError, UnsupportedModelError), match=r"[Uu]se .*divprune"):
        cost(model, case.config(tiny_vlm("llava")))  # no figures of what cannot be


@pytest.mark.parametrize(
    "family", [name for name, case in SUPPORTED if case.method == "cls_attention" and takes_any_tower(name)]
)
def test_ranking_by_cls_needs_one(family) -> None:
    model = tiny_vlm(family, vision_config={"model_type": "siglip_vision_model"})
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"CLS token.* has none; use visionzip or divprune"):
        prune(model, Case("cls_attention").config(model))
    assert snapshot(model) == before


# -- the independent reference ---------------------------------------------------------------------------------------


@every_method_and_text
def test_prefill_is_the_reference(pair, text) -> None:
    """Logits at every place, states before every layer, and how many tokens enter it."""
    family, case = pair
    dense, model = tiny_vlm(family, text), tiny_vlm(family, text)
    config, inputs = case.config(dense), sample(dense, ONE_IMAGE, seed=3)
    prune(model, config)
    with record(model) as rec:
        output = run(model, inputs, output_hidden_states=True)
    expected = reference(dense, inputs, stages_of(dense, config), rec, pruned=model).forward()
    assert list(rec.tokens.values()) == expected.entering
    assert len(expected.survivors) < inputs["input_ids"].shape[1]
    close(output.logits[0], expected.logits)
    for actual, states in zip(output.hidden_states, expected.states, strict=True):
        close(actual[0], states)


@pytest.mark.parametrize("parts", ["I......", "....I", "..I.I.....", "..i..I..", "I"])
@each_once
def test_images_anywhere_are_the_reference(pair, parts) -> None:
    """First, last, several: no place in the prompt is hard-coded."""
    family, case = pair
    dense, model = tiny_vlm(family), tiny_vlm(family)
    config, inputs = case.config(dense), sample(dense, parts, seed=4)
    prune(model, config)
    with record(model) as rec:
        output = run(model, inputs)
    expected = reference(dense, inputs, stages_of(dense, config), rec, pruned=model).forward()
    assert list(rec.tokens.values()) == expected.entering
    close(output.logits[0], expected.logits)


@pytest.mark.parametrize("pair", [pair for pair in SUPPORTED if may_renumber(pair[0])], ids=id_of)
def test_the_other_rule_for_positions_is_the_reference(pair) -> None:
    """Positions of what is left close up, or stay: a method has a default, and both work."""
    family, case = pair
    dense, model = tiny_vlm(family), tiny_vlm(family)
    config, inputs = case.config(dense), sample(dense, ONE_IMAGE, seed=5)
    stages = tuple(
        dataclasses.replace(stage, positions="original" if stage.positions == "contiguous" else "contiguous")
        for stage in stages_of(dense, config)
    )
    with attached(model, *stages), record(model) as rec:
        output = run(model, inputs)
        told = reference(dense, inputs, stages, rec, pruned=model)
        steps = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    close(output.logits[0], told.forward().logits)
    tokens, logits = told.generate(4)
    assert steps.sequences[0, -4:].tolist() == tokens
    close(torch.cat(steps.logits), logits)


TOWERS = {
    "clip, CLS kept": {"vision_feature_select_strategy": "full"},
    "clip, an early layer": {"vision_feature_layer": 1},
    "clip, the last layer": {"vision_feature_layer": -1},
    "siglip": {"vision_config": {"model_type": "siglip_vision_model"}, "vision_feature_select_strategy": "full"},
    "vit": {"vision_config": {"model_type": "vit"}},
}


def has_what_it_reads(tower: str, case: Case) -> bool:
    """Ranking by CLS needs one (test_ranking_by_cls_needs_one), and an earlier block one that is in front."""
    model = built("llava")
    needs = {name for stage in stages_of(model, case.config(model)) for name in stage.needs}
    lacking = {"siglip": case.method == "cls_attention", "clip, an early layer": "earlier_attention" in needs}
    return not lacking.get(tower)


@pytest.mark.parametrize(
    ("tower", "case"), [(tower, case) for tower in TOWERS for case in CASES if has_what_it_reads(tower, case)], ids=str
)
def test_other_vision_towers_are_the_reference(tower, case) -> None:
    """With and without a CLS token, which may be an image token itself, and with features of any one layer."""
    dense, model = tiny_vlm("llava", **TOWERS[tower]), tiny_vlm("llava", **TOWERS[tower])
    config, inputs = case.config(dense), sample(dense, ONE_IMAGE, seed=6)
    prune(model, config)
    with record(model) as rec:
        output = run(model, inputs)
    expected = reference(dense, inputs, stages_of(dense, config), rec, pruned=model).forward()
    assert list(rec.tokens.values()) == expected.entering
    assert len(expected.survivors) < inputs["input_ids"].shape[1]
    close(output.logits[0], expected.logits)
    unprune(model)
    assert torch.equal(run(model, inputs).logits, run(dense, inputs).logits)


@pytest.mark.parametrize("family", [family for family, case in SUPPORTED if case.method == "cls_attention"])
def test_a_choice_in_the_tower_leaves_the_other_features_alone(family) -> None:
    """cls_attention merges nothing: what it keeps are the dense features, the rest are marked."""
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, "..I.i..")
    prune(model, Case("cls_attention").config(model))
    with record(model) as rec:
        run(model, inputs)
    stock, marked = (image_features(vlm, **of_images(inputs)) for vlm in (dense, model))
    stays = torch.zeros(len(stock), dtype=torch.bool)
    stays[rec.kept["vision_tower"][0]] = True
    stays[list(newlines(dense, stock))] = True
    close(marked[stays], stock[stays])
    assert marked[~stays].isnan().all()


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@every_method
def test_a_batch_is_its_samples_alone(pair, side) -> None:
    """Prompts with none, one and several images of several sizes: logits and kept sets, whatever the padding."""
    family, case = pair
    model = tiny_vlm(family, texts_of(family)[-1])
    alone = prompts(model)
    prune(model, case.config(model))
    batch = collate(alone, side)
    with record(model) as rec:
        logits = run(model, batch).logits
    for row, inputs in enumerate(alone):
        with record(model) as rec_alone:
            expected = run(model, inputs).logits[0]
        close(logits[row][batch["attention_mask"][row].bool()], expected)
        for name, kept in rec_alone.kept.items():
            assert rec.kept[name][row][: kept.shape[1]].tolist() == kept[0].tolist()
            assert rec.kept[name][row][kept.shape[1] :].eq(-1).all()


@every_method
def test_no_sample_is_told_by_the_first(pair) -> None:
    """Samples of equal length keep sets of their own (an official code scores sample 0 alone), unless by place."""
    family, case = pair
    model = tiny_vlm(family)
    prune(model, case.config(model))
    with record(model) as rec:
        run(model, collate([sample(model, ONE_IMAGE, seed) for seed in (7, 8)]))
    by_place = case.method in ("random", "uniform")
    assert any(not torch.equal(*kept) for kept in rec.kept.values()) != by_place


@every_method
def test_a_prompt_without_an_image_is_dense(pair) -> None:
    family, case = pair
    dense, model = tiny_vlm(family), tiny_vlm(family)
    prune(model, case.config(model))
    batch = collate([sample(model, "....", 1), sample(model, "......", 2)])
    with record(model) as rec:
        assert torch.equal(run(model, batch).logits, run(dense, batch).logits)
    assert not rec.kept
    generated = [m.generate(**batch, max_new_tokens=4, do_sample=False) for m in (model, dense)]
    assert torch.equal(*generated)


# -- what a stage is shown -------------------------------------------------------------------------------------------


HALVES = ("attention_in", "attention_out", "mlp_in", "mlp_out")


@dataclasses.dataclass(frozen=True)
class Probe(Stage):
    """Keeps every second image token and shows what it was given to decide by."""

    seen: ClassVar[list[Signals]] = []

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"text_attention", "layer_scores"})

    @property
    def observes(self) -> tuple[int, ...]:
        return (0, 2, 3)

    def observe(self, transition: Transition) -> Tensor:
        """A number that tells the four tensors apart."""
        norms = [getattr(transition, name).norm(dim=-1) for name in HALVES]
        return sum(weight * norm for weight, norm in zip((1, 10, 100, 1000), norms, strict=True))

    def num_kept(self, num_prunable: int) -> int:
        return (num_prunable + 1) // 2

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        self.seen.append(signals)
        return Reduction((2 * torch.arange(n_keep)).expand(len(signals.tokens), -1))


INSIDE = [text for text, family in OF_TEXT.items() if "after_block" not in closed_places(built(family, text))]
"""Language models between whose layers tokens may leave."""


class OwnLastRow(Probe):
    text_rows = TextRows("last", "own")


class OwnText(Probe):
    text_rows = TextRows("text", "own")


class NextText(Probe):
    text_rows = TextRows("text", "next")


class NextLastRow(Probe):
    text_rows = TextRows("last", "next")


def watched(dense: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """Attention, states, and input and output of the halves of every layer of a dense eager model."""
    halves: dict[str, list[Tensor]] = {name: [] for name in HALVES}

    def watch_attention(module, args, kwargs, output) -> None:
        halves["attention_in"].append(kwargs["hidden_states"][0])
        halves["attention_out"].append(output[0][0])

    def watch_mlp(module, args, output) -> None:
        halves["mlp_in"].append(args[0][0])
        halves["mlp_out"].append(output[0])

    for block in adapter_of(dense).blocks(dense):
        block.self_attn.register_forward_hook(watch_attention, with_kwargs=True)
        block.mlp.register_forward_hook(watch_mlp)
    output = run(dense, inputs, output_attentions=True, output_hidden_states=True)
    return {"attention": output.attentions, "states": output.hidden_states, **halves}


@pytest.mark.parametrize("stage_class", [OwnLastRow, OwnText, NextText, NextLastRow])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", INSIDE)
def test_stages_see_what_the_dense_model_computes(text, side, stage_class) -> None:
    """Attention of the text, input and output of the halves, states: of each sample of a padded batch, its own."""
    stage = stage_class(3, "after_block")
    model = tiny_vlm(OF_TEXT[text], text)
    batch = [sample(model, parts, seed) for seed, parts in enumerate([ONE_IMAGE, "..I.I.", ".I...", "..I"])]
    stage.seen.clear()
    with attached(model, stage):
        run(model, collate(batch, side))
    shown = {int(signals.tokens.shape[1]): 0 for signals in stage.seen}
    for inputs in batch:
        seen = watched(tiny_vlm(OF_TEXT[text], text, attention="eager"), inputs)
        (image,) = is_image(inputs)
        count = int(image.sum())
        signals = next(s for s in stage.seen if s.tokens.shape[1] == count)
        row, shown[count] = shown[count], shown[count] + 1
        close(signals.tokens[row], seen["states"][4][0][image], ACROSS_KERNELS)

        behind = len(image) - 1 - int(image.nonzero().max())
        rows = max(1, 1 if stage.text_rows.rows == "last" else behind)
        (attention,) = seen["attention"][3 if stage.text_rows.layer == "own" else 4]
        close(signals.need("text_attention")[row][:, -rows:], attention[:, -rows:][..., image])
        assert (
            signals.need("text_mask")[row].tolist()
            == [False] * (signals.need("text_mask").shape[1] - rows) + [True] * rows
        )

        for k, layer in enumerate(stage.observes):
            transition = {
                name: seen[name][layer][None] for name in ("attention_in", "attention_out", "mlp_in", "mlp_out")
            }
            expected = stage.observe(Transition(**transition, valid=None, image=None))[0][image]
            close(signals.need("layer_scores")[row, k], expected, ACROSS_KERNELS)


@pytest.mark.parametrize("text", INSIDE)
def test_a_layer_in_parts_is_the_layer_bit_for_bit(text) -> None:
    model = tiny_vlm(OF_TEXT[text], text)
    decoder = model.get_decoder()
    states, positions = torch.randn(2, 9, 32), torch.arange(9).expand(adapter_of(model).position_axes, 1, 9).squeeze(0)
    rotary = decoder.rotary_emb(states, positions)
    kwargs = {"attention_mask": None, "position_ids": positions, "position_embeddings": rotary}
    with torch.no_grad():
        stock = [layer(states, **kwargs) for layer in decoder.layers]
        with attached(model, OwnText(3, "after_block")):
            parts = [layer.in_parts(states, **kwargs)[0] for layer in decoder.layers]
    assert all(torch.equal(a, b) for a, b in zip(stock, parts, strict=True))


@pytest.mark.parametrize(
    ("text", "case"),
    [(text, case) for text, family in OF_TEXT.items() for case in CASES if (family, case) in set(SUPPORTED)],
    ids=str,
)
def test_sdpa_and_eager_keep_the_same(text, case) -> None:
    """No method needs a certain attention implementation (an official code fails with eager, another with SDPA)."""
    kept, logits = {}, {}
    for attention in ("sdpa", "eager"):
        model = tiny_vlm(OF_TEXT[text], text, attention=attention)
        prune(model, case.config(model))
        with record(model) as rec:
            logits[attention] = run(model, collate(prompts(model), "right")).logits
        kept[attention] = rec.kept
    close(logits["sdpa"], logits["eager"], ACROSS_KERNELS)
    for name in kept["sdpa"]:
        assert torch.equal(kept["sdpa"][name], kept["eager"][name])


# -- nothing is lost -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class KeepAll(Stage):
    """A stage that asks for everything a family offers and drops nothing."""

    text_rows = TextRows("text", "next")

    @property
    def needs(self) -> frozenset[str]:
        inside = {"text_attention", "layer_scores"}
        return frozenset(inside if self.where == "after_block" else ())

    @property
    def observes(self) -> tuple[int, ...]:
        return (self.layer,) if self.where == "after_block" else ()

    def observe(self, transition: Transition) -> Tensor:
        return transition.mlp_out.norm(dim=-1)

    def num_kept(self, num_prunable: int) -> int:
        return num_prunable

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        raise AssertionError("nothing is to be decided where everything stays")


def everywhere(model: PreTrainedModel) -> list[KeepAll]:
    """A stage at the entrance and behind every layer, where the family lets tokens leave."""
    positions = "contiguous" if may_renumber(model.config.model_type) else "original"
    places = [(-1, "entrance"), *((layer, "after_block") for layer in range(DEPTH - 1))]
    return [KeepAll(*place, positions=positions) for place in places if place[1] not in closed_places(model)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "text", "positions"),
    [
        (family, text, positions)
        for family, text in TEXTS
        for positions in (("contiguous", "original") if may_renumber(family) else ("original",))
    ],
)
def test_keep_all_is_bit_identical(family, text, attention, positions) -> None:
    model = tiny_vlm(family, text, attention=attention)
    stages = [dataclasses.replace(stage, positions=positions) for stage in everywhere(model)]
    alone = prompts(model)
    batches = [alone[0], collate(alone[:3]), collate([alone[0]] * 2)]
    dense = [run(model, batch, use_cache=True, output_hidden_states=True) for batch in batches]
    greedy = model.generate(**batches[1], max_new_tokens=5, do_sample=False)
    with attached(model, *stages):
        assert torch.equal(model.generate(**batches[1], max_new_tokens=5, do_sample=False), greedy)
        for batch, expected in zip(batches, dense, strict=True):
            output = run(model, batch, use_cache=True, output_hidden_states=True)
            assert lengths(output[CACHE_NAME]) == lengths(expected[CACHE_NAME])
            valid = batch["attention_mask"].bool()
            # Padding, which is not the same here, goes to experts too, and how a product with a token is rounded
            # depends on how many others its expert has.
            alike = close if has_experts(model) and not valid.all() else same
            alike(output.logits[valid], expected.logits[valid])
            for states, stock in zip(output.hidden_states, expected.hidden_states, strict=True):
                alike(states[valid], stock[valid])


@pytest.mark.parametrize("side", ["left", "right"])
@every_family
def test_output_has_the_length_of_the_input(family, side) -> None:
    """Places that nothing was computed for show the state of the last token before them; so labels stay in place."""
    model = tiny_vlm(family)
    batch = collate(prompts(model), side)
    prune(model, Case("divprune").config(model))
    output = run(model, batch, output_hidden_states=True)
    shape = batch["input_ids"].shape
    assert output.logits.shape == (*shape, VOCABULARY)
    assert [states.shape for states in output.hidden_states] == [(*shape, 32)] * (DEPTH + 1)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert run(model, batch, logits_to_keep=1).logits.equal(output.logits[:, -1:])
    as_tuple = run(model, batch, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits)


@every_method
def test_unprune_is_exact(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    batch = collate(prompts(model))
    dense, before = run(model, batch).logits, snapshot(model)
    prune(model, case.config(model))
    assert not torch.equal(run(model, batch).logits, dense)
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    unprune(model)
    assert snapshot(model) == before
    assert torch.equal(run(model, batch).logits, dense)


@pytest.mark.parametrize("where", ["forward", "generate", "generate, second step"])
@each_once
def test_an_exception_leaves_nothing_behind(pair, where) -> None:
    """Pruned again right after, and dense after ``unprune``."""
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    dense, before = run(model, inputs).logits, snapshot(model)
    config = case.config(model)
    with pruned(model, config):
        expected = run(model, inputs).logits
    with pytest.raises(RuntimeError, match="boom"), pruned(model, config), record(model):
        boom = Boom(calls=1 if where.endswith("step") else 0)
        handle = adapter_of(model).blocks(model)[-1].register_forward_pre_hook(boom)
        try:
            if where == "forward":
                run(model, inputs)
            else:
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
        finally:
            handle.remove()
            assert torch.equal(run(model, inputs).logits, expected)
    assert snapshot(model) == before
    assert torch.equal(run(model, inputs).logits, dense)


@dataclasses.dataclass
class Boom:
    """A hook that raises after so many calls."""

    calls: int

    def __call__(self, *_: Any) -> None:
        if self.calls == 0:
            raise RuntimeError("boom")
        self.calls -= 1


@every_method
def test_weights_and_class_stay(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    before, kind = {name: value.clone() for name, value in model.state_dict().items()}, type(model)
    assert prune(model, case.config(model)) is model
    assert type(model) is kind
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@every_family
def test_the_model_without_its_head_prunes_too(family) -> None:
    whole = tiny_vlm(family)
    inputs, config = sample(whole, ONE_IMAGE), Case("divprune").config(whole)
    expected = run(prune(whole, config), inputs, output_hidden_states=True).hidden_states[-1]
    bare = prune(tiny_vlm(family).model, config)
    with record(bare) as rec:
        close(run(bare, inputs).last_hidden_state, expected)
    assert rec.kept


# -- copies and files ------------------------------------------------------------------------------------------------


@every_method
def test_deepcopy(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    dense = run(model, inputs).logits
    result = run(prune(model, case.config(model)), inputs).logits
    clone = copy.deepcopy(model)
    with record(clone) as rec:
        assert torch.equal(run(clone, inputs).logits, result)
        assert rec.kept
    assert torch.equal(run(unprune(clone), inputs).logits, dense)
    assert torch.equal(run(model, inputs).logits, result), "the original is still pruned"
    assert torch.equal(run(unprune(model), inputs).logits, dense)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
@each_once
def test_pickle(pair, how) -> None:
    family, case = pair
    dense = tiny_vlm(family)
    inputs = sample(dense, ONE_IMAGE)
    # Transformers cannot pickle a model that has collected hidden states, as making image features does.
    model = prune(tiny_vlm(family), case.config(dense))
    if how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)
    assert torch.equal(run(clone, inputs).logits, run(model, inputs).logits)
    assert torch.equal(run(unprune(clone), inputs).logits, run(dense, inputs).logits)


@every_method
def test_save_and_load(pair, tmp_path) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    save_pretrained(prune(model, case.config(model)), tmp_path)
    loaded = from_pretrained(tmp_path, auto_class=type(model))
    assert type(loaded) is type(model)
    assert torch.equal(run(loaded, inputs).logits, run(model, inputs).logits)
    assert torch.equal(run(unprune(loaded), inputs).logits, run(unprune(model), inputs).logits)


# -- training --------------------------------------------------------------------------------------------------------


def labelled(inputs: Inputs) -> Inputs:
    """Inputs with every token of text as its own label; the first token has none before it to be told from."""
    labels = inputs["input_ids"].masked_fill(is_image(inputs), -100)
    labels[:, 0] = -100
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("side", ["left", "right"])
@each_once
def test_loss_is_that_of_the_reference(pair, side) -> None:
    """Labels are as long as the input (official codes leave them unpruned beside shorter logits)."""
    family, case = pair
    dense, model = tiny_vlm(family), tiny_vlm(family)
    config, alone = case.config(dense), prompts(dense)
    prune(model, config)
    batch = collate(alone, side)
    batch["labels"] = _collated_labels(alone, side)
    with record(model) as rec:
        loss = run(model, batch).loss
    terms = []
    for row, inputs in enumerate(alone):
        told = reference(dense, inputs, stages_of(dense, config) if is_image(inputs).any() else (), rec, row, model)
        terms += cross_entropy(told.forward().logits, labelled(inputs)["labels"][0])
    close(loss, torch.stack(terms).mean())


def _collated_labels(alone: list[Inputs], side: str) -> Tensor:
    longest = max(inputs["input_ids"].shape[1] for inputs in alone)
    rows = []
    for inputs in alone:
        (labels,) = labelled(inputs)["labels"]
        filling = labels.new_full((longest - len(labels),), -100)
        rows.append(torch.cat([filling, labels] if side == "left" else [labels, filling]))
    return torch.stack(rows)


@each_once
def test_trainer_evaluates(pair, tmp_path) -> None:
    family, case = pair
    model = tiny_vlm(family)
    data = [labelled(sample(model, parts, seed)) for seed, parts in enumerate([ONE_IMAGE, "..I..", ".I......"])]
    prune(model, case.config(model))

    def collator(rows: list[Inputs]) -> Inputs:
        alone = [{name: tensor for name, tensor in row.items() if name != "labels"} for row in rows]
        return {**collate(alone, "right"), "labels": _collated_labels(alone, "right")}

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, per_device_eval_batch_size=3, report_to=[], remove_unused_columns=False
    )
    trainer = Trainer(model, arguments, data_collator=collator, eval_dataset=data)
    found = trainer.evaluate(ignore_keys=list(run(model, collator(data[:1])))[2:])
    close(torch.tensor(found["eval_loss"]), run(model, collator(data)).loss)


def gradients(model: PreTrainedModel, batch: Inputs) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_method
def test_gradients_are_finite_and_reach_everything(pair) -> None:
    """Tower, projector and decoder: whatever learns in the dense model."""
    family, case = pair
    model = tiny_vlm(family).train()
    inputs = labelled(sample(model, ONE_IMAGE))
    dense = gradients(model, inputs)
    prune(model, case.config(model))
    found = gradients(model, inputs)
    assert found.keys() == dense.keys()
    assert any(name.startswith(f"model.{adapter_of(model).tower_name}.") for name in found)
    assert not [name for name, gradient in found.items() if not gradient.isfinite().all()]
    # Keys' biases shift all scores of a row alike, so their gradient is zero; newlines may all be dropped.
    zero = [name for name, g in found.items() if g.abs().max() == 0 and dense[name].abs().max() > 1e-6]
    assert set(zero) <= {"model.image_newline"}


@each_once
def test_gradient_checkpointing(pair) -> None:
    family, case = pair
    model = tiny_vlm(family).train()
    inputs = labelled(collate([sample(model, ONE_IMAGE), sample(model, "..I..")]))
    prune(model, case.config(model))
    plain = gradients(model, inputs)
    calls = {name: 0 for name, module in model.named_modules() if name.endswith("input_layernorm")}
    for name in calls:
        model.get_submodule(name).register_forward_hook(Count(calls, name))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(model, inputs)
    assert min(calls.values()) >= 2, "every layer is run again, pruned ones too"
    assert checkpointed.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], equal_nan=False)


@dataclasses.dataclass
class Count:
    calls: dict[str, int]
    name: str

    def __call__(self, *_: Any) -> None:
        self.calls[self.name] += 1


# -- precision and placement -----------------------------------------------------------------------------------------


@every_method
def test_bfloat16(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    prune(model.to(torch.bfloat16), case.config(model))
    with record(model) as rec:
        output = run(model, half(inputs, torch.bfloat16), use_cache=True)
    assert output.logits.dtype == torch.bfloat16 and output.logits.isfinite().all()
    assert lengths(output[CACHE_NAME]) == with_keys(model, rec.tokens.values())
    assert rec.tokens[DEPTH - 1] < inputs["input_ids"].shape[1]


def half(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def runs_in_autocast(family: str) -> bool:
    """Whether the dense model runs at all: an old SmolVLM puts features of one dtype into those of another."""
    model = tiny_vlm(family)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run(model, sample(model, ONE_IMAGE))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("pair", [(family, case) for family, case in ONCE if runs_in_autocast(family)], ids=id_of)
def test_autocast(pair) -> None:
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    prune(model, case.config(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(model, inputs, use_cache=True)
    assert output.logits.isfinite().all()
    assert lengths(output[CACHE_NAME])[-1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("order", ["hooks, then prune", "prune, then hooks"])
@each_once
def test_accelerate_hooks(pair, order) -> None:
    pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    config, blocks = case.config(model), adapter_of(model).blocks(model)
    dense, expected = run(model, inputs).logits, run(prune(copy.deepcopy(model), config), inputs).logits
    hooks = [Counting() for _ in blocks]
    steps = [
        lambda: [add_hook_to_module(block, hook) for block, hook in zip(blocks, hooks, strict=True)],
        lambda: prune(model, config),
    ]
    for step in steps if order.startswith("hooks") else reversed(steps):
        step()
    assert torch.equal(run(model, inputs).logits, expected)
    assert [hook.calls for hook in hooks] == [1] * DEPTH
    unprune(model)
    assert torch.equal(run(model, inputs).logits, dense)
    assert [hook.calls for hook in hooks] == [2] * DEPTH
    prune(model, config)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model, inputs).logits, expected), "still pruned when accelerate is gone"
    assert torch.equal(run(unprune(model), inputs).logits, dense)


def runs_offloaded(family: str) -> bool:
    """Whether the dense model runs at all: some ask on which device the weights are that are not there."""
    try:
        import accelerate
    except ImportError:
        return True  # the test says so
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    try:
        run(model, inputs)
    except RuntimeError:
        return False
    return True


OFFLOADED = [(family, case) for family, case in ONCE if runs_offloaded(family)]


@pytest.mark.parametrize("order", ["offload, then prune", "prune, then offload"])
@pytest.mark.parametrize("pair", OFFLOADED, ids=id_of)
def test_cpu_offload(pair, order) -> None:
    accelerate = pytest.importorskip("accelerate")
    family, case = pair
    model = tiny_vlm(family)
    inputs = sample(model, ONE_IMAGE)
    config = case.config(model)
    expected = run(prune(copy.deepcopy(model), config), inputs).logits
    steps = [
        lambda: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
        lambda: prune(model, config),
    ]
    for step in steps if order.startswith("offload") else reversed(steps):
        step()
    assert next(adapter_of(model).blocks(model)[-1].parameters()).device.type == "meta", "the weights are not there"
    assert torch.equal(run(model, inputs).logits, expected)


# -- newline tokens --------------------------------------------------------------------------------------------------

WITH_NEWLINES = [
    (family, case)
    for family, case in SUPPORTED
    if hasattr(built(family).model, "image_newline") and "newlines" in get_method(case.method).__dataclass_fields__
]


@pytest.mark.parametrize("pair", WITH_NEWLINES, ids=id_of)
def test_protected_newlines_all_stay(pair) -> None:
    """They are no candidates and count for no ratio; left to themselves, they stay in the place of others or leave."""
    family, case = pair
    dense = tiny_vlm(family)
    inputs = sample(dense, "..I....i....", seed=9)
    always = newlines(dense, reference(dense, inputs).embeds[is_image(inputs)[0]])
    assert always
    kept = {}
    for rule in ("prune", "protect"):
        model = tiny_vlm(family)
        config = case.config(model, newlines=rule)
        prune(model, config)
        with record(model) as rec:
            output = run(model, inputs)
        told = reference(dense, inputs, stages_of(dense, config), rec, pruned=model).forward()
        close(output.logits[0], told.logits)
        assert list(rec.tokens.values()) == told.entering
        numbers = [int(is_image(inputs)[0][:place].sum()) for place in told.survivors if is_image(inputs)[0, place]]
        kept[rule] = set(numbers)
    assert kept["protect"] >= always
    assert len(kept["prune"]) < len(kept["protect"])


# -- a real accelerator ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@each_once
def test_gpu_flash_attention(pair) -> None:
    """Which takes padding in a way of its own: a ragged batch goes through as short as with SDPA, and finite."""
    pytest.importorskip("flash_attn")
    family, case = pair
    counts_of = {}
    for attention in ("sdpa", "flash_attention_2"):
        model = tiny_vlm(family).to("cuda", torch.bfloat16)
        model.set_attn_implementation({"text_config": attention})
        batch = collate(prompts(model))
        prune(model, case.config(model))
        moved = {name: tensor.to("cuda") for name, tensor in half(batch, torch.bfloat16).items()}
        output = run(model, moved, use_cache=True)
        assert output.logits[moved["attention_mask"].bool()].isfinite().all()
        counts_of[attention] = lengths(output[CACHE_NAME])
    assert counts_of["sdpa"] == counts_of["flash_attention_2"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_method
def test_gpu(pair, dtype) -> None:
    """A padded batch on CUDA: the same counts; in float32 the same sets and tokens as on the CPU."""
    family, case = pair
    model = tiny_vlm(family)
    batch = collate(prompts(model))
    prune(model, case.config(model))

    def both() -> tuple[Record, Any, Tensor]:
        device = model.device
        moved = {name: tensor.to(device) for name, tensor in half(batch, model.dtype).items()}
        with record(model) as rec:
            output = run(model, moved, use_cache=True)
            generated = model.generate(**moved, max_new_tokens=4, do_sample=False)
        return rec, output, generated

    rec, output, generated = both()
    model.to("cuda", dtype)
    on_gpu, output_on_gpu, generated_on_gpu = both()
    assert output_on_gpu.logits.isfinite().all()
    assert list(on_gpu.tokens.values()) == list(rec.tokens.values())
    assert lengths(output_on_gpu[CACHE_NAME]) == lengths(output[CACHE_NAME])
    if dtype == torch.float32:
        assert all(torch.equal(on_gpu.kept[name].cpu(), rec.kept[name]) for name in rec.kept)
        assert torch.equal(generated_on_gpu.cpu(), generated)
