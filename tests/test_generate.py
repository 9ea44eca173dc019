"""Pruned models in generate() and in hand-written loops with a cache: every result is compared with the slow reference,
or with a run that must give the same; and the cache is shown to be shorter."""

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_tokenprune import prune, record, unprune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME
from hf_tokenprune.errors import PruneStateError
from hf_tokenprune.signals import Stage

from .decoder_families import (
    CASES,
    FAMILIES,
    ONCE,
    ONCE_WITH_KEYS,
    SUPPORTED,
    VOCABULARY,
    Case,
    Inputs,
    attached,
    built,
    collate,
    is_image,
    lengths,
    new_cache,
    run,
    sample,
    stages_of,
    texts_of,
    tiny_vlm,
    with_keys,
)
from .decoder_prompts import BY_TOKEN
from .reference_decoder import Reference, axes, reference
from .test_contract_decoders import (
    ONE_IMAGE,
    close,
    each_once,
    every_family,
    every_method,
    every_method_and_text,
    everywhere,
    id_of,
    prompts,
)

each_once_with_keys = pytest.mark.parametrize("pair", ONCE_WITH_KEYS, ids=id_of)

STEPS = 5
BEAM_STEPS = 8  # enough for beams to change places


def greedy(model: PreTrainedModel, inputs: Inputs, steps: int = STEPS, **kwargs: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


@dataclasses.dataclass
class Pruned:
    """A pruned model beside its dense twin."""

    model: PreTrainedModel
    dense: PreTrainedModel
    stages: tuple[Stage, ...]

    def told(self, inputs: Inputs) -> Reference:
        """The reference for a prompt of its own."""
        with record(self.model) as rec:
            run(self.model, inputs)
        return reference(self.dense, inputs, self.stages if rec.kept else (), rec, pruned=self.model)


def guided(stages: tuple[Stage, ...]) -> bool:
    """Whether text has a say in what is kept."""
    return any(stage.reads_question or "layer_scores" in stage.needs for stage in stages)


def pruned_pair(family: str, case: Case, text: str | None = None, **fields: Any) -> Pruned:
    model, dense = tiny_vlm(family, text), tiny_vlm(family, text)
    config = case.config(dense, **fields)
    return Pruned(prune(model, config), dense, stages_of(dense, config))


# -- greedy ----------------------------------------------------------------------------------------------------------


@every_method_and_text
def test_greedy_is_the_reference(pair, text) -> None:
    """Tokens, logits of every step, and the length of every layer's cache."""
    two = pruned_pair(*pair, text)
    inputs = sample(two.dense, ONE_IMAGE, seed=11)
    output = greedy(two.model, inputs)
    told = two.told(inputs)
    tokens, logits = told.generate(STEPS)
    assert output.sequences[0, -STEPS:].tolist() == tokens
    close(torch.cat(output.logits), logits)
    entering = told.forward().entering
    assert entering[-1] < inputs["input_ids"].shape[1], "something left"
    assert lengths(output[CACHE_NAME]) == with_keys(two.model, [n + STEPS - 1 for n in entering])


@every_method
def test_a_padded_batch_is_its_samples_alone(pair) -> None:
    """Prompts of different lengths with none, one and several images of several sizes: tokens and logits of a step."""
    two = pruned_pair(*pair, texts_of(pair[0])[-1])
    alone = prompts(two.dense)
    batch = collate(alone)
    output = greedy(two.model, batch)
    for row, inputs in enumerate(alone):
        expected = greedy(two.model, inputs)
        assert output.sequences[row, -STEPS:].tolist() == expected.sequences[0, -STEPS:].tolist()
        close(torch.stack(output.logits)[:, row], torch.cat(expected.logits))
    tokens, logits = two.told(alone[2]).generate(STEPS)
    assert output.sequences[2, -STEPS:].tolist() == tokens
    close(torch.stack(output.logits)[:, 2], logits)


@each_once
def test_without_a_cache(pair) -> None:
    """Every step prunes the prompt again: the same sets where no text guides the choice, and pruning in any case."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE)
    with record(two.model) as rec:
        output = greedy(two.model, inputs, use_cache=False)
    assert rec.tokens[len(rec.tokens) - 1] < inputs["input_ids"].shape[1] + STEPS - 1
    if not guided(two.stages):
        expected = greedy(two.model, inputs)
        assert torch.equal(output.sequences, expected.sequences)
        close(torch.cat(output.logits), torch.cat(expected.logits))


# -- other ways to generate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sampling", "beams", "several sequences"])
@every_family
def test_keep_all_generates_the_dense_tokens(family, how) -> None:
    ways = {
        "sampling": {"do_sample": True, "temperature": 0.7},
        "beams": {"num_beams": 3, "do_sample": False},
        "several sequences": {"do_sample": True, "num_return_sequences": 3},
    }
    model = tiny_vlm(family)
    batch = collate([sample(model, ONE_IMAGE, 1), sample(model, "..I...", 2)])
    torch.manual_seed(5)
    expected = model.generate(**batch, max_new_tokens=STEPS, **ways[how])
    with attached(model, *everywhere(model)):
        torch.manual_seed(5)
        assert torch.equal(model.generate(**batch, max_new_tokens=STEPS, **ways[how]), expected)


@functools.cache
def repeats_prompts(family: str) -> bool:
    """Whether the dense model makes sequences of one prompt: InternVL of Transformers 5.17 mixes up their tiles."""
    dense, inputs = tiny_vlm(family), sample(built(family), ONE_IMAGE)
    output = dense.generate(
        **inputs, num_beams=2, do_sample=False, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
    )
    alone = run(dense, inputs).logits[:, -1]
    return torch.allclose(output.logits[0], alone.expand_as(output.logits[0]), atol=1e-3)


each_repeated = pytest.mark.parametrize("pair", [pair for pair in ONCE if repeats_prompts(pair[0])], ids=id_of)


@each_repeated
def test_sampling_follows_the_seed(pair) -> None:
    """Several sequences a prompt: each continues a prompt of its own, by logits that the reference confirms."""
    two = pruned_pair(*pair)
    alone = [sample(two.dense, ONE_IMAGE, seed) for seed in (1, 2)]
    torch.manual_seed(3)
    output = two.model.generate(
        **collate(alone),
        max_new_tokens=STEPS,
        do_sample=True,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, sequence in enumerate(output.sequences[:, -STEPS:].tolist()):
        told = two.told(alone[row // 2])
        for step in range(STEPS):
            close(output.logits[step][row], told.then(sequence[:step]).forward().logits[-1])
    assert len({tuple(row) for row in output.sequences[:, -STEPS:].tolist()}) > 1


@each_repeated
def test_beam_search_is_the_reference(pair) -> None:
    """The score that beam search gives its sequence is the sum that the reference gives it; beams change places."""
    two = pruned_pair(*pair)
    alone = [sample(two.dense, ONE_IMAGE, seed) for seed in (1, 4, 5)]
    output = two.model.generate(
        **collate(alone),
        max_new_tokens=BEAM_STEPS,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, inputs in enumerate(alone):
        told, tokens, total = two.told(inputs), output.sequences[row, -BEAM_STEPS:].tolist(), 0.0
        for step, token in enumerate(tokens):
            logits = told.then(tokens[:step]).forward().logits[-1]
            total += float(logits.log_softmax(-1)[token])
        close(output.sequences_scores[row], torch.tensor(total))
    assert (output.beam_indices != output.beam_indices[:, :1]).any(), "a beam took the place of another"


@each_once
def test_streaming(pair) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE)
    streamer = Collect()
    output = greedy(two.model, inputs, streamer=streamer)
    assert streamer.tokens[-STEPS - 1 :] == [*output.sequences[0, -STEPS:].tolist(), -1]


# -- caches held by the user -----------------------------------------------------------------------------------------


def continued(told: Reference, words: Inputs) -> Inputs:
    """The whole conversation as ids, with the images of the new turn only: what generate takes with a cache.

    Positions of several axes too: stock models would make them from the grids of all images, and features of the new.
    """
    whole = dataclasses.replace(told, leaving=()).then_prompt(reference(told.dense, words))
    inputs = {**words, **{name: whole.inputs[name] for name in BY_TOKEN if name in whole.inputs}}
    return inputs if len(whole.positions) == 1 else {**inputs, "position_ids": axes(whole.positions)}


def step(count: int, *told: Reference) -> Inputs:
    """The last tokens of conversations, to be fed behind a cache.

    Positions of several axes are the caller's: a stock model would place them behind the prompt that it saw last.
    """
    ids = torch.cat([one.inputs["input_ids"][:, -count:] for one in told])
    if len(told[0].positions) == 1:
        return {"input_ids": ids}
    return {"input_ids": ids, "position_ids": torch.cat([axes(one.positions)[..., -count:] for one in told], 1)}


@pytest.mark.parametrize("second", ["...", "..I..."])
@every_method
def test_several_turns_with_one_cache(pair, second) -> None:
    """A second turn of text, or with an image of its own: what the reference makes of the whole conversation."""
    check_turns(pair, second)


@each_once
def test_a_second_turn_that_is_an_image_alone(pair) -> None:
    check_turns(pair, "I")


def check_turns(pair: tuple[str, Case], second: str) -> None:
    """Three turns, the second with the prompt ``second``."""
    two = pruned_pair(*pair, texts_of(pair[0])[-1])
    first, words = sample(two.dense, ONE_IMAGE, 1), sample(two.dense, second, 2)
    cache = new_cache(two.dense)
    output = greedy(two.model, first, **{CACHE_NAME: cache})
    tokens = output.sequences[0, -STEPS:].tolist()
    assert output[CACHE_NAME] is cache

    told = two.told(first).then(tokens)
    whole = continued(told, words)
    with record(two.model) as rec:
        output = greedy(two.model, whole, **{CACHE_NAME: cache})
    if "I" in second:
        told = told.then_prompt(reference(two.dense, words, two.stages, rec, pruned=two.model))
    else:
        assert not rec.kept
        told = told.then(words["input_ids"][0].tolist())
    expected, logits = told.generate(STEPS)
    assert output.sequences[0, -STEPS:].tolist() == expected
    close(torch.cat(output.logits), logits)
    assert lengths(cache) == with_keys(two.model, [n + STEPS - 1 for n in told.forward().entering])

    told, words = told.then(expected), sample(two.dense, "..", 3)
    output = greedy(two.model, continued(told, words), **{CACHE_NAME: cache})
    expected, logits = told.then(words["input_ids"][0].tolist()).generate(STEPS)
    assert output.sequences[0, -STEPS:].tolist() == expected
    close(torch.cat(output.logits), logits)


def reads_all_text(family: str, case: Case) -> bool:
    """Whether text in front of the image has a say, of which the cache has keys alone."""
    stages = stages_of(built(family), case.config(built(family)))
    return any(stage.text_rows is not None and stage.text_rows.rows == "all" for stage in stages)


@pytest.mark.parametrize("pair", [pair for pair in ONCE if not reads_all_text(*pair)], ids=id_of)
def test_a_cached_text_in_front(pair) -> None:
    """A system prompt whose keys are kept and used for a prompt with an image."""
    two = pruned_pair(*pair)
    system, inputs = sample(two.dense, ".....", 1), sample(two.dense, ONE_IMAGE, 2)
    cache = run(two.model, system, use_cache=True)[CACHE_NAME]
    whole = continued(reference(two.dense, system), inputs)
    with record(two.model) as rec:
        output = greedy(two.model, whole, **{CACHE_NAME: cache})
    start = dataclasses.replace(reference(two.dense, system), leaving=())
    told = reference(two.dense, inputs, two.stages, rec, pruned=two.model)
    start = dataclasses.replace(start, leaving=tuple(dataclasses.replace(x, kept=frozenset()) for x in told.leaving))
    tokens, logits = start.then_prompt(told).generate(STEPS)
    assert output.sequences[0, -STEPS:].tolist() == tokens
    close(torch.cat(output.logits), logits)
    close(torch.cat(output.logits), torch.cat(greedy(two.model, whole).logits))


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("chunk", [1, 3])
@each_once
def test_a_loop_written_by_hand(pair, chunk, mask) -> None:
    """Forwards with nothing but ids and the cache, one token or several at a time; positions are worked out inside, but
    for several axes and a mask, with which stock code breaks."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    more = torch.randint(1, VOCABULARY - 2, (1, 6), generator=torch.Generator().manual_seed(7))
    ones = torch.ones(1, inputs["input_ids"].shape[1] + 6, dtype=torch.long)
    if not mask:
        inputs.pop("attention_mask")
    cache = run(two.model, inputs, use_cache=True)[CACHE_NAME]
    told, seen, logits = two.told(inputs), inputs["input_ids"].shape[1], []
    for piece in more.split(chunk, dim=1):
        seen, told = seen + piece.shape[1], told.then(piece[0].tolist())
        fed = {**step(piece.shape[1], told), "attention_mask": ones[:, :seen]} if mask else {"input_ids": piece}
        logits.append(run(two.model, fed, **{CACHE_NAME: cache}, use_cache=True).logits[0])
        assert cache.get_seq_length() == seen
    close(torch.cat(logits), told.forward().logits[-6:])


@each_once
def test_a_padded_loop_written_by_hand(pair) -> None:
    """Several tokens at a time behind a ragged, left-padded batch."""
    two = pruned_pair(*pair)
    alone = prompts(two.dense)
    batch = collate(alone)
    more = torch.randint(1, VOCABULARY - 2, (len(alone), 4), generator=torch.Generator().manual_seed(7))
    cache = run(two.model, batch, use_cache=True)[CACHE_NAME]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1)
    told = [two.told(inputs).then(words) for inputs, words in zip(alone, more.tolist(), strict=True)]
    logits = run(two.model, {**step(4, *told), "attention_mask": mask}, **{CACHE_NAME: cache}).logits
    for row, one in enumerate(told):
        close(logits[row], one.forward().logits[-4:])


@pytest.mark.parametrize("method", ["divprune", "transprune", "stack"])
def test_a_loop_behind_padding_on_the_right(method) -> None:
    """Positions of later tokens are the caller's, who alone knows that padding does not count: as in a dense model."""
    two = pruned_pair("llava_next", Case(method), "qwen2")
    alone = prompts(two.dense)
    batch = collate(alone, "right")
    more = torch.randint(1, VOCABULARY - 2, (len(alone), 4), generator=torch.Generator().manual_seed(7))
    mask, seen = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1), batch["input_ids"].shape[1]
    cache = run(two.model, batch, use_cache=True)[CACHE_NAME]
    logits = []
    for start, end in ((0, 1), (1, 4)):
        positions = batch["attention_mask"].sum(1, keepdim=True) + torch.arange(start, end)
        piece = {"input_ids": more[:, start:end], "attention_mask": mask[:, : seen + end], "position_ids": positions}
        logits.append(run(two.model, piece, **{CACHE_NAME: cache}).logits)
    for row, inputs in enumerate(alone):
        expected = two.told(inputs).then(more[row].tolist()).forward().logits[-4:]
        close(torch.cat(logits, 1)[row], expected)


@each_once_with_keys
def test_cropping_and_going_on(pair) -> None:
    """What was generated can be taken back; a cut inside the pruned prompt is refused."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    cache = new_cache(two.dense)
    output = greedy(two.model, inputs, **{CACHE_NAME: cache})
    kept = output.sequences[0, -STEPS:].tolist()[:2]
    cache.crop(-2)  # of four: the last token was never fed
    other = sample(two.dense, "...", 5)
    told = two.told(inputs)
    again = greedy(two.model, continued(told.then(kept), other), **{CACHE_NAME: cache})
    tokens, logits = told.then(kept + other["input_ids"][0].tolist()).generate(STEPS)
    assert again.sequences[0, -STEPS:].tolist() == tokens
    close(torch.cat(again.logits), logits)

    cache = run(two.model, inputs, use_cache=True)[CACHE_NAME]
    cache.crop(int(is_image(inputs)[0].nonzero().max()) - inputs["input_ids"].shape[1])
    with pytest.raises(PruneStateError, match=r"cropped inside a prompt .* start with a new DynamicCache"):
        run(two.model, {"input_ids": inputs["input_ids"][:, -1:]}, **{CACHE_NAME: cache})
    assert greedy(two.model, inputs).sequences.equal(output.sequences)


@each_once_with_keys
def test_cropping_to_a_length_is_right_or_refused(pair) -> None:
    """Old Transformers crop every layer to one length, which layers of different lengths cannot follow."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    length = inputs["input_ids"].shape[1]
    cache = new_cache(two.dense)
    tokens = greedy(two.model, inputs, **{CACHE_NAME: cache}).sequences[0, -STEPS:].tolist()
    told = two.told(inputs).then([*tokens[:2], 9])
    try:
        cache.crop(length + 2)
        logits = run(two.model, step(1, told), **{CACHE_NAME: cache}).logits[0]
    except ValueError:
        return
    close(logits, told.forward().logits[-1:])


@each_once
def test_a_copied_cache_goes_its_own_way(pair) -> None:
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    cache = run(two.model, inputs, use_cache=True)[CACHE_NAME]
    clone = copy.deepcopy(cache)
    told = two.told(inputs)
    for held, words in ((cache, [5, 6]), (clone, [7]), (cache, [8]), (clone, [9, 10])):
        held.words = [*getattr(held, "words", []), *words]
        now = told.then(held.words)
        logits = run(two.model, step(len(words), now), **{CACHE_NAME: held}).logits[0]
        close(logits, now.forward().logits[-len(words) :])


@each_once
def test_caches_of_two_conversations_do_not_mix(pair) -> None:
    """One model, prompts of different lengths, steps in turn."""
    two = pruned_pair(*pair)
    talks = [sample(two.dense, ONE_IMAGE, 1), sample(two.dense, "..I.i..", 2), sample(two.dense, "...", 3)]
    told = [two.told(inputs) for inputs in talks]
    caches = [run(two.model, inputs, use_cache=True)[CACHE_NAME] for inputs in talks]
    for word in (5, 6):
        for i, cache in enumerate(caches):
            told[i] = told[i].then([word])
            logits = run(two.model, step(1, told[i]), **{CACHE_NAME: cache}).logits[0]
            close(logits, told[i].forward().logits[-1:])


@pytest.mark.parametrize("how", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
@each_once_with_keys
def test_rows_of_a_cache_move(pair, how) -> None:
    """Samples of a ragged batch change places, are repeated, or are taken out."""
    two = pruned_pair(*pair)
    alone = prompts(two.dense)
    batch = collate(alone)
    cache = run(two.model, batch, use_cache=True)[CACHE_NAME]
    if how == "batch_repeat_interleave":
        rows = [row for row in range(len(alone)) for _ in range(2)]
        cache.batch_repeat_interleave(2)
    else:
        rows = [2, 0, 2, *range(1, len(alone) - 2)] if how == "reorder_cache" else [3, 1]
        getattr(cache, how)(torch.tensor(rows))
    more = torch.randint(1, VOCABULARY - 2, (len(rows), 2), generator=torch.Generator().manual_seed(7))
    mask = torch.cat([batch["attention_mask"][rows], torch.ones_like(more)], 1)
    told = [two.told(alone[row]).then(words) for row, words in zip(rows, more.tolist(), strict=True)]
    logits = run(two.model, {**step(2, *told), "attention_mask": mask}, **{CACHE_NAME: cache}).logits
    for i, one in enumerate(told):
        close(logits[i], one.forward().logits[-2:])


@each_once
def test_a_cache_can_be_reset(pair) -> None:
    two = pruned_pair(*pair)
    first, second = sample(two.dense, ONE_IMAGE, 1), sample(two.dense, "..I.", 2)
    stock = run(two.dense, first, use_cache=True)[CACHE_NAME]
    stock.reset()
    if stock.get_seq_length():
        pytest.skip("this version of Transformers fills a reset cache with zeros, and keeps its length")
    cache = run(two.model, first, use_cache=True)[CACHE_NAME]
    cache.reset()
    assert cache.get_seq_length() == 0
    output = greedy(two.model, second, **{CACHE_NAME: cache})
    assert output.sequences.equal(greedy(two.model, second).sequences)
    unprune(two.model)
    cache.reset()
    output = greedy(two.model, second, **{CACHE_NAME: cache})
    assert output.sequences.equal(greedy(two.dense, second).sequences)


@each_once_with_keys
def test_a_cache_belongs_to_a_config(pair) -> None:
    """One that was filled before the config changed is refused, not misread."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    cache = run(two.model, inputs, use_cache=True)[CACHE_NAME]
    unprune(two.model)
    other = Case("fastv") if pair[1].method != "fastv" else Case("pyramiddrop")
    prune(two.model, other.config(two.model, **({"layer": 5} if other.method == "fastv" else {})))
    with pytest.raises(PruneStateError, match="filled by a model pruned in other layers; start with a new"):
        run(two.model, {"input_ids": torch.tensor([[5]])}, **{CACHE_NAME: cache})
    assert greedy(two.model, inputs).sequences.shape[1] == inputs["input_ids"].shape[1] + STEPS


@each_once
def test_a_dense_cache_stays_dense(pair) -> None:
    """A cache filled by the dense model holds every token; a pruned model can go on with it."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    cache = run(two.dense, inputs, use_cache=True)[CACHE_NAME]
    told = reference(two.dense, inputs).then([5, 6])
    logits = run(two.model, step(2, told), **{CACHE_NAME: cache}).logits[0]
    close(logits, told.forward().logits[-2:])


@each_once
def test_a_pruned_cache_is_refused_by_the_dense_model(pair) -> None:
    """It would make its mask and positions from tokens that its layers do not hold."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    cache = run(two.model, inputs, use_cache=True)[CACHE_NAME]
    held = lengths(cache)
    with pytest.raises(PruneStateError, match=r"filled by a pruned model.*prune it again.*new DynamicCache"):
        run(two.dense, {"input_ids": torch.tensor([[5]])}, **{CACHE_NAME: cache})
    assert lengths(cache) == held


@each_once
def test_the_former_name_of_the_cache(pair) -> None:
    """Transformers takes the argument under both names for a while, of the base model too."""
    two = pruned_pair(*pair)
    inputs = sample(two.dense, ONE_IMAGE, 1)
    word = {"input_ids": torch.tensor([[5]])}
    states = []
    for name in (CACHE_NAME, "past_key_values"):
        cache = run(two.model.base_model, inputs, use_cache=True)[CACHE_NAME]
        states.append(run(two.model.base_model, word, **{name: cache}).last_hidden_state)
    assert torch.equal(*states)


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "order"), [("language model", "prune, then compile"), ("model", "compile and run, then prune")]
)
def test_compiled_models_prune_as_plain_ones(part, order) -> None:
    """Graphs break, and those made while the model was dense are not used again: nothing is silently dense or wrong."""
    torch.compiler.reset()
    case = Case("stack")
    two = pruned_pair("llava", case)
    batch = collate(prompts(two.dense))
    plain = run(two.model, batch, use_cache=True)
    plain_tokens = two.model.generate(**batch, max_new_tokens=3, do_sample=False)

    model, graphs = two.dense, []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    dense_logits = run(model, batch).logits
    if order.startswith("prune"):
        prune(model, case.config(model))
    (model if part == "model" else model.model.language_model).compile(backend=backend)
    if order.startswith("compile"):
        close(run(model, batch).logits, dense_logits)
        prune(model, case.config(model))
    graphs.clear()
    compiled = run(model, batch, use_cache=True)
    assert graphs, "it was compiled, anew where it had been dense"
    valid = batch["attention_mask"].bool()
    close(compiled.logits[valid], plain.logits[valid])
    assert lengths(compiled[CACHE_NAME]) == lengths(plain[CACHE_NAME])
    assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), plain_tokens)
    unprune(model)
    close(run(model, batch).logits[valid], dense_logits[valid])


# -- a real accelerator ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pair", [(FAMILIES[0], case) for case in CASES if (FAMILIES[0], case) in SUPPORTED], ids=id_of)
def test_gpu_beams_turns_and_lookup(pair) -> None:
    """float32 on CUDA: the tokens of the CPU."""
    two = pruned_pair(*pair, texts_of(pair[0])[-1])
    batch = collate(prompts(two.dense))
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    expected = [two.model.generate(**batch, max_new_tokens=STEPS, do_sample=False, **way) for way in ways]
    two.model.to("cuda")
    moved = {name: tensor.to("cuda") for name, tensor in batch.items()}
    for way, tokens in zip(ways, expected, strict=True):
        assert torch.equal(two.model.generate(**moved, max_new_tokens=STEPS, do_sample=False, **way).cpu(), tokens)
    assert is_image(batch).any()
