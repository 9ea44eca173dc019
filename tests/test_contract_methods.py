"""What every registered method owes: counts, order, independence of the batch, and no surprises with odd numbers."""

import math
import pickle
from dataclasses import fields, replace
from itertools import pairwise
from typing import get_args

import pytest
import torch

from hf_tokenprune import PruneConfig, list_methods
from hf_tokenprune.adapters.vision._block import merge_tokens
from hf_tokenprune.config import Where
from hf_tokenprune.engine import options
from hf_tokenprune.methods.zero_tprune import ZeroTPruneStage
from hf_tokenprune.registry import get_method
from hf_tokenprune.signals import DecoderShape, Merging, ModelShape, Shape, Signals, Stage, Transition

from .families import methods_for, with_choices

SHAPE = ModelShape(
    depth=12,
    width=24,
    mlp_width=48,
    num_heads=3,
    head_dim=8,
    image_size=(24, 24),
    patch_size=(4, 4),
    num_channels=3,
    num_protected=1,
    has_cls=True,
    head_macs=0,
)
DECODER_SHAPE = DecoderShape(
    depth=32,
    width=24,
    mlp_width=48,
    num_heads=3,
    num_key_value_heads=3,
    head_dim=8,
    vocab_size=99,
    tower=replace(SHAPE, image_size=(96, 96)),
    tower_images=1,
    tower_tokens=576,
    image_tokens=576,
    projector_macs=0,
    newline_tokens=0,
)
SHAPES: dict[str, Shape] = {"vision": SHAPE, "decoder": DECODER_SHAPE}
TOKEN_AXES = {
    **dict.fromkeys(("tokens", "inputs"), (1,)),
    **dict.fromkeys(("queries", "keys", "values", "layer_scores"), (2,)),
    **dict.fromkeys(("cls_attention", "received_attention"), (2,)),
    "attention": (2, 3),
    "earlier_attention": (2,),
    **dict.fromkeys(("sizes", "tower_features"), (1,)),
    "text_attention": (3,),
    **dict.fromkeys(("text", "text_mask", "text_keys", "text_scores"), ()),
}


METHODS_AND_KINDS = [(name, kind) for kind in SHAPES for name in methods_for(kind)]


def stages_of(kind: str) -> list[Stage]:
    """Every stage of every method's default config, and one with each choice of its own that makes another stage."""
    shape, found = SHAPES[kind], dict[Stage, Stage]()
    for name in methods_for(kind):
        default = get_method(name)()
        chosen = [config.stages_for(shape) for config in with_choices(default, shape).values()]
        for stage in (*default.stages_for(shape), *(stages[len(stages) // 2] for stages in chosen)):
            alike = replace(stage, positions="contiguous", newlines="prune", budget="sample")
            found.setdefault(alike, stage)
    return list(found.values())


DECODER_STAGES = stages_of("decoder")


def all_stages() -> list[Stage]:
    """Those of both kinds; between attention and MLP too in a vision encoder."""
    vision = stages_of("vision")
    return [*dict.fromkeys((*vision, *(replace(stage, where="mid_block") for stage in vision))), *DECODER_STAGES]


def test_messages_name_methods_by_their_stages() -> None:
    for name in list_methods():
        config = get_method(name)()
        for stage in config.stages_for(SHAPE if "vision" in config.prunes else DECODER_SHAPE):
            parts = {part.method for part in getattr(config, "decoder_parts", (config,))}
            assert stage.title.lower() in {part.replace("_", "") for part in parts}


def in_decoder(stage: Stage) -> bool:
    return stage in DECODER_STAGES


def make_signals(batch: int, num_prunable: int, num_protected: int = 1, seed: int = 0, dtype=torch.float32) -> Signals:
    """All signals a vision encoder can offer, random but consistent; ``dtype`` is the model's, attention is float32."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_prunable + num_protected

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads = (batch, SHAPE.num_heads, num_tokens, SHAPE.head_dim)
    queries, keys, values = rand(*heads), rand(*heads), rand(*heads)
    attention = (queries.float() @ keys.float().transpose(-1, -2)).softmax(-1)
    tokens, inputs = rand(batch, num_tokens, SHAPE.width), rand(batch, num_tokens, SHAPE.width)
    pieces = attention.split(2)
    sizes = torch.randint(1, 5, (batch, num_tokens), generator=generator).float()
    rows = {"cls_attention": attention[:, :, 0], "received_attention": attention.mean(2)}
    has_cls = num_protected > 0
    return Signals(tokens, inputs, num_protected, has_cls, pieces, queries, keys, values, sizes=sizes, **rows)


def frames_of(stage: Stage, num_prunable: int) -> int:
    """Of how many frames tokens are shown to a stage: several where it prunes videos and they can be equally long."""
    return next(f for f in (5, 3, 1) if num_prunable % f == 0) if stage.videos_only else 1


def num_kept(stage: Stage, num_prunable: int) -> int:
    return stage.num_kept_of(num_prunable, frames_of(stage, num_prunable))


def make_decoder_signals(stage: Stage, batch: int, num_prunable: int, seed: int = 0, dtype=torch.float32) -> Signals:
    """What a decoder offers this stage: the signals it needs and no more."""
    if stage.where == "vision_tower":
        signals = make_signals(batch, num_prunable, DECODER_SHAPE.tower.num_protected, seed, dtype)
        received = signals.received_attention
        patches = torch.cat([signals.tokens, signals.inputs], 2)[:, signals.num_protected :]
        signals = replace(signals, sizes=None, tower_features=patches, earlier_attention=received.flip(1))
        signals = replace(signals, columns=max(1, math.isqrt(num_prunable)))
        unasked = {name for name in TOKEN_AXES if name not in ("tokens", "inputs")} - stage.needs
        return replace(signals, **dict.fromkeys(unasked))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, num_prunable, DECODER_SHAPE.width, generator=generator).to(dtype)
    signals = Signals(tokens, tokens, num_protected=0, has_cls=False, frames=frames_of(stage, num_prunable))

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    found: dict[str, torch.Tensor] = {}
    if stage.text_rows is not None:
        rows = 1 if stage.text_rows.rows == "last" else 6
        filling = torch.arange(batch)[:, None] % rows  # in front: rows are aligned at the end
        found["text_attention"] = rand(DECODER_SHAPE.num_heads, rows, num_prunable + 9).softmax(-1)[..., :num_prunable]
        found["text"] = rand(rows, DECODER_SHAPE.width).to(dtype)
        found["text_keys"] = rand(DECODER_SHAPE.num_key_value_heads, rows, DECODER_SHAPE.head_dim).to(dtype)
        found["text_scores"] = rand(rows)
        signals = replace(signals, text_mask=torch.arange(rows) >= filling)
    found["keys"] = rand(DECODER_SHAPE.num_key_value_heads, num_prunable, DECODER_SHAPE.head_dim).to(dtype)
    if "layer_scores" in stage.needs:
        found["layer_scores"] = torch.rand(batch, len(stage.observes), num_prunable, generator=generator)
    return replace(signals, **{name: value for name, value in found.items() if name in stage.needs})


def signals_for(stage: Stage, batch: int = 4, num_prunable: int | None = None, **options) -> Signals:
    """Signals with the number of tokens at which a stage of its kind has something to drop."""
    if in_decoder(stage):
        return make_decoder_signals(stage, batch, num_prunable or 225, **options)
    return make_signals(batch, num_prunable or 36, **options)


def select(signals: Signals, rows: slice | None = None, order: torch.Tensor | None = None) -> Signals:
    """Some samples of the batch, or all of them with their tokens in another order."""

    def pick(x: torch.Tensor, token_axes: tuple[int, ...]) -> torch.Tensor:
        if rows is not None:
            return x[rows]
        assert order is not None
        for axis in token_axes:
            missing = len(order) - x.shape[axis]  # the protected ones, where a signal has none of them
            x = x.index_select(axis, order[missing:] - missing)
        return x

    picked = {}
    for name, axes in TOKEN_AXES.items():
        value = getattr(signals, name)
        if value is not None:
            picked[name] = (pick(torch.cat(value), axes),) if name == "attention" else pick(value, axes)
    return replace(signals, **picked)


def mapped(signals: Signals, function) -> Signals:
    """Every tensor of the model's dtype replaced by ``function`` of it."""
    names = ("tokens", "inputs", "queries", "keys", "values", "text", "text_keys", "tower_features")
    return replace(signals, **{n: function(getattr(signals, n)) for n in names if getattr(signals, n) is not None})


def keep_of(stage: Stage, signals: Signals) -> torch.Tensor:
    num_prunable = signals.tokens.shape[1] - signals.num_protected
    return stage.reduce(signals, num_kept(stage, num_prunable)).keep


def stage_id(stage: Stage) -> str:
    ignored = ("layer", "where", "positions", "newlines", "budget")
    own = [getattr(stage, field.name) for field in fields(stage) if field.name not in ignored]
    return "-".join(map(str, (type(stage).__name__, stage.layer, stage.where, *own)))


@pytest.fixture(params=all_stages(), ids=stage_id)
def stage(request: pytest.FixtureRequest) -> Stage:
    return request.param


@pytest.fixture(params=DECODER_STAGES, ids=stage_id)
def decoder_stage(request: pytest.FixtureRequest) -> Stage:
    return request.param


@pytest.mark.parametrize("num_protected", [0, 1, 2])
@pytest.mark.parametrize("num_prunable", [1, 2, 3, 7, 36, 61, 225])
def test_counts_order_and_range(stage: Stage, num_prunable: int, num_protected: int) -> None:
    if in_decoder(stage):
        signals = make_decoder_signals(stage, 3, num_prunable)
    else:
        signals = make_signals(3, num_prunable, num_protected)
    reduction = stage.reduce(signals, num_kept(stage, num_prunable))
    keep = reduction.keep
    assert keep.dtype == torch.int64
    assert keep.shape == (3, num_kept(stage, num_prunable))
    assert 1 <= keep.shape[1] <= num_prunable
    ascending = keep.sort(dim=1).values
    assert ascending.diff(dim=1).gt(0).all(), "unique"
    assert isinstance(reduction, Merging) or torch.equal(keep, ascending), "only merging may reorder"
    assert keep.min() >= 0 and keep.max() < num_prunable
    if reduction.tokens is not None:
        assert stage in DECODER_STAGES, "elsewhere sums of tokens do"
        assert reduction.tokens.shape == (*keep.shape, signals.tokens.shape[2])
    if isinstance(reduction, Merging):
        check_groups(stage, reduction, signals)


def check_groups(stage: Stage, reduction: Merging, signals: Signals) -> None:
    """Merged tokens are not among those that stay, each is merged once, and into one that stays."""
    keep, merged, into, weights = reduction.keep, reduction.merged, reduction.into, reduction.weights
    num_protected, num_prunable = signals.num_protected, signals.num_prunable
    assert stage.where in get_args(Where)
    assert torch.equal(reduction.rows[:, :num_protected], signals.rows[:, :num_protected]), "these stay in front"
    assert merged.dtype == into.dtype == torch.int64 and merged.shape == into.shape
    named = torch.cat([keep, merged], 1)
    counts = torch.zeros(len(keep), num_prunable).scatter_add(1, named, torch.ones(named.shape))
    assert counts.max() <= 1
    assert counts.min() == 1 or not stage.merges, "a method that keeps sizes loses no token"
    assert into.numel() == 0 or (into.min() >= num_protected and into.max() < num_protected + keep.shape[1])
    if weights is not None:
        assert weights.shape == signals.tokens.shape[:2] and weights.dtype == torch.float32
        assert weights.isfinite().all() and weights.min() >= 0 and weights[:, :num_protected].eq(1).all()


def test_merging_conserves_patches_and_averages(stage: Stage) -> None:
    """Sizes add up to what they were, and a group of equal tokens stays what it is."""
    if not stage.merges:
        return
    signals = signals_for(stage)
    reduction = stage.reduce(signals, stage.num_kept(36))
    merged, sizes = merge_tokens(torch.ones(4, 37, 1), signals.sizes, reduction)
    assert merged.shape == (4, 1 + stage.num_kept(36), 1) and sizes.shape == merged.shape[:2]
    torch.testing.assert_close(sizes.sum(1), signals.sizes.sum(1))
    torch.testing.assert_close(merged, torch.ones_like(merged))


def test_counts_grow_with_the_tokens_that_enter(stage: Stage) -> None:
    counts = [stage.num_kept(n) for n in range(200)]
    assert counts[0] == 0 and counts[1] == 1
    assert all(0 <= b - a <= 1 for a, b in pairwise(counts))


def test_a_batch_is_its_samples_alone(stage: Stage) -> None:
    signals = signals_for(stage)
    n_keep = num_kept(stage, signals.tokens.shape[1] - signals.num_protected)
    together = stage.reduce(signals, n_keep)
    alone = [stage.reduce(select(signals, rows=slice(i, i + 1)), n_keep) for i in range(4)]
    assert torch.equal(together.keep, torch.cat([one.keep for one in alone]))
    for i, one in enumerate(alone):
        for name in ("tokens", "merged", "into", "weights"):
            value = getattr(together, name, None)
            assert (value is None) == (getattr(one, name, None) is None)
            if value is not None:
                torch.testing.assert_close(value[i : i + 1], getattr(one, name))


def test_follows_a_permutation_or_ignores_the_content(stage: Stage) -> None:
    """A method sees tokens as a set; one that goes by position must not look at the content at all.

    The first stays where it is: by some scores all tokens are equal before one is chosen. One that compares frames goes
    by the places in them: these are permuted in all frames alike.
    """
    signals = signals_for(stage)
    num_prunable = signals.tokens.shape[1] - signals.num_protected
    places = torch.arange(num_prunable).view(signals.frames, -1)
    order_in_frame = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(places.shape[1] - 1)])
    permutation = places[:, order_in_frame].flatten()
    order = torch.cat([torch.arange(signals.num_protected), permutation + signals.num_protected])
    reduction = stage.reduce(signals, num_kept(stage, num_prunable))
    keep = reduction.keep
    if reduction.tokens is not None or isinstance(reduction, Merging):
        return  # what is merged into what may go by position
    if isinstance(stage, ZeroTPruneStage) and stage.config.partition == "random":
        return  # it deals tokens out by position
    if signals.columns is not None and not torch.equal(keep, keep_of(stage, replace(signals, columns=1))):
        return  # it looks at neighbours in the image
    if torch.equal(keep, keep_of(stage, signals_for(stage, seed=5))):
        assert torch.equal(keep, keep[:1].expand_as(keep))
    else:
        assert torch.equal(permutation[keep_of(stage, select(signals, order=order))].sort(1).values, keep)


def test_deterministic(stage: Stage) -> None:
    signals = signals_for(stage, 2)
    assert torch.equal(keep_of(stage, signals), keep_of(stage, signals))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_chooses_what_its_float32_copy_does(stage: Stage, dtype: torch.dtype) -> None:
    half = signals_for(stage, 2, dtype=dtype)
    full = mapped(half, torch.Tensor.float)
    assert torch.equal(keep_of(stage, half), keep_of(stage, full))
    reduction = stage.reduce(half, num_kept(stage, half.tokens.shape[1] - half.num_protected))
    if reduction.tokens is not None:
        assert reduction.tokens.dtype == dtype and reduction.tokens.isfinite().all()


def test_identical_tokens_and_zero_vectors_are_survived(stage: Stage) -> None:
    signals = mapped(signals_for(stage, 2), torch.zeros_like)
    num_tokens = signals.tokens.shape[1]
    num_prunable = num_tokens - signals.num_protected
    if signals.attention is not None:
        signals = replace(signals, attention=tuple(torch.full_like(p, 1 / num_tokens) for p in signals.attention))
    for name in ("cls_attention", "received_attention", "earlier_attention"):
        if getattr(signals, name) is not None:
            signals = replace(signals, **{name: torch.full_like(getattr(signals, name), 1 / num_tokens)})
    for name in ("text_attention", "text_scores", "layer_scores"):
        if getattr(signals, name) is not None:
            signals = replace(signals, **{name: torch.zeros_like(getattr(signals, name))})
    reduction = stage.reduce(signals, num_kept(stage, num_prunable))
    keep = reduction.keep
    assert keep.shape == (2, num_kept(stage, num_prunable)) and keep.sort(dim=1).values.diff(dim=1).gt(0).all()
    assert reduction.tokens is None or reduction.tokens.isfinite().all()
    assert getattr(reduction, "weights", None) is None or reduction.weights.isfinite().all()


def test_decisions_never_wait_for_the_device(stage: Stage) -> None:
    """On tensors without data, ``.item()`` and boolean indexing, which wait for a GPU, are errors."""
    signals = signals_for(stage, 2)
    values = {name: getattr(signals, name) for name in TOKEN_AXES if getattr(signals, name) is not None}
    meta = {k: tuple(p.to("meta") for p in v) if isinstance(v, tuple) else v.to("meta") for k, v in values.items()}
    keep = keep_of(stage, replace(signals, **meta))
    assert keep.is_meta and keep.shape == keep_of(stage, signals).shape


def test_a_stage_that_reads_no_tokens_does_not(stage: Stage) -> None:
    """It may then decide before the MLP has made them."""
    if stage.reads_tokens or in_decoder(stage):
        return
    signals = signals_for(stage, 2)
    other = replace(signals, tokens=torch.full_like(signals.tokens, math.nan))
    assert torch.equal(keep_of(stage, signals), keep_of(stage, other))


def test_stages_are_values(stage: Stage) -> None:
    """They travel with the model: equal copies, hashable."""
    copy = pickle.loads(pickle.dumps(stage))
    assert copy == stage and hash(copy) == hash(stage)


def test_keeping_all_is_the_identity(decoder_stage: Stage) -> None:
    """Behind an earlier stage fewer tokens may enter than ``num_kept`` of the original would keep."""
    signals = make_decoder_signals(decoder_stage, 2, 30)
    reduction = decoder_stage.reduce(signals, 30)
    assert torch.equal(reduction.keep, torch.arange(30).expand(2, -1)) and reduction.tokens is None


def test_a_stage_of_a_decoder_asks_for_what_there_is(decoder_stage: Stage) -> None:
    offered = {
        "vision_tower": {"attention", "cls_attention", "received_attention", "queries", "keys", "values"}
        | {"earlier_attention", "tower_features"},
        "entrance": {"text", "text_scores"},
        "after_block": {"text_attention", "text", "text_scores", "keys", "text_keys", "layer_scores"},
    }
    assert decoder_stage.needs <= offered[decoder_stage.where]
    inside = decoder_stage.where == "after_block"
    assert 0 <= decoder_stage.layer < DECODER_SHAPE.depth - 1 if inside else decoder_stage.layer == -1
    assert decoder_stage.positions in ("contiguous", "original")
    assert decoder_stage.newlines == "prune" and decoder_stage.budget in ("image", "sample")
    assert decoder_stage.where != "vision_tower" or decoder_stage.budget == "image"
    assert not decoder_stage.reads_question or decoder_stage.text_rows is not None
    observed = decoder_stage.observes
    assert bool(observed) == ("layer_scores" in decoder_stage.needs)
    assert all(0 <= layer <= decoder_stage.layer for layer in observed) and list(observed) == sorted(set(observed))


def make_transition(batch: int, length: int, seed: int = 0, dtype=torch.float32) -> Transition:
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(batch, length, 24, generator=generator).to(dtype) for _ in range(4)]
    positions = torch.arange(length).expand(batch, -1)
    valid = positions >= torch.arange(batch)[:, None]  # padding in front, more in later samples
    return Transition(*states, valid=valid, image=valid & (positions >= 8) & (positions < length - 6))


def parts(transition: Transition, rows: slice) -> Transition:
    return Transition(**{name: value[rows] for name, value in vars(transition).items()})


def test_what_is_observed_is_of_every_token_and_every_sample_alone(decoder_stage: Stage) -> None:
    if not decoder_stage.observes:
        return
    transition = make_transition(3, 40)
    scores = decoder_stage.observe(transition)
    assert scores.shape == (3, 40) and scores.dtype == torch.float32 and scores.isfinite().all()
    for i in range(3):
        torch.testing.assert_close(decoder_stage.observe(parts(transition, slice(i, i + 1))), scores[i : i + 1])
    other = make_transition(3, 40, seed=1)
    padded = {
        name: torch.where(transition.valid[..., None], value, getattr(other, name))
        for name, value in vars(transition).items()
        if value.is_floating_point()
    }
    seen = transition.valid
    assert torch.equal(decoder_stage.observe(replace(transition, **padded))[seen], scores[seen]), (
        "padding does not count"
    )
    half = make_transition(3, 40, dtype=torch.bfloat16)
    assert decoder_stage.observe(half).dtype == torch.float32
    zero = {name: torch.zeros_like(value) for name, value in vars(transition).items() if value.is_floating_point()}
    assert decoder_stage.observe(replace(transition, **zero)).isfinite().all()


def left_after(config: PruneConfig, shape: Shape) -> int:
    remaining = shape.num_prunable
    for stage in config.stages_for(shape):
        counted = shape.num_prunable if stage.counts_from == "original" else remaining
        remaining = min(remaining, num_kept(stage, counted))
    return remaining


@pytest.mark.parametrize(("name", "kind"), METHODS_AND_KINDS)
def test_strength_scales_what_is_removed(name: str, kind: str) -> None:
    config, shape = get_method(name)(), SHAPES[kind]
    try:
        config.scaled(1.0)
    except NotImplementedError:
        pytest.skip("has counts, not ratios, to scale")

    def left(strength: float) -> int:
        return left_after(config.scaled(strength), shape)

    assert left(0.0) == shape.num_prunable
    if kind == "vision" or config.prunes == {kind}:  # a default for both kinds is scaled as an encoder's
        assert left(1.0) == left_after(config, shape)
    assert left(0.0) > left(0.5) > left(1.0) > left(1.5)


@pytest.mark.parametrize("name", list_methods())
def test_configs_say_what_they_prune_and_survive_a_file(name: str, tmp_path) -> None:
    config = get_method(name)()
    assert config.prunes and config.prunes <= set(SHAPES)
    config.save_pretrained(tmp_path)
    assert PruneConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(("name", "kind"), METHODS_AND_KINDS)
def test_defaults_prune(name: str, kind: str) -> None:
    config, shape = get_method(name)(), SHAPES[kind]
    assert left_after(config, shape) < shape.num_prunable or options(config, shape)
