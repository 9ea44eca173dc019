"""DART, SparseVLM, HiPrune and VisPruner against golden vectors, loops from the equations, and what each promises.

What every method owes is in ``test_contract_methods.py``.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_tokenprune import (
    ConfigError,
    DARTConfig,
    HiPruneConfig,
    PruneConfig,
    SparseVLMConfig,
    TokenPruneError,
    UnsupportedModelError,
    VisPrunerConfig,
    prune,
    record,
    unprune,
)
from hf_tokenprune.methods.dart import dart
from hf_tokenprune.methods.hiprune import hiprune
from hf_tokenprune.methods.sparsevlm import cluster_and_merge, rated, raters, recycled, text_relevance
from hf_tokenprune.methods.vispruner import vispruner
from hf_tokenprune.signals import Signals, Stage
from hf_tokenprune.tokens import top_tokens

from .decoder_families import SUPPORTED, Case, collate, run, sample, tiny_vlm
from .decoder_visuals import FAMILIES
from .golden_vlm import CASES, VALUES, case_names, inputs, needs_golden
from .reference_attention_2026 import (
    naive_clusters,
    naive_dart,
    naive_hiprune,
    naive_rated,
    naive_raters,
    naive_relevance,
    naive_vispruner,
)
from .reference_llava_methods import best
from .test_contract_methods import DECODER_SHAPE, make_decoder_signals, select

TOWER = DECODER_SHAPE.tower


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def only_stage(config: PruneConfig, shape=DECODER_SHAPE) -> Stage:
    (stage,) = config.stages_for(shape)
    return stage


def message_of(function) -> str:
    with pytest.raises(ConfigError) as error:
        function()
    return str(error.value)


# -- golden vectors --------------------------------------------------------------------------------------------------


def tensors(method: str, case: str) -> dict[str, Tensor]:
    """A case's inputs, in bfloat16 where they are exact in it."""
    dtype = torch.bfloat16 if CASES[method][case].get("mod") == "bf16" else torch.float32
    found = {name: torch.from_numpy(value) for name, value in inputs(method, case).items()}
    return {name: x.to(dtype) if x.is_floating_point() and name != "attention" else x for name, x in found.items()}


def parts_of(method: str, case: str, num_tokens: int) -> list[tuple[slice, int]]:
    """Images of a case, one after the other, and how many tokens of each stay."""
    spec = CASES[method][case]
    sizes, counts = spec.get("sizes", [num_tokens]), spec.get("budgets", [spec["k"]])
    ends = np.cumsum(sizes).tolist()
    return [(slice(end - size, end), k) for end, size, k in zip(ends, sizes, counts, strict=True)]


def check(method: str, case: str, keep: list[int], what: str, num_tokens: int, slack: int = 0) -> None:
    """The golden set as far as it is firm; else its size, range and distinctness. Copies of a token are alike."""
    name = f"{method}_{case}_{what}"
    expected = VALUES[name].tolist()
    assert len(keep) == len(set(keep)) == len(expected) and set(keep) <= set(range(num_tokens))
    spec = CASES[method][case]
    copied = num_tokens // 8 * 4 if spec.get("mod") == "dup" else 0  # so many first tokens are groups of four

    def groups(positions: list[int]) -> list[int]:
        return sorted(i // 4 * 4 if i < copied else i for i in positions)

    if VALUES[f"{name}_firm"]:
        assert groups(keep) == groups(expected)
    elif slack:
        assert len(set(keep) - set(expected)) <= slack


@needs_golden
@pytest.mark.parametrize("case", case_names("dart"))
def test_dart_is_golden(case: str) -> None:
    """``exact``, through the stage. The other sets are of other rules: of the paper, and of programs that keep more."""
    spec, given = CASES["dart"][case], tensors("dart", case)
    hidden, keys, image, text = (given[name] for name in ("hidden", "keys", "image", "text"))
    keep = []
    for part, k in parts_of("dart", case, len(image)):
        tokens = hidden[image[part]][None]
        signals = Signals(tokens, tokens, 0, False, text=hidden[text][None], text_mask=torch.ones(1, len(text)).bool())
        if not spec.get("entrance"):
            signals = replace(signals, keys=keys[:, image[part]][None], text_keys=keys[:, text][None])
        stage = only_stage(DARTConfig(layer=None if spec.get("entrance") else 1))
        keep += (stage.reduce(signals, k).keep[0] + part.start).tolist()
    check("dart", case, keep, "exact", len(image))


@needs_golden
@pytest.mark.parametrize("case", [case for case in case_names("dart") if f"dart_{case}_pivots_order" in VALUES])
def test_dart_begins_with_the_golden_pivots(case: str) -> None:
    given = tensors("dart", case)
    image, first = given["image"], int(given["image"][0])
    order = [i - first for i in VALUES[f"dart_{case}_pivots_order"].tolist() if i - first < len(image)]
    tokens, norms = given["hidden"].float(), given["keys"].float().abs().sum((0, 2))
    k = min(4, len(image))
    keep = dart(tokens[image][None], norms[image][None], tokens[None, :0], norms[None, :0], k)
    assert VALUES[f"dart_{case}_pivots_firm"] and keep[0].tolist() == order


@needs_golden
@pytest.mark.parametrize("case", case_names("hiprune"))
def test_hiprune_is_golden(case: str) -> None:
    """The program's too, but for sinks, of which it chooses some twice and keeps fewer."""
    spec, given = CASES["hiprune"][case], tensors("hiprune", case)
    objects, deep, n = given["shallow"][None], given["deep"][None], spec["n"]
    (keep,) = hiprune(objects, deep, spec["k"], spec["alpha"], spec["width"]).tolist()
    check("hiprune", case, keep, "keep", n)
    for name in (f"hiprune_{case}_keep_official", f"hiprune_{case}_keep_qwen_official"):
        if name in VALUES and case != "sink":
            assert keep == sorted(VALUES[name].tolist())
    anchors = VALUES[f"hiprune_{case}_anchors_order"].tolist()
    if anchors:  # with five times the share all that stays is anchors
        assert hiprune(objects, deep, len(anchors), 5.0, spec["width"])[0].tolist() == sorted(anchors)


@needs_golden
@pytest.mark.parametrize("case", [case for case in case_names("hiprune") if not CASES["hiprune"][case].get("merged")])
def test_hiprune_reads_whole_maps_as_its_signals_say(case: str) -> None:
    """Mean over heads and over all queries, CLS among them, of the columns of patches."""
    spec, given = CASES["hiprune"][case], tensors("hiprune", case)
    received = {name: given[f"{name}_map"].mean(1)[None] for name in ("shallow", "deep")}  # (1, H, 1 + N)
    tokens = torch.zeros(1, 1 + spec["n"], 1)
    signals = Signals(tokens, tokens, 1, True, columns=spec["width"])
    signals = replace(signals, earlier_attention=received["shallow"], received_attention=received["deep"])
    stage = only_stage(HiPruneConfig(keep_ratio=spec["k"] / spec["n"], alpha=spec["alpha"]))
    check("hiprune", case, stage.reduce(signals, stage.num_kept(spec["n"])).keep[0].tolist(), "keep", spec["n"])


@needs_golden
@pytest.mark.parametrize("case", case_names("vispruner"))
def test_vispruner_is_golden(case: str) -> None:
    """Where it is not firm, re-ordering makes every rounding move all later pairs; with 576 tokens two may differ."""
    spec, given = CASES["vispruner"][case], tensors("vispruner", case)
    keep = []
    for part, k in parts_of("vispruner", case, spec["n"]):
        chosen = vispruner(given["x"][None, part], given["attention"][None, part], k, spec.get("ratio", 0.5))
        keep += (chosen[0] + part.start).tolist()
    check("vispruner", case, keep, "keep", spec["n"], slack=2 if case == "large" else 0)


@needs_golden
@pytest.mark.parametrize("case", case_names("sparsevlm"))
def test_sparsevlm_is_golden(case: str) -> None:
    """Relevance, raters, scores and what stays, also by 14 heads; the program's are the same."""
    spec, given = CASES["sparsevlm"][case], tensors("sparsevlm", case)
    first, n, k = spec["before"], spec["n"], spec["k"]
    mask = torch.ones(1, spec["t"], dtype=torch.bool)

    def value(what: str) -> Any:
        return VALUES[f"sparsevlm_{case}_{what}"]

    relevance = text_relevance(given["visual"][None], given["text"][None], mask)
    np.testing.assert_allclose(relevance[0], value("relevance"), rtol=1e-5)
    rows = raters(relevance, mask)
    assert rows[0].nonzero().flatten().tolist() == value("raters").tolist() == value("raters_official").tolist()
    attention = given["attention"][None, :, first + n :, first : first + n]
    scores = rated(attention, rows, spec["heads"])
    np.testing.assert_allclose(scores[0], value("score"), rtol=1e-5)
    np.testing.assert_allclose(scores[0], value("score_official"), rtol=1e-5)
    keep = top_tokens(scores, k)[0].tolist()
    check("sparsevlm", case, keep, "keep", n)
    assert keep == sorted(value("keep_official").tolist())
    assert top_tokens(rated(attention, rows, 14), k)[0].tolist() == sorted(value("keep_heads14_official").tolist())
    _, merged = cluster_and_merge(given["visual"][None, :40], 5)
    np.testing.assert_allclose(merged[0], value("merged_official"), atol=1e-5)


# -- DART ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_keep", [1, 2, 5, 13, 30])
@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (3, 9), (40, 2)], ids=str)
def test_dart_follows_its_rule(pivots: tuple[int, int], n_keep: int) -> None:
    """In one batch with texts of 6, 3 and no rows: a naive loop over each sample alone gives the same."""
    tokens, norms = rand(3, 30, 8), rand(3, 30, seed=1).exp()
    text, text_norms = rand(3, 6, 8, seed=2), rand(3, 6, seed=3).exp()
    lengths = [6, 3, 0]
    masked = text_norms.clone()
    for row, length in enumerate(lengths):
        masked[row, : 6 - length] = -torch.inf
    keep = dart(tokens, norms, text, masked, n_keep, *pivots)
    for i, length in enumerate(lengths):
        own, own_norms = text[i, 6 - length :], text_norms[i, 6 - length :].tolist()
        assert keep[i].tolist() == naive_dart(tokens[i], norms[i].tolist(), own, own_norms, n_keep, pivots)


@pytest.mark.parametrize("layer", [None, 1])
def test_dart_without_pivots_of_the_text_needs_no_text(layer: int | None) -> None:
    stage = only_stage(DARTConfig(layer=layer, text_pivots=0))
    assert not stage.reads_question
    signals = make_decoder_signals(stage, 3, 40)
    assert signals.text is None
    with_text = only_stage(DARTConfig(layer=layer))
    assert with_text.reads_question
    emptied = make_decoder_signals(with_text, 3, 40)
    emptied = replace(emptied, text_mask=torch.zeros_like(emptied.text_mask))
    signals = replace(emptied, text=None, text_mask=None, text_keys=None)
    assert torch.equal(stage.reduce(signals, 11).keep, with_text.reduce(emptied, 11).keep), "as samples without text"


@pytest.mark.parametrize("layer", [None, 1])
def test_filling_in_front_of_the_text_changes_nothing(layer: int | None) -> None:
    stage = only_stage(DARTConfig(layer=layer))
    signals = make_decoder_signals(stage, 4, 40)
    keep = stage.reduce(signals, 17).keep
    for i in range(4):
        alone = select(signals, rows=slice(i, i + 1))
        rows = alone.text_mask[0]
        alone = replace(alone, text=alone.text[:, rows], text_mask=alone.text_mask[:, rows])
        if layer is not None:
            alone = replace(alone, text_keys=alone.text_keys[:, :, rows])
        assert torch.equal(stage.reduce(alone, 17).keep, keep[i : i + 1])


def test_dart_at_the_entrance_is_of_images_and_by_embeddings() -> None:
    stage = only_stage(DARTConfig(layer=None))
    assert (stage.where, stage.layer, stage.budget, stage.needs) == ("entrance", -1, "image", {"text"})
    behind = only_stage(DARTConfig())
    assert (behind.where, behind.layer, behind.budget) == ("after_block", 1, "sample")
    assert behind.needs == {"keys", "text", "text_keys"} and behind.positions == "original"
    assert (behind.num_kept(576), behind.num_kept(4)) == (128, 1), "the program would keep 132, and 4"


def test_dart_searches_the_place_it_has() -> None:
    entrance, behind = DARTConfig(layer=None), DARTConfig()
    assert entrance.search_places(DECODER_SHAPE) == (-1,)
    assert behind.search_places(DECODER_SHAPE) == tuple(range(31))
    assert entrance.with_counts(DECODER_SHAPE, {-1: 72}) == DARTConfig(layer=None, keep_ratio=1 / 8)
    assert behind.with_counts(DECODER_SHAPE, {5: 72}) == DARTConfig(layer=5, keep_ratio=1 / 8)


# -- SparseVLM -------------------------------------------------------------------------------------------------------


def test_relevance_is_of_the_text_of_each_sample_alone() -> None:
    images, text = rand(3, 10, 8), rand(3, 6, 8, seed=1)
    mask = torch.tensor([[True] * 6, [False] * 4 + [True] * 2, [False] * 6])
    scores = text_relevance(images, text, mask)
    for i in range(3):
        expected = naive_relevance(images[i], text[i, mask[i]])
        np.testing.assert_allclose(scores[i, mask[i]], np.array(expected, dtype=np.float32), rtol=1e-5)
    assert not scores[~mask].any()
    stage = SparseVLMConfig().stages_for(DECODER_SHAPE)[0]
    assert torch.equal(stage.rate_text(images, text, mask), scores)


def test_raters_are_above_the_mean_of_their_sample_and_never_none() -> None:
    scores = torch.tensor([[9.0, 0.1, 0.7, 0.2], [0.5, 0.5, 0.5, 0.5], [9.0, 9.0, 9.0, 0.3], [0.25] * 4])
    mask = torch.tensor([[False, True, True, True], [True] * 4, [False] * 3 + [True], [False] * 4])
    expected = [[False, False, True, False], [True] * 4, [False] * 3 + [True], [False] * 4]
    assert raters(scores, mask).tolist() == expected


@pytest.mark.parametrize("heads", [1, 3, 5])
def test_sparsevlm_follows_its_rule(heads: int) -> None:
    attention = rand(2, 5, 6, 29).softmax(-1)[..., :20]  # the others are of text
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    scores = rand(2, 6, seed=1).exp()
    result = rated(attention, raters(scores, mask), heads)
    for i, start in enumerate((0, 2)):
        rows = [start + r for r in naive_raters(scores[i, start:].tolist())]
        expected = naive_rated(attention[i], rows, heads)
        np.testing.assert_allclose(result[i], np.array(expected, dtype=np.float32), rtol=1e-5)


def test_without_text_the_first_tokens_stay() -> None:
    nobody = torch.zeros(1, 6, dtype=torch.bool)
    assert not rated(rand(1, 5, 6, 20).softmax(-1), raters(torch.rand(1, 6), nobody), 5).any()


def test_stages_of_sparsevlm_are_the_programs_and_scale_with_depth() -> None:
    def plan(depth: int) -> dict[int, int]:
        stages = SparseVLMConfig().stages_for(replace(DECODER_SHAPE, depth=depth))
        return {stage.layer: stage.num_kept(576) for stage in stages}

    assert plan(32) == {2: 300, 6: 200, 15: 118}
    assert plan(64) == {5: 300, 13: 200, 31: 118}
    assert plan(2) == {0: 118}, "stages that meet leave what the last one leaves"


@pytest.mark.parametrize("size", [1, 15], ids=["of-size-1", "of-the-size-of-hidden-states"])
@pytest.mark.parametrize(("num_clusters", "num_tokens"), [(1, 1), (1, 4), (3, 9), (6, 40), (12, 12)])
def test_clusters_follow_their_rule(num_clusters: int, num_tokens: int, size: int) -> None:
    """Float32 has no number for the density of large states, nor does it take one."""
    states = size * rand(3, num_tokens, 6)
    centres, merged = cluster_and_merge(states, num_clusters)
    for i in range(3):
        members = naive_clusters(states[i], num_clusters)
        assert centres[i].tolist() == list(members)
        for place, group in enumerate(members.values()):
            torch.testing.assert_close(merged[i, place], states[i, group].mean(0))


def test_equal_tokens_are_clustered_without_losing_any_centre() -> None:
    for states in (torch.ones(2, 9, 4), torch.zeros(2, 9, 4)):
        centres, merged = cluster_and_merge(states, 3)
        assert centres.tolist() == [[0, 1, 2]] * 2 and torch.equal(merged, states[:, :3])
    assert cluster_and_merge(rand(1, 9, 4).bfloat16(), 3)[1].dtype == torch.bfloat16


@pytest.mark.parametrize(("num_tokens", "n_keep"), [(576, 300), (40, 20), (11, 10), (10, 10), (9, 1), (9, 2)])
def test_recycled_tokens_count_among_those_that_stay(num_tokens: int, n_keep: int) -> None:
    """The best stay as they are; clusters of the best of the others stand at their centres."""
    stage = SparseVLMConfig(recycle=True).stages_for(DECODER_SHAPE)[0]
    signals = make_decoder_signals(stage, 2, num_tokens)
    reduction = stage.reduce(signals, n_keep)
    num_clustered, num_clusters = recycled(num_tokens - n_keep, n_keep)
    assert reduction.keep.shape == (2, n_keep) and 0 <= num_clusters < n_keep
    if num_clusters == 0:
        assert n_keep in (1, num_tokens) and reduction.tokens is None
        return
    scores = rated(signals.text_attention, raters(signals.text_scores, signals.text_mask), DECODER_SHAPE.num_heads)
    for i in range(2):
        order = scores[i].argsort(descending=True, stable=True)
        kept, pool = order[: n_keep - num_clusters], order[n_keep - num_clusters :][:num_clustered]
        members = naive_clusters(signals.tokens[i, pool], num_clusters)
        states = signals.tokens[i].clone()
        for centre, group in members.items():
            states[pool[centre]] = signals.tokens[i, pool[group]].mean(0)
        expected = sorted(kept.tolist() + pool[list(members)].tolist())
        assert reduction.keep[i].tolist() == expected
        torch.testing.assert_close(reduction.tokens[i], states[expected])


@pytest.mark.parametrize("side", ["left", "right"])
def test_recycling_of_a_model_is_of_each_sample_alone(side: str) -> None:
    model = tiny_vlm("llava")
    fields = {"layers": (1, 4), "keep_ratios": (0.7, 0.4)}
    alone = [sample(model, parts, seed) for seed, parts in enumerate(("..I...", "....", ".I.I.", "..I"))]
    prune(model, SparseVLMConfig(**fields))
    plain = run(model, alone[0]).logits
    unprune(model)
    prune(model, SparseVLMConfig(**fields, recycle=True))
    assert not torch.allclose(run(model, alone[0]).logits, plain, atol=1e-3), "something was merged"
    batch = collate(alone, side)
    with record(model) as rec:
        logits = run(model, batch).logits
    assert [kept.shape[1] for kept in rec.kept.values()] == [35, 20], "of two images of 25 tokens"
    for row, prompt in enumerate(alone):
        expected = run(model, prompt).logits[0]
        torch.testing.assert_close(logits[row][batch["attention_mask"][row].bool()], expected, atol=1e-5, rtol=1e-5)


# -- HiPrune ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("columns", [1, 5, 30])
def test_hiprune_follows_its_rule_for_every_count(columns: int, alpha: float) -> None:
    """Also where anchors have more neighbours than there is room for."""
    objects, deep = rand(2, 30).exp(), rand(2, 30, seed=1).exp()
    for n_keep in range(1, 31):
        keep = hiprune(objects, deep, n_keep, alpha, columns)
        for i in range(2):
            expected = naive_hiprune(objects[i].tolist(), deep[i].tolist(), n_keep, alpha, columns)
            assert keep[i].tolist() == expected


def test_hiprune_of_a_picture_turned_around_is_its_choice_turned_around() -> None:
    """Neighbours are before and behind, above and below, in equal measure."""
    objects, deep = rand(2, 30), rand(2, 30, seed=1)
    turned = hiprune(objects.flip(1), deep.flip(1), 15, 0.8, 5)
    assert torch.equal((29 - turned).flip(1), hiprune(objects, deep, 15, 0.8, 5))


def block_of(windows: tuple[int, ...], depth: int = 0, **fields) -> int:
    tower = replace(TOWER, depth=depth or len(windows), windows=windows)
    return only_stage(HiPruneConfig(**fields), replace(DECODER_SHAPE, tower=tower)).earlier_block


def test_objects_are_in_the_middle_of_the_tower() -> None:
    assert [block_of((), depth) for depth in (24, 12, 32, 3, 2)] == [8, 4 - 1, 11, 0, 0]
    assert block_of((), 24, object_layer=20) == 20
    qwen = tuple(0 if block in (7, 15, 23, 31) else 8 for block in range(32))
    assert block_of(qwen) == 15, "between 7 and 15 the later one, which the official code takes"
    assert block_of(qwen, object_layer=7) == 7


def test_an_object_block_must_see_the_image_and_come_before_the_features() -> None:
    said = message_of(lambda: block_of((8, 0, 8, 0, 8), object_layer=2))
    assert said.startswith("object_layer=2 in HiPruneConfig: expected a block of the vision tower that attends to the")
    assert said.endswith("in front of the last such one: 1")
    assert message_of(lambda: block_of((), 4, object_layer=3)).endswith("in front of the last such one: 0, 1, 2")
    assert message_of(lambda: block_of((8, 8, 0))).endswith("there is none")
    assert message_of(lambda: block_of((), 1)).endswith("there is none")


def test_features_of_the_first_block_leave_none_in_front() -> None:
    with pytest.raises(UnsupportedModelError, match=r"attention of block 0 .* expected an earlier one"):
        prune(tiny_vlm("llava", vision_feature_layer=1), HiPruneConfig())


# -- VisPruner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("important", [0.0, 0.5, 0.7, 1.0])
def test_vispruner_follows_its_rule_for_every_count(important: float) -> None:
    """Also where the official code crashes: odd numbers left, and fewer at even places than are to leave."""
    features, attention = rand(2, 26, 8), rand(2, 26, seed=1).exp()
    for n_keep in range(1, 27):
        keep = vispruner(features, attention, n_keep, important).sort(1).values
        for i in range(2):
            expected = naive_vispruner(features[i], attention[i].tolist(), n_keep, important)
            assert keep[i].tolist() == expected


def test_of_vispruner_as_many_are_important_as_the_share_says() -> None:
    features, attention = rand(1, 60, 8), torch.arange(60.0).flip(0)[None]
    assert vispruner(features, attention, 10, 0.7)[0, :7].tolist() == list(range(7)), "7, although 0.7 · 10 is not"
    assert vispruner(features, attention, 10, 1.0)[0].tolist() == list(range(10))


def test_vispruner_reads_the_cls_token_where_there_is_one() -> None:
    assert only_stage(VisPrunerConfig()).needs == {"cls_attention"}
    without = replace(DECODER_SHAPE, tower=replace(TOWER, has_cls=False, num_protected=0))
    assert only_stage(VisPrunerConfig(), without).needs == {"received_attention"}


WITH_VIDEO = [family for family, case in SUPPORTED if case == Case("vispruner") and "V" in FAMILIES[family].kinds]


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_frames_too_short_to_lose_a_token_lose_none(family: str) -> None:
    """The ratio would take one of the whole video; ``generate`` encodes it before, and nothing tells its frames."""
    model = tiny_vlm(family)
    inputs = sample(model, ".V..")
    dense = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    prune(model, VisPrunerConfig(keep_ratio=0.95))
    assert torch.equal(model.generate(**inputs, max_new_tokens=2, do_sample=False), dense)


# -- all of them -----------------------------------------------------------------------------------------------------

RULES = {
    "dart": lambda x, k: dart(x, x.norm(1, -1), x[:, :0], x[:, :0].norm(1, -1), k),
    "hiprune": lambda x, k: hiprune(x[..., 0], x[..., 1], k, 0.5, 4),
    "vispruner": lambda x, k: vispruner(x, x[..., 0], k),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_of_all_equal_tokens_as_many_stay_as_asked(rule) -> None:
    for fill in (0.0, 3.0):
        for n_keep in range(1, 21):
            keep = rule(torch.full((2, 20, 4), fill), n_keep).sort(1).values
            assert keep.shape == (2, n_keep) and keep.diff(dim=1).gt(0).all() and keep.min() >= 0 and keep.max() < 20


@pytest.mark.parametrize("n_keep", [0, 21])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_counts_out_of_range_are_refused(rule, n_keep: int) -> None:
    with pytest.raises(TokenPruneError, match=f"n_keep={n_keep}: expected 1 <= n_keep <= 20"):
        rule(torch.ones(1, 20, 4), n_keep)


@pytest.mark.parametrize(
    ("config", "fields", "says"),
    [
        (DARTConfig, {"layer": -1}, "layer=-1 .* None for the entrance"),
        (DARTConfig, {"image_pivots": 0}, "image_pivots=0 .* a count >= 1"),
        (DARTConfig, {"text_pivots": -1}, "text_pivots=-1 .* a count >= 0"),
        (DARTConfig, {"layer": 31}, r"layer=31 .* layers of 0\.\.30"),
        (SparseVLMConfig, {"keep_ratios": (0.5, 0.2)}, "keep_ratios.* 3 values, one for each default layer"),
        (SparseVLMConfig, {"layers": (1, 2)}, r"keep_ratios.* 2 values, one for each of layers=\(1, 2\)"),
        (SparseVLMConfig, {"heads": 0}, "heads=0 .* a count >= 1"),
        (SparseVLMConfig, {"heads": 4}, "heads=4 .* at most 3"),
        (HiPruneConfig, {"alpha": 1.5}, "alpha=1.5 .* 0 <= alpha <= 1"),
        (HiPruneConfig, {"object_layer": -1}, "object_layer=-1 .* a block number >= 0"),
        (VisPrunerConfig, {"important": -0.1}, "important=-0.1 .* 0 <= important <= 1"),
    ],
)
def test_fields_out_of_range_are_refused(config: type[PruneConfig], fields: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config(**fields).stages_for(DECODER_SHAPE)


def test_the_best_are_ranked_as_elsewhere() -> None:
    """The loops above and ``top_tokens`` agree about ties."""
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0]])
    assert top_tokens(scores, 2)[0].tolist() == best(scores[0].tolist(), 2) == [1, 2]
