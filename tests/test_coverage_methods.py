"""Methods by coverage, diversity and determinants: golden vectors, naive loops, brute force, and hard inputs."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_tokenprune import CDPrunerConfig, ConfigError, DivPruneConfig, MMTokConfig, PruneConfig, ScopeConfig
from hf_tokenprune.errors import TokenPruneError
from hf_tokenprune.methods.cdpruner import cdpruner, relevance_to
from hf_tokenprune.methods.divprune import centred_view, divprune, standardized_view
from hf_tokenprune.methods.mmtok import coverage
from hf_tokenprune.methods.scope import scope
from hf_tokenprune.methods.similarity import cosines, maximize_coverage, min_max
from hf_tokenprune.signals import ENTRANCE, VISION_TOWER, Stage, TextRows

from .golden_vlm import CASES, VALUES, case_names, inputs, needs_golden
from .reference_coverage_methods import (
    brought_to_one,
    cosine_matrix,
    covered,
    naive_centred,
    naive_consistency,
    naive_coverage,
    naive_dpp,
    naive_max_min,
    naive_mmtok_rows,
    naive_relevance,
    naive_standardized,
    naive_z_weight,
)
from .test_contract_methods import DECODER_SHAPE, make_decoder_signals, make_signals
from .test_llava_methods import NEWLINES, NO_CLS, one_stage

# -- golden vectors ----------------------------------------------------------------------------------------------------


def tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))[None]


def rows_of(text: Tensor) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.bool)


def golden_cen(case: dict[str, Any], given: dict[str, Any], k: int, what: str) -> Tensor:
    features = tensor(given["x"])
    if what == "plain_order":
        return divprune(features, k)
    view, weight = (standardized_view if case.get("form") == "qwen" else centred_view)(features)
    return divprune(view, k, None if what == "centred_only_order" else weight)


def golden_scope(case: dict[str, Any], given: dict[str, Any], k: int, what: str) -> Tensor:
    saliency = None if case.get("none") else tensor(given["attention"])
    return scope(tensor(given["x"]), k, saliency, case.get("alpha", 1.0))


def golden_mmtok(case: dict[str, Any], given: dict[str, Any], k: int, what: str) -> Tensor:
    visual, tower, text = (tensor(given[name]) for name in ("x", "tower", "text"))
    candidates = case["n"] - case.get("padded", 0)
    if what == "dropped_first_order":
        visual, tower = visual[:, :candidates], tower[:, :candidates]
    settings = {"tau_text": case.get("tau_t", 0.02), "alpha": case.get("alpha", 0.5)}
    rows = coverage(visual, tower, text, rows_of(text), **settings)
    return maximize_coverage(rows[:, :candidates], k)


def golden_cdpruner(case: dict[str, Any], given: dict[str, Any], k: int, what: str) -> Tensor:
    text = tensor(given["text"])
    relevance = relevance_to(text, rows_of(text), tensor(given.get("embeds", given["x"])))
    return cdpruner(tensor(given["x"]), k, relevance, case.get("theta", 0.5), case.get("cen", False))


Chosen = Callable[[dict[str, Any], dict[str, Any], int, str], Tensor]
GOLDEN: dict[str, Chosen] = {
    "cen": golden_cen,
    "scope": golden_scope,
    "mmtok": golden_mmtok,
    "cdpruner": golden_cdpruner,
}


def given_to(method: str, name: str) -> dict[str, Any]:
    given = inputs(method, name)
    if (method, name) == ("cen", "window"):  # four states a token, in the order of windows
        tokens = given["x"].reshape(-1, 4, given["x"].shape[1]).mean(1)
        places = np.random.RandomState(CASES[method][name]["seed"] + 9).permutation(len(tokens))
        given["x"] = tokens[np.argsort(places)]
    return given


def chosen(method: str, name: str, what: str = "order") -> list[int]:
    """In the order of choice; of several images, each on its own, the set."""
    case, given = CASES[method][name], given_to(method, name)
    if "keep" not in partners(method, name):
        return GOLDEN[method](case, given, case["k"], what)[0].tolist()
    sizes = case.get("sizes") or [case["n"] // case["images"]] * case["images"]
    found: list[int] = []
    ends = list(itertools.accumulate(sizes))
    for size, end, k in zip(sizes, ends, case.get("budgets") or [case["k"]] * len(sizes), strict=True):
        one = {key: v[end - size : end] if len(v) == case["n"] else v for key, v in given.items()}
        found += (GOLDEN[method](case, one, k, what)[0] + end - size).tolist()
    return sorted(found)


def partners(method: str, name: str) -> list[str]:
    """What there is of a case: "order", "firm", "keep_official", ..."""
    prefix = f"{method}_{name}_"
    return [key.removeprefix(prefix) for key in VALUES if key.startswith(prefix)]


def golden(wanted: Callable[[str], bool]) -> list[Any]:
    keys = [(m, name, what) for m in GOLDEN for name in case_names(m) for what in partners(m, name) if wanted(what)]
    return [pytest.param(*key, id="-".join(key)) for key in keys]


@needs_golden
@pytest.mark.parametrize(
    ("method", "name", "what"), golden(lambda what: what in ("order", "plain_order") or what.endswith("_order"))
)
def test_golden_orders(method: str, name: str, what: str) -> None:
    case, expected = CASES[method][name], VALUES[f"{method}_{name}_{what}"].tolist()
    firm = int(VALUES[f"{method}_{name}_{'firm' if what == 'order' else what.replace('order', 'firm')}"])
    order = chosen(method, name, what)
    assert len(order) == len(set(order)) == case["k"] and set(order) <= set(range(case["n"]))
    if (method, name) == ("scope", "silent"):  # of the two tails that are right, ours
        expected, firm = VALUES["scope_silent_eps_order"].tolist(), int(VALUES["scope_silent_eps_firm"])
    if case["mod"] == "dup":  # groups of four equal tokens
        half = case["n"] // 8 * 4
        order, expected = ([i // 4 if i < half else i for i in each] for each in (order, expected))
    assert order[:firm] == expected[:firm]


@needs_golden
@pytest.mark.parametrize(("method", "name", "what"), golden(lambda what: what == "keep"))
def test_golden_sets(method: str, name: str, what: str) -> None:
    assert int(VALUES[f"{method}_{name}_keep_firm"]) == 1
    assert chosen(method, name) == VALUES[f"{method}_{name}_keep"].tolist()


DIFFERENT = {
    "zero": "the programs divide by the norm of a zero vector",
    "silent": "the program goes on by position where saliency is 0",
    "bfloat16": "the program scores in bfloat16",
    "batchwide": "the program has one relevance scale for all images of a batch",
    "pure": "the program lets rounding of the diagonal choose the first token",
    "level": "the same",
    "rank": "the program's kernel is exhausted",
    "dupmore": "the same",
    "same": "the same",
}
"""Where golden/README.md says that programs part from the equations; "unitdiag" is the program with an exact one."""


def as_official(what: str) -> bool:
    return what.endswith("official")


@needs_golden
@pytest.mark.parametrize(("method", "name", "what"), golden(as_official))
def test_official_programs(method: str, name: str, what: str) -> None:
    """The same set, but where the program does what is documented as not the method."""
    ours, official = set(chosen(method, name)), set(VALUES[f"{method}_{name}_{what}"].tolist())
    determined = "unitdiag" in what and "rank" not in name
    if determined or not any(word in name or word in what for word in DIFFERENT):
        assert ours == official


@needs_golden
@pytest.mark.parametrize(("method", "name", "what"), golden(lambda what: what in ("weight", "relevance")))
def test_golden_weights(method: str, name: str, what: str) -> None:
    case, given = CASES[method][name], given_to(method, name)
    expected = VALUES[f"{method}_{name}_{what}"]
    if method == "cdpruner":
        text = tensor(given["text"])
        actual = relevance_to(text, rows_of(text), tensor(given.get("embeds", given["x"])))
    else:
        _, actual = (standardized_view if case.get("form") == "qwen" else centred_view)(tensor(given["x"]))
        if np.ptp(expected) == 0:
            expected = np.ones_like(expected)  # a constant has no say as a factor, whatever it is
    epsilons = 2e-4 if case.get("form") == "qwen" else 0  # what their choice, from 1e-12 to 1e-5, makes of its weights
    torch.testing.assert_close(actual, tensor(expected), atol=1e-5 + epsilons, rtol=1e-5)


# -- naive loops -------------------------------------------------------------------------------------------------------


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """Three images of 40 tokens with much in common, up to 7 rows of text, and saliency."""
    features = randn(0, 3, 40, 24) + 2 * randn(1, 3, 1, 24)
    mask = torch.arange(7) >= torch.tensor([[0], [3], [6]])
    return {
        "features": features,
        "tower": randn(2, 3, 40, 12),
        "text": randn(3, 3, 7, 24).masked_fill(~mask[..., None], math.nan),  # filling may be anything
        "mask": mask,
        "saliency": randn(4, 3, 40).softmax(-1),
    }


def text_of(batch: dict[str, Tensor], row: int) -> Tensor:
    return batch["text"][row][batch["mask"][row]]


def test_naive_cen(batch) -> None:
    order, plain = divprune(*with_count(centred_view(batch["features"]), 12)), []
    for row, features in enumerate(batch["features"]):
        weight = brought_to_one(naive_consistency(features))
        assert order[row].tolist() == naive_max_min(naive_centred(features), 12, weight)
        plain.append(naive_max_min(features, 12, [1.0] * 40))
    assert divprune(batch["features"], 12).tolist() == plain


def with_count(view: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, int, Tensor]:
    return view[0], k, view[1]


def test_naive_cen_of_tower_features(batch) -> None:
    order = divprune(*with_count(standardized_view(batch["tower"]), 12))
    for row, features in enumerate(batch["tower"]):
        scaled = naive_standardized(features)
        weight = naive_z_weight(naive_consistency(scaled))
        assert order[row].tolist() == naive_max_min(naive_centred(scaled), 12, weight)


@pytest.mark.parametrize(("alpha", "k"), [(0.5, 12), (1.0, 12), (2.0, 12), (30.0, 8)])
def test_naive_scope(batch, alpha: float, k: int) -> None:
    """Also where float32 has no number for the power of a saliency."""
    order = scope(batch["features"], k, batch["saliency"], alpha)
    for row, features in enumerate(batch["features"]):
        cover = cosine_matrix(features)
        saliency = [float(value) ** alpha for value in batch["saliency"][row]]
        assert order[row].tolist() == naive_coverage(cover, k, saliency)


def test_pure_coverage_takes_the_largest_gain(batch) -> None:
    """Two tokens that improve only each other gain the same, so which it is may be rounding, but not how much."""
    order = scope(batch["features"], 12)
    for row, features in enumerate(batch["features"]):
        cover, before = cosine_matrix(features), []
        for token in order[row].tolist():
            gains = [covered(cover, [*before, j]) - covered(cover, before) for j in range(40)]
            assert gains[token] == pytest.approx(max(gains), abs=1e-5)
            before.append(token)


def test_naive_mmtok(batch) -> None:
    rows = coverage(batch["features"], batch["tower"], batch["text"], batch["mask"], 0.1, 0.3, 0.7)
    order = maximize_coverage(rows, 12)
    for row in range(3):
        cover = naive_mmtok_rows(batch["features"][row], batch["tower"][row], text_of(batch, row), 0.1, 0.3, 0.7)
        assert order[row].tolist() == naive_coverage(cover, 12)


@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_naive_cdpruner(batch, theta: float) -> None:
    relevance = relevance_to(batch["text"], batch["mask"], batch["features"])
    order = cdpruner(batch["features"], 12, relevance, theta)
    centred = cdpruner(batch["features"], 12, relevance, theta, centre=True)
    for row, features in enumerate(batch["features"]):
        scale = brought_to_one(naive_relevance(features, text_of(batch, row)))
        weight = scale if theta == 1 else [math.exp(theta / (2 * (1 - theta)) * r) for r in scale]
        assert order[row].tolist() == naive_dpp(features, 12, weight)
        weight = [w * g for w, g in zip(weight, brought_to_one(naive_consistency(features)), strict=True)]
        assert centred[row].tolist() == naive_dpp(naive_centred(features), 12, weight)


def test_much_relevance_is_no_overflow(batch) -> None:
    """Of exp(99 / 2), the weight of the most relevant token, float32 has no square."""
    relevance = relevance_to(batch["text"], batch["mask"], batch["features"])
    order = cdpruner(batch["features"], 5, relevance, 0.99)
    for row, features in enumerate(batch["features"]):
        scale = brought_to_one(naive_relevance(features, text_of(batch, row)))
        assert order[row].tolist() == naive_dpp(features, 5, [math.exp(99 / 2 * r) for r in scale])
    nearly = cdpruner(batch["features"], 40, relevance, math.nextafter(1, 0))
    assert torch.equal(nearly[:, 0], relevance.argmax(1))
    check(nearly, 3, 40, 40)


# -- what the methods claim --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["scope", "mmtok"])
def test_greedy_coverage_is_within_its_bound(method: str, seed: int) -> None:
    features, text = randn(seed, 1, 9, 6), randn(seed + 50, 1, 4, 6)
    rows = cosines(features) if method == "scope" else coverage(features, features, text, rows_of(text), 0.2)
    cover = rows[0].double().tolist()
    for k in (1, 2, 3, 4):
        greedy = covered(cover, maximize_coverage(rows, k)[0].tolist())
        best = max(covered(cover, subset) for subset in itertools.combinations(range(9), k))
        assert greedy >= (1 - 1 / math.e) * best
        assert k > 1 or greedy == pytest.approx(best)


def test_a_common_offset_changes_no_distance(batch) -> None:
    features = batch["features"]
    shifted = features + 3 * randn(9, 3, 1, 24)
    view, moved = centred_view(features)[0], centred_view(shifted)[0]
    torch.testing.assert_close(cosines(moved), cosines(view), atol=1e-5, rtol=0)
    assert torch.equal(divprune(moved, 12), divprune(view, 12))
    assert not torch.equal(divprune(shifted, 12), divprune(features, 12))


def test_standardized_features_are_free_of_scales_and_of_constants(batch) -> None:
    tower = batch["tower"]
    scales = torch.cat([torch.tensor([60.0, 0.01]), torch.ones(10)])
    constant = torch.full((3, 40, 1), 1e3)
    for other in (tower * scales, torch.cat([tower, constant], 2)):
        for expected, actual in zip(standardized_view(tower), standardized_view(other), strict=True):
            torch.testing.assert_close(actual[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)


def test_a_constant_relevance_has_no_say(batch) -> None:
    features = batch["features"]
    pure = cdpruner(features, 12)
    assert torch.equal(cdpruner(features, 12, torch.full((3, 40), 0.3), theta=1.0), pure)
    assert torch.equal(cdpruner(features, 12, 0.3 + 1e-8 * randn(7, 3, 40)), pure), "rounding is not blown up"
    assert torch.equal(pure[:, 0], torch.zeros(3)), "all are equal, so the first is the lowest"


def test_a_sample_without_text_is_chosen_by_its_image(batch) -> None:
    nothing = torch.zeros_like(batch["mask"])
    features = batch["features"]
    rows = coverage(features, features, batch["text"], nothing)
    image_only = coverage(features, features, batch["text"][:, :0], nothing[:, :0])
    assert torch.equal(rows[..., 7:], image_only) and not rows[..., :7].any()
    assert torch.equal(cdpruner(features, 12, relevance_to(batch["text"], nothing, features)), cdpruner(features, 12))


@pytest.mark.parametrize("centre", [False, True])
def test_behind_the_rank_of_the_kernel_tokens_follow_by_difference(centre: bool) -> None:
    """In 8 dimensions 8 tokens say all."""
    features = randn(5, 2, 30, 8)
    order = cdpruner(features, 20, centre=centre)
    for row in range(2):
        view = naive_centred(features[row]) if centre else features[row]
        similar = cosine_matrix(view)
        chosen = order[row].tolist()
        weight = brought_to_one(naive_consistency(features[row])) if centre else [1.0] * 30
        assert chosen[:8] == naive_dpp(view, 8, weight)
        for step in range(8, 20):
            pool = [token for token in range(30) if token not in chosen[:step]]
            assert chosen[step] == min(pool, key=lambda token: max(similar[token][j] for j in chosen[:step]))


def test_a_token_without_relevance_comes_last_of_what_the_kernel_knows(batch) -> None:
    relevance = relevance_to(batch["text"], batch["mask"], batch["features"])
    order = cdpruner(batch["features"], 40, relevance, theta=1.0)
    last = relevance.argmin(1)
    assert (order[:, :24] != last[:, None]).all() and (order == last[:, None]).any(1).all()


def test_silent_tokens_are_chosen_last_and_by_coverage(batch) -> None:
    saliency = batch["saliency"].clone()
    saliency[:, ::2] = 0
    order = scope(batch["features"], 40, saliency)
    assert (order[:, :20] % 2 == 1).all()
    for row, features in enumerate(batch["features"]):
        cover = cosine_matrix(features)
        first = order[row, :20].tolist()
        gains = {j: covered(cover, [*first, j]) - covered(cover, first) for j in range(0, 40, 2)}
        assert order[row, 20] == max(gains, key=lambda j: gains[j])


# -- hard inputs -------------------------------------------------------------------------------------------------------


def by_cen(features: Tensor, k: int) -> Tensor:
    return divprune(*with_count(centred_view(features), k))


def by_standardized(features: Tensor, k: int) -> Tensor:
    return divprune(*with_count(standardized_view(features), k))


def some_text(features: Tensor) -> tuple[Tensor, Tensor]:
    text = randn(11, len(features), 5, features.shape[2])
    return text, rows_of(text)


def by_mmtok(features: Tensor, k: int) -> Tensor:
    return maximize_coverage(coverage(features, features, *some_text(features)), k)


def by_cdpruner(features: Tensor, k: int) -> Tensor:
    return cdpruner(features, k, relevance_to(*some_text(features), features))


def by_centred_cdpruner(features: Tensor, k: int) -> Tensor:
    return cdpruner(features, k, relevance_to(*some_text(features), features), theta=1.0, centre=True)


def by_salient_scope(features: Tensor, k: int) -> Tensor:
    """With a saliency that goes with the token and not with its place."""
    return scope(features, k, features.float().square().mean(2))


FUNCTIONS = [
    divprune,
    by_cen,
    by_standardized,
    scope,
    by_salient_scope,
    by_mmtok,
    cdpruner,
    by_cdpruner,
    by_centred_cdpruner,
]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def check(order: Tensor, batch_size: int, num_tokens: int, k: int) -> None:
    assert order.shape == (batch_size, k) and order.dtype == torch.int64
    assert order.sort(1).values.diff(dim=1).gt(0).all() and order.min() >= 0 and order.max() < num_tokens


@every_function
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 17])
def test_any_count_of_any_number(function, num_tokens: int) -> None:
    features = randn(num_tokens, 2, num_tokens, 8)
    for k in {1, (num_tokens + 1) // 2, num_tokens}:
        check(function(features, k), 2, num_tokens, k)
    for k in (0, num_tokens + 1):
        with pytest.raises(TokenPruneError, match=f"n_keep={k}: expected 1 <= n_keep <= {num_tokens}"):
            function(features, k)


@every_function
def test_the_order_follows_the_tokens(function, batch) -> None:
    features, order = batch["features"], torch.randperm(40, generator=torch.Generator().manual_seed(3))
    if function is cdpruner:  # all weights are equal, so the first choice is the first token
        order = torch.cat([order[order == 0], order[order != 0]])
    found, permuted = function(features, 12), order[function(features[:, order], 12)]
    if function is scope:  # where two tokens gain the same, the lower position decides
        similar = cosines(features)
        for row in range(3):
            cover = similar[row].tolist()
            assert covered(cover, found[row].tolist()) == pytest.approx(covered(cover, permuted[row].tolist()))
    else:
        assert torch.equal(permuted, found)


@every_function
def test_rows_of_a_batch_do_not_know_of_each_other(function, batch) -> None:
    features = batch["features"]
    together = function(features, 12)
    if function not in (by_mmtok, by_cdpruner, by_centred_cdpruner):  # whose text here goes with the row
        assert torch.equal(together[1:2], function(features[1:2], 12))
    assert torch.equal(function(torch.cat([features[:2], 5 * randn(8, 1, 40, 24)]), 12)[:2], together[:2])


@every_function
def test_equal_tokens_are_chosen_once(function) -> None:
    """While there are others, of each group of three equal ones."""
    features = randn(21, 2, 10, 24).repeat_interleave(3, dim=1)
    groups = function(features, 9).div(3, rounding_mode="floor")
    assert groups.sort(1).values.diff(dim=1).gt(0).all()


@every_function
@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.zeros_like(x),
        lambda x: x[:, :1].expand_as(x),
        lambda x: x * (torch.arange(30) != 5)[:, None],
        lambda x: x * (torch.arange(30) > 25)[:, None],
        lambda x: x * 1e-30,
        lambda x: x * 1e15,
        lambda x: -x[:, :1] * (1 - 2 * (torch.arange(30) % 2))[:, None],
        lambda x: x[..., :1],
    ],
    ids=["zeros", "equal", "one-zero", "mostly-zero", "small", "large", "opposite", "one-dimension"],
)
def test_degenerate_features(function, make) -> None:
    features = make(randn(31, 2, 30, 16))
    for k in (1, 12, 30):
        check(function(features, k), 2, 30, k)


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(function, dtype: torch.dtype, batch) -> None:
    half = batch["features"].to(dtype)
    assert torch.equal(function(half, 12), function(half.float(), 12))


def test_equal_features_are_chosen_in_order() -> None:
    features = randn(41, 1, 1, 33).expand(2, 20, 33)
    assert by_cen(features, 7).tolist() == [list(range(7))] * 2
    assert by_standardized(features, 7).tolist() == [list(range(7))] * 2


def test_what_is_constant_weighs_1() -> None:
    assert torch.equal(min_max(torch.full((2, 5), 0.1)), torch.ones(2, 5))
    assert min_max(torch.tensor([[1.0, 3.0, 2.0]])).tolist() == [[0.0, 1.0, 0.5]]


# -- configs and stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "where", "needs", "text_rows"),
    [
        (DivPruneConfig(centre=True), "entrance", set(), None),
        (DivPruneConfig(features="tower"), "vision_tower", {"tower_features"}, None),
        (ScopeConfig(), "vision_tower", {"cls_attention"}, None),
        (ScopeConfig(saliency="none"), "entrance", set(), None),
        (MMTokConfig(), "entrance", {"text"}, TextRows("question")),
        (MMTokConfig(text="all"), "entrance", {"text"}, TextRows("all")),
        (CDPrunerConfig(), "entrance", {"text"}, TextRows("question")),
        (CDPrunerConfig(text="all"), "entrance", {"text"}, TextRows("all")),
        (CDPrunerConfig(relevance="none"), "entrance", set(), None),
    ],
    ids=str,
)
def test_what_stages_read(config: PruneConfig, where: str, needs: set[str], text_rows: TextRows | None) -> None:
    stage = one_stage(config)
    assert (stage.where, stage.needs, stage.text_rows, stage.budget) == (where, needs, text_rows, "image")
    assert stage.reads_question == (text_rows is not None)
    assert stage.num_kept(576) == (56 if isinstance(config, DivPruneConfig) else 64)


def test_without_cls_scope_counts_all_attention() -> None:
    assert one_stage(ScopeConfig(), NO_CLS).needs == {"received_attention"}


def sets(order: Tensor) -> Tensor:
    return order.sort(1).values


def test_stages_choose_what_the_functions_do() -> None:
    def keep(stage: Stage, signals: Any) -> Tensor:
        return stage.reduce(signals, 20).keep

    for centre, view in ((False, lambda x: (x, None)), (True, standardized_view)):
        stage = one_stage(DivPruneConfig(features="tower", centre=centre))
        signals = make_decoder_signals(stage, 2, 60)
        features, weight = view(signals.need("tower_features"))
        assert torch.equal(keep(stage, signals), sets(divprune(features, 20, weight)))
    stage = one_stage(DivPruneConfig(centre=True))
    signals = make_decoder_signals(stage, 2, 60)
    assert torch.equal(keep(stage, signals), sets(by_cen(signals.tokens, 20)))
    signals = make_signals(2, 60)
    for shape, attention in ((DECODER_SHAPE, signals.cls_attention), (NO_CLS, signals.received_attention)):
        expected = scope(signals.tokens[:, 1:], 20, attention[..., 1:].sum(1), 2.0)
        assert torch.equal(keep(one_stage(ScopeConfig(alpha=2), shape), signals), sets(expected))
    stage = one_stage(MMTokConfig(tau_text=0.1, tau_image=0.3, alpha=2))
    signals = make_decoder_signals(stage, 2, 60)
    rows = coverage(signals.tokens, signals.tokens, signals.text, signals.text_mask, 0.1, 0.3, 2)
    assert torch.equal(keep(stage, signals), sets(maximize_coverage(rows, 20)))
    relevance = relevance_to(signals.text, signals.text_mask, signals.tokens)
    for fields, given in (({"theta": 1, "centre": True}, relevance), ({"relevance": "none"}, None)):
        expected = cdpruner(signals.tokens, 20, given, fields.get("theta", 0.5), fields.get("centre", False))
        assert torch.equal(keep(one_stage(CDPrunerConfig(**fields)), signals), sets(expected))


@pytest.mark.parametrize(
    ("config", "place", "kept"),
    [
        (DivPruneConfig(centre=True), ENTRANCE, 300),
        (DivPruneConfig(features="tower"), VISION_TOWER, 60),
        (ScopeConfig(alpha=0.5), VISION_TOWER, 60),
        (ScopeConfig(saliency="none"), ENTRANCE, 300),
        (MMTokConfig(), ENTRANCE, 300),
        (CDPrunerConfig(theta=0.7), ENTRANCE, 300),
    ],
    ids=str,
)
def test_counts_at_either_place(config: PruneConfig, place: int, kept: int) -> None:
    """Of five encoded images 2880 tokens; in the tower counts are of each."""
    assert config.search_places(NEWLINES) == (place,)
    found = config.with_counts(NEWLINES, {place: 300})
    stage = one_stage(found, NEWLINES)
    assert stage.place == place and replace(found, keep_ratio=config.keep_ratio) == config
    assert stage.num_kept(NEWLINES.tower_tokens if place == VISION_TOWER else 2880) == kept
    assert one_stage(config.by_rule(0.0, NEWLINES), NEWLINES).num_kept(100) == 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DivPruneConfig(features="tower", budget="sample"), r"budget='sample'.*features='tower'"),
        (lambda: DivPruneConfig(features="merged"), r"features='merged'.*'projected' or 'tower'"),
        (lambda: ScopeConfig(alpha=0), r"alpha=0\.0.*saliency='none'"),
        (lambda: ScopeConfig(alpha=2, saliency="none"), r"alpha=2\.0.*no effect with saliency='none'"),
        (lambda: ScopeConfig(saliency="cls"), r"saliency='cls'.*'attention' or 'none'"),
        (lambda: MMTokConfig(tau_text=0), r"tau_text=0\.0.*0\.001 <= tau_text <= 1000"),
        (lambda: MMTokConfig(tau_image=-1), r"tau_image=-1\.0.*0\.001 <= tau_image <= 1000"),
        (lambda: MMTokConfig(tau_image=1e-40), r"tau_image=1e-40.*0\.001 <= tau_image <= 1000"),
        (lambda: MMTokConfig(alpha=0), r"alpha=0\.0.*0\.001 <= alpha <= 1000"),
        (lambda: MMTokConfig(alpha=1e308), r"alpha=1e\+308.*0\.001 <= alpha <= 1000"),
        (lambda: MMTokConfig(text="last"), r"text='last'.*'question' or 'all'"),
        (lambda: CDPrunerConfig(theta=0), r"theta=0\.0.*relevance='none'"),
        (lambda: CDPrunerConfig(theta=1.5), r"theta=1\.5.*0 < theta <= 1"),
        (lambda: CDPrunerConfig(theta=0.7, relevance="none"), r"theta=0\.7.*no effect with relevance='none'"),
        (lambda: CDPrunerConfig(text="all", relevance="none"), r"text='all'.*no effect with relevance='none'"),
        (lambda: CDPrunerConfig(keep_ratio=0), r"keep_ratio=0\.0"),
    ],
)
def test_fields_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
