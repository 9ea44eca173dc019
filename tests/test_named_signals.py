"""What adapters tell a stage of text, keys, towers and earlier blocks, against what a dense model computes."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hf_tokenprune import DivPruneConfig, FastVConfig, UnsupportedModelError, prune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.evaluation.resize import interpolated_positions
from hf_tokenprune.registry import get_adapter
from hf_tokenprune.signals import Reduction, Signals, Stage, TextRows

from .decoder_families import (
    FAMILIES,
    OF_TEXT,
    adapter_of,
    attached,
    built,
    collate,
    is_image,
    is_recurrent,
    run,
    sample,
    tiny_vlm,
)
from .decoder_visuals import IMAGE, SPECIAL, Inputs
from .test_tower_choices import MERGING, Watched
from .test_tower_choices import SEEN as WATCHED

SEEN: list[Signals] = []
"""What stages were shown since the test began, group by group."""
RATED: list[tuple[Tensor, Tensor, Tensor]] = []
LAYER = 2


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    SEEN.clear()
    RATED.clear()
    yield


@dataclass(frozen=True)
class Look(Stage):
    """Shows what it needs, and keeps the first half."""

    reads: frozenset[str] = frozenset()
    rows: str = "text"
    block: int = 0

    @property
    def needs(self) -> frozenset[str]:
        return self.reads

    @property
    def text_rows(self) -> TextRows | None:  # type: ignore[override]
        return TextRows(self.rows) if any("text" in name for name in self.reads) else None  # type: ignore[arg-type]

    @property
    def earlier_block(self) -> int:
        return self.block

    def rate_text(self, images: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        RATED.append((images, text, text_mask))
        return text[..., 0].float()

    def num_kept(self, num_prunable: int) -> int:
        return max(1, num_prunable // 2)

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        SEEN.append(signals)
        tokens = signals.tokens[:, signals.num_protected :]
        return Reduction(torch.arange(n_keep, device=tokens.device).expand(len(tokens), -1))


def look(where: str, *reads: str, **more: Any) -> Look:
    return Look(LAYER if where == "after_block" else -1, where, frozenset(reads), positions="original", **more)


def text_behind(inputs: Inputs) -> list[int]:
    """Places of what stands behind the last image of one prompt."""
    (ids,) = inputs["input_ids"]
    last = is_image(inputs)[0].nonzero().max()
    return [i for i in range(int(last) + 1, len(ids)) if inputs["attention_mask"][0, i]]


def words(model: PreTrainedModel, inputs: Inputs, places: list[int]) -> list[int]:
    named = {token for name, token in SPECIAL.items() if hasattr(model.config, name)}
    special = named | {model.config.get_text_config().pad_token_id}
    return [i for i in places if int(inputs["input_ids"][0, i]) not in special]


def shown(signals: Signals, row: int) -> Tensor:
    """(r, D) the text of one member of a group, without filling."""
    assert signals.text is not None and signals.text_mask is not None
    return signals.text[row][signals.text_mask[row]]


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["last", "text", "question", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_at_the_entrance_is_the_embeddings_of_the_prompt(family: str, rows: str) -> None:
    """Of each sample of a ragged batch, padded on either side; special tokens are no words of the question."""
    model = tiny_vlm(family)
    model.config.get_text_config().eos_token_id = 9
    prompts = [sample(model, "..I...", seed=1), sample(model, ".I.....", seed=2)]
    prompts[1]["input_ids"][0, -2] = 9
    embed = built(family).get_input_embeddings()
    for side in ("left", "right"):
        SEEN.clear()
        with attached(model, look("entrance", "text", rows=rows, budget="sample")):
            run(model, collate(prompts, side))
        found = [shown(signals, row) for signals in SEEN for row in range(len(signals.tokens))]
        expected = []
        for inputs in prompts:
            behind = text_behind(inputs)
            others = (~is_image(inputs)[0]).nonzero().flatten().tolist()
            question = [i for i in words(model, inputs, behind) if int(inputs["input_ids"][0, i]) != 9]
            places = {"last": behind[-1:], "text": behind, "question": question, "all": others}[rows]
            expected.append(embed(inputs["input_ids"][0, places]))
        assert len(found) == 2
        for wanted in expected:  # groups come by their counts
            assert any(wanted.shape == text.shape and torch.equal(wanted, text) for text in found)


def test_a_question_of_special_tokens_alone_is_all_of_them() -> None:
    model = tiny_vlm("llava")
    inputs = sample(model, "..I..")
    inputs["input_ids"][0, -2:] = model.config.get_text_config().pad_token_id
    with attached(model, look("entrance", "text", rows="question")):
        run(model, inputs)
    assert shown(SEEN[0], 0).shape[0] == 2


def test_a_prompt_that_ends_with_an_image_has_no_question() -> None:
    """Its last image token is none, beside a sample that has one too."""
    model = tiny_vlm("llava")
    prompts = [sample(model, "...I", seed=1), sample(model, ".I...", seed=2)]
    for batch in ([prompts[0]], prompts):
        SEEN.clear()
        with attached(model, look("entrance", "text", rows="question")):
            run(model, collate(batch))
        shown_rows = [len(shown(signals, row)) for signals in SEEN for row in range(len(signals.tokens))]
        assert shown_rows == [0, 3][: len(batch)]


def test_text_of_packed_samples_is_their_own() -> None:
    model = tiny_vlm("llava")
    first, second = sample(model, "..I..", seed=1), sample(model, ".I....", seed=2)
    packed = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
        "position_ids": torch.cat([torch.arange(s["input_ids"].shape[1]) for s in (first, second)])[None],
        "use_cache": False,
    }
    with attached(model, look("entrance", "text", rows="question")):
        run(model, packed)
    (signals,) = SEEN
    embed = built("llava").get_input_embeddings()
    for row, inputs in enumerate((first, second)):
        expected = embed(inputs["input_ids"][0, words(model, inputs, text_behind(inputs))])
        assert torch.equal(shown(signals, row), expected)


# -- inside the decoder ----------------------------------------------------------------------------------------------


def take_input(states: list[Tensor], module: nn.Module, args: tuple[Tensor]) -> None:
    states.append(args[0])


@pytest.mark.parametrize("text", [t for t in OF_TEXT if not is_recurrent(built(OF_TEXT[t], t))])
def test_states_and_keys_behind_a_layer_are_the_dense_ones(text: str) -> None:
    """Nothing has left up to there, so the dense model's cache has the same keys, and its layers the same states."""
    family = OF_TEXT[text]
    dense, model = tiny_vlm(family, text), tiny_vlm(family, text)
    prompts = [sample(dense, "..I....", seed=1), sample(dense, "....I..", seed=2)]
    with attached(model, look("after_block", "keys", "text_keys", "text", "text_attention")):
        run(model, collate(prompts))
    found = {(row, i): s for i, s in enumerate(SEEN) for row in range(len(s.tokens))}
    assert len(found) == 2
    for inputs in prompts:
        states: list[Tensor] = []
        layer = dense.get_decoder().layers[LAYER + 1]  # behind what DeepStack adds
        handle = layer.register_forward_pre_hook(partial(take_input, states))
        cache = run(dense, inputs, **{CACHE_NAME: DynamicCache()})[CACHE_NAME]
        handle.remove()
        output, keys = states[0][0], cache.layers[LAYER].keys[0]
        behind, image = text_behind(inputs), is_image(inputs)[0]
        close = [
            (s, row)
            for (row, _), s in found.items()
            if s.tokens[row].shape == output[image].shape and torch.allclose(s.tokens[row], output[image], atol=1e-4)
        ]
        ((signals, row),) = close
        assert signals.text_mask is not None and signals.keys is not None and signals.text_keys is not None
        mask = signals.text_mask[row]
        assert torch.allclose(shown(signals, row), output[behind], atol=1e-4)
        assert torch.allclose(signals.keys[row], keys[:, image], atol=1e-4)
        assert torch.allclose(signals.text_keys[row][:, mask], keys[:, behind], atol=1e-4)
        assert signals.text_attention is not None and signals.text_attention.shape[2] == len(mask)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not is_recurrent(built(name))])
def test_text_is_rated_by_what_enters_the_decoder(family: str) -> None:
    model = tiny_vlm(family)
    prompts = [sample(model, "..I...", seed=1), sample(model, ".I..", seed=2)]
    embed = built(family).get_input_embeddings()
    with attached(model, look("after_block", "text_scores")):
        run(model, collate(prompts))
    rated = [(i[row], t[row][m[row]]) for i, t, m in RATED for row in range(len(i))]
    given = [s.text_scores[row][s.text_mask[row]] for s in SEEN for row in range(len(s.tokens))]
    for inputs in prompts:
        own = embed(inputs["input_ids"][0, text_behind(inputs)])
        ((images, _),) = [(i, t) for i, t in rated if t.shape == own.shape and torch.equal(t, own)]
        assert len(images) == int(is_image(inputs).sum())
        assert any(len(scores) == len(own) and torch.equal(scores, own[:, 0]) for scores in given)


@dataclass(frozen=True)
class Doubled(Look):
    """Twice the state of what stays: a merge that a loop can follow."""

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        keep = super().reduce(signals, n_keep).keep
        return Reduction(keep, tokens=2 * signals.tokens[:, :n_keep])


@pytest.mark.parametrize("where", ["entrance", "after_block"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if not is_recurrent(built(name))])
def test_new_states_of_what_stays(family: str, where: str) -> None:
    """The dense model, in which the states are doubled by hand and nobody looks at those that left."""
    model, dense = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, "..I..")
    stage = Doubled(LAYER if where == "after_block" else -1, where, positions="original")
    with attached(model, stage):
        logits = run(model, inputs).logits[0, -1]

    places = is_image(inputs)[0].nonzero().flatten()
    stay = places[: stage.num_kept(len(places))]
    gone = places[len(stay) :]
    length = inputs["input_ids"].shape[1]
    mask = torch.full((length, length), -torch.inf).triu(1)
    mask[:, gone] = -torch.inf
    mask.fill_diagonal_(0)

    def doubled(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> Any:
        states = args[0].clone()
        states[:, stay] *= 2
        return (states, *args[1:]), kwargs

    def hidden(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask[None, None]}

    layers = dense.get_decoder().layers[stage.layer + 1 :]
    layers[0].register_forward_pre_hook(doubled, with_kwargs=True)
    for layer in layers:
        layer.register_forward_pre_hook(hidden, with_kwargs=True)
    assert torch.allclose(logits, run(dense, inputs).logits[0, -1], atol=2e-3)


# -- the vision tower ------------------------------------------------------------------------------------------------

TOWERS = [name for name in FAMILIES if not get_adapter(name).tower_grid]


def near(rows: Tensor, wanted: Tensor) -> bool:
    """Whether one of ``rows`` (n, D) is ``wanted`` (D,), up to rounding."""
    return bool((rows.double() - wanted.double()).abs().amax(1).min() < 1e-4)


@pytest.mark.parametrize("family", TOWERS)
def test_tower_features_are_the_mean_of_a_tokens_patches(family: str) -> None:
    """Which patches those are, the gradient of the token's features says."""
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, "..I.i..")
    with attached(model, look("vision_tower", "tower_features")):
        run(model, inputs)
    shown = torch.cat([s.need("tower_features").flatten(0, 1) for s in SEEN])
    if family not in MERGING:
        assert torch.equal(shown, torch.cat([s.tokens[:, s.num_protected :].flatten(0, 1) for s in SEEN]))
        return
    watched = Watched(dense, inputs)
    assert len(shown) == len(watched.tokens)
    one_each = len(watched.states) == len(watched.tokens)  # GLM's tower averages before its merger
    for i, token in enumerate(watched.tokens):
        assert near(shown, watched.states[i] if one_each else watched.states[list(token.patches)].mean(0))


@pytest.mark.parametrize("family", MERGING)
def test_attention_of_an_earlier_block(family: str) -> None:
    """What a token's patches draw of all others in block 0, mean over queries; refused where it sees windows only."""
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, "..I.i..")
    stage = look("vision_tower", "earlier_attention", "received_attention")
    adapter = adapter_of(model)
    if any(adapter.shape(model).tower.windows[:1]):
        with pytest.raises(UnsupportedModelError, match="attends to whole images"):
            adapter.check(model, (stage,))
        return
    with attached(model, stage):
        run(model, inputs)
    shown = torch.cat(
        [s.need("earlier_attention")[:, :, s.num_protected :].transpose(1, 2).flatten(0, 1) for s in SEEN]
    )
    watched = Watched(dense, inputs)
    first = next(m for m in watched.tower.modules() if isinstance(m, nn.ModuleList))[0]
    seen = [w for module, weights, _ in WATCHED if module in set(first.modules()) for w in weights]
    starts = torch.tensor([0, *(w.shape[-1] for w in seen)]).cumsum(0).tolist()
    for token in watched.tokens:
        weights = seen[token.image]
        queries = weights.any(0).any(0)  # not of padding
        local = [patch - starts[token.image] for patch in token.patches]
        assert near(shown, weights[:, queries].mean(1)[:, local].sum(1))


@pytest.mark.parametrize("family", TOWERS)
def test_columns_of_the_grid(family: str) -> None:
    """Images of 4 × 6 and of 6 × 4 tokens have as many, and other neighbours."""
    model = tiny_vlm(family)
    with attached(model, look("vision_tower", "tower_features")):
        run(model, sample(model, "..I.i.."))
    for signals in SEEN:
        patches = signals.tokens.shape[1] - signals.num_protected
        assert signals.columns is not None and patches % signals.columns == 0


@pytest.mark.parametrize(("height", "width"), [(20, 28), (28, 20), (8, 32), (23, 31)])
def test_columns_of_an_image_that_is_not_square(height: int, width: int) -> None:
    """As a tower that interpolates its positions takes it."""
    model = tiny_vlm("llava")
    rows, columns = height // 4, width // 4
    ids = torch.tensor([[5, *(rows * columns * [IMAGE]), 6]])
    with attached(model, look("vision_tower", "received_attention")), interpolated_positions(model):
        run(model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, height, width)})
    assert [signals.columns for signals in SEEN] == [columns]


@pytest.mark.parametrize("block", [-1, 2, 7])
def test_an_earlier_block_is_one(block: int) -> None:
    model = tiny_vlm("llava")
    stage = look("vision_tower", "earlier_attention", block=block)
    with pytest.raises(UnsupportedModelError, match=rf"block {block} .*expected an earlier one"):
        adapter_of(model).check(model, (stage,))


def test_a_tower_that_nobody_reads_keeps_its_kernel() -> None:
    model = tiny_vlm("llava")
    configs = [module.config for module in model.model.vision_tower.modules() if hasattr(module, "is_causal")]
    with attached(model, look("vision_tower", "tower_features")):
        after = [module.config for module in model.model.vision_tower.modules() if hasattr(module, "is_causal")]
        assert configs and all(a is b for a, b in zip(configs, after, strict=True))


# -- turns and pieces ------------------------------------------------------------------------------------------------


def turns(model: PreTrainedModel, count: int) -> list[str]:
    """What ``count`` later turns of text warn of, each of them followed by a decode step."""
    cache = DynamicCache()
    said = []
    run(model, sample(model, "..I..."), **{CACHE_NAME: cache})
    for seed in range(count):
        for parts in ("...", "."):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                ids = sample(model, parts, seed=seed)["input_ids"]
                run(model, {"input_ids": ids}, **{CACHE_NAME: cache})
            said += [str(warning.message) for warning in caught if "first turn" in str(warning.message)]
    return said


def test_a_choice_for_the_first_question_is_told_of() -> None:
    model = tiny_vlm("llava")
    (said,) = turns(prune(model, FastVConfig(layer=1)), 1)
    assert said.startswith("FastV chose") and "divprune" in said
    assert turns(prune(tiny_vlm("llava"), DivPruneConfig(keep_ratio=0.5)), 2) == []


def test_it_is_told_once() -> None:
    """As Python's own filter has it: of one place in the code, once."""
    model = prune(tiny_vlm("llava"), FastVConfig(layer=1))
    cache = DynamicCache()
    run(model, sample(model, "..I..."), **{CACHE_NAME: cache})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for seed in range(3):
            run(model, {"input_ids": sample(model, "...", seed=seed)["input_ids"]}, **{CACHE_NAME: cache})
    assert sum("first turn" in str(warning.message) for warning in caught) == 1


def test_candidates_of_assisted_decoding_are_no_turn() -> None:
    model = prune(tiny_vlm("llava"), FastVConfig(layer=1))
    inputs = sample(model, "..I...")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
    assert not [w for w in caught if "first turn" in str(w.message)]


def test_a_piece_of_a_prompt_has_no_question_yet() -> None:
    model = tiny_vlm("llava")
    prompt = sample(model, "..I.....")
    with (
        attached(model, look("entrance", "text", rows="question", budget="image")),
        pytest.raises(UnsupportedModelError, match="prefill_chunk_size"),
    ):
        model.generate(**prompt, prefill_chunk_size=12, max_new_tokens=2, do_sample=False)
