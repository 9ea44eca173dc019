"""What every registered family of vision encoders owes, with every method for them: exact counts, exact undo, and no
surprises with what people do to models (copy, pickle, checkpoint, compile, offload, save)."""

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, PreTrainedModel, ViTMAEModel

from hf_tokenprune import (
    PruneConfig,
    RandomConfig,
    UnsupportedModelError,
    ZeroTPruneConfig,
    from_pretrained,
    prune,
    pruned,
    record,
    save_pretrained,
    unprune,
)
from hf_tokenprune.adapters._capture import Capture
from hf_tokenprune.config import Where
from hf_tokenprune.engine import options, plan
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.signals import Signals, Stage
from hf_tokenprune.tokens import with_protected

from .families import (
    TINY,
    built,
    first_tensor,
    images,
    inputs_for,
    methods_for,
    model_classes,
    refused,
    snapshot,
    supported_classes,
    takes,
    tiny_model,
)

CLASSES = supported_classes()
FAMILIES = list({family: (family, cls) for family, cls in CLASSES}.values())  # the last class: a classifier, if any
BY_TOWERS = sorted(CLASSES, key=lambda pair: takes(pair[1], "input_ids"))
LARGEST = list({type(get_adapter(family)): (family, cls) for family, cls in BY_TOWERS}.values())
"""One model class for each adapter, which may have several families: with a text tower, if any has one."""
PLACES = get_args(Where)


def configs() -> list[PruneConfig]:
    """The default of every method that drops or merges something, at every place where it can choose."""
    found = []
    for name in methods_for("vision"):
        config = get_method(name)()
        places = get_args(get_type_hints(type(config)).get("where"))
        variants = [replace(config, where=place) for place in places] or [config]
        if hasattr(config, "salience"):  # the one that needs no CLS
            variants.append(replace(config, salience="contrast", exact_last_block=False))
        found += [config for config in variants if plan(config, get_adapter("vit").shape(built(*FAMILIES[-1])))]
    return found


def fits(family: tuple[str, type[PreTrainedModel]], config: PruneConfig) -> bool:
    """Whether the family provides what the method needs; `prune` refuses the others, with a reason."""
    return not refused(built(*family), config)


def kind_of(config: PruneConfig) -> tuple[Any, ...]:
    """What matters to the machinery around a method: where it works, what is captured for it, whether it merges."""
    shape = get_adapter("vit").shape(built(*FAMILIES[-1]))
    stages = plan(config, shape)
    whole = any("attention" in stage.needs for stage in stages)
    return stages[0].where, whole, any(stage.merges for stage in stages), options(config, shape).keys()


CONFIGS = configs()
PAIRS = [(family, config) for family in FAMILIES for config in CONFIGS if fits(family, config)]
KINDS = list({str(kind_of(config)): config for config in CONFIGS}.values())
MECHANICS = [(family, config) for family in LARGEST for config in KINDS if fits(family, config)]


def drops(config: PruneConfig) -> bool:
    """Whether tokens just leave; where they are merged, tests/test_merging_methods.py."""
    return not kind_of(config)[2] and config.method != "evit"


def name_of(pair: Any) -> str:
    family, config = pair
    parts = (config.method, getattr(config, "where", "own place"), getattr(config, "salience", ""))
    return "-".join((family[1].__name__, *filter(None, parts)))


every_pair = pytest.mark.parametrize("pair", PAIRS, ids=name_of)
"""Every family with every method that it supports: tests of what is decided."""
every_kind = pytest.mark.parametrize("pair", MECHANICS, ids=name_of)
"""Every adapter with one method of each kind: tests of what people do to models."""


@pytest.fixture
def family(pair) -> tuple[str, type[PreTrainedModel]]:
    return pair[0]


@pytest.fixture
def config(pair) -> PruneConfig:
    return pair[1]


def run(model: nn.Module, pixels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return first_tensor(call(model, images() if pixels is None else pixels, **kwargs))


def call(model: nn.Module, pixels: torch.Tensor, **kwargs: Any) -> Any:
    return model(**inputs_for(model, pixels), **kwargs)


def states_of(model: PreTrainedModel, **kwargs: Any) -> Any:
    """Output of the part that holds the blocks."""
    adapter = get_adapter(model.config.model_type)
    with torch.no_grad():
        return adapter.encoder(model)(**adapter.image_inputs(model, images()), **kwargs)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    return get_adapter(model.config.model_type).blocks(model)


# -- counts and kept sets --------------------------------------------------------------------------------------------


@every_pair
def test_tokens_leave_as_scheduled(family, config) -> None:
    model = tiny_model(*family)
    shape = get_adapter(family[0]).shape(model)
    by_layer = {stage.layer: stage for stage in plan(config, shape)}
    prune(model, config)
    with record(model) as rec:
        run(model)
    remaining, entering = shape.num_patches, []
    for layer in range(shape.depth):
        entering.append(remaining + shape.num_protected)
        remaining = by_layer[layer].num_kept(remaining) if layer in by_layer else remaining
        if layer in by_layer:
            assert rec.kept[layer].shape == (2, remaining)
    assert list(rec.tokens.values()) == entering
    assert remaining < shape.num_patches, "pruning happened"
    assert set(rec.kept) == {str(layer) for layer in by_layer}


@every_pair
def test_protected_tokens_are_the_first_ones_and_stay(family, config) -> None:
    """Original positions of everything that is left: protected tokens first, then ascending patches. Heads that pool
    patches get all of them back after merging."""
    model = tiny_model(*family)
    adapter = get_adapter(family[0])
    prune(model, config)
    with record(model) as rec:
        states = states_of(model, output_hidden_states=True).hidden_states
    protected, patches = adapter.shape(model).num_protected, adapter.shape(model).num_patches
    restored = isinstance(model, adapter.pooling_heads) and kind_of(config)[2]
    left = patches if restored else rec.kept[list(rec.kept)[-1]].shape[1]
    lengths = [state.shape[1] for state in states]
    assert lengths == [*rec.tokens.values(), left + protected]


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if drops(pair[1])], ids=name_of)
def test_equals_the_dense_model_with_dropped_tokens_masked(family, config) -> None:
    """Removing a token is masking it, as a key, in every later block."""
    dense, model = tiny_model(*family, attention="masked_oracle"), tiny_model(*family)
    prune(model, config)
    with record(model) as rec:
        result = states_of(model).last_hidden_state  # some heads average all patches that are left
    protected = get_adapter(family[0]).shape(model).num_protected
    num_patches = get_adapter(family[0]).shape(model).num_patches
    kept: torch.Tensor | None = None
    for layer, block in enumerate(blocks_of(dense)):
        get_adapter(family[0]).attention(block).allowed = None if kept is None else kept
        if str(layer) in rec.kept:
            kept = torch.zeros(2, num_patches + protected, dtype=torch.bool)
            kept.scatter_(1, with_protected(rec.kept[layer], protected), True)
    expected = states_of(dense).last_hidden_state
    expected = expected[kept].view(2, -1, expected.shape[-1])  # the tokens that are left
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-4)


def masked_oracle(module, query, key, value, attention_mask, scaling=None, **kwargs):
    scores = query @ key.transpose(-1, -2) * scaling
    if module.allowed is not None:
        scores = scores.masked_fill(~module.allowed[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("masked_oracle", masked_oracle)


@every_pair
def test_sdpa_and_eager_keep_the_same(family, config) -> None:
    kept = {}
    for attention in ("sdpa", "eager"):
        model = prune(tiny_model(*family, attention=attention), config)
        with record(model) as rec:
            run(model)
        kept[attention] = rec.kept
    for layer in kept["sdpa"]:
        assert torch.equal(kept["sdpa"][layer], kept["eager"][layer])


@every_pair
def test_a_batch_is_its_samples_alone(family, config) -> None:
    model, pixels = prune(tiny_model(*family), config), images(3)
    alone = torch.cat([run(model, pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(run(model, pixels), alone, atol=1e-5, rtol=1e-4)


@every_kind
def test_a_batch_beyond_the_cache_is_worked_through_in_pieces(family, config, monkeypatch) -> None:
    model, pixels = prune(tiny_model(*family), config), images(5)
    whole = run(model, pixels)
    monkeypatch.setattr("hf_tokenprune.adapters._capture.CACHE_BYTES", 2 * 4 * 4 * 70**2)  # two samples
    torch.testing.assert_close(run(model, pixels), whole, atol=1e-6, rtol=1e-5)


# -- nothing is lost -------------------------------------------------------------------------------------------------


class KeepAll(Stage):
    """A stage that asks for everything a family offers and drops nothing."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention", "queries", "keys", "values"})

    def num_kept(self, num_prunable: int) -> int:
        return num_prunable

    def reduce(self, signals: Signals, n_keep: int):
        raise AssertionError("nothing is to be decided where everything stays")


@pytest.mark.parametrize("family", CLASSES, ids=lambda pair: pair[1].__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("where", PLACES)
def test_keep_all_is_bit_identical(family, where: str, attention: str) -> None:
    model = tiny_model(*family, attention=attention)
    dense = run(model)
    adapter = get_adapter(family[0])
    adapter.attach(model, tuple(KeepAll(layer, where) for layer in range(TINY["num_hidden_layers"])))
    assert len(adapter.pruned_blocks(model)) == TINY["num_hidden_layers"]
    assert torch.equal(run(model), dense)


@pytest.mark.parametrize("family", CLASSES, ids=lambda pair: pair[1].__name__)
def test_block_halves_are_the_block_bit_for_bit(family) -> None:
    model = tiny_model(*family)
    adapter = get_adapter(family[0])
    states = torch.randn(2, 9, TINY["hidden_size"])
    with torch.no_grad():
        stock = [block(states, **adapter.block_class.no_mask) for block in blocks_of(model)]
        adapter.attach(model, (KeepAll(0, "mid_block"),))
        halves = [block.mlp_half(block.attention_half(states)) for block in blocks_of(model)]
    assert all(torch.equal(a, b) for a, b in zip(stock, halves, strict=True))


@every_pair
def test_unprune_is_exact(family, config) -> None:
    model = tiny_model(*family)
    dense, before = run(model), snapshot(model)
    prune(model, config)
    assert not torch.equal(run(model), dense) or run(model).shape != dense.shape
    unprune(model)
    assert snapshot(model) == before
    assert torch.equal(run(model), dense)


@every_kind
def test_unprune_is_exact_after_an_exception(family, config) -> None:
    model = tiny_model(*family)
    dense, before = run(model), snapshot(model)
    with pytest.raises(RuntimeError, match="boom"), pruned(model, config), record(model):
        handle = blocks_of(model)[-1].register_forward_pre_hook(boom)
        try:
            run(model)
        finally:
            handle.remove()
    assert snapshot(model) == before
    assert torch.equal(run(model), dense)


def boom(*_: Any) -> None:
    raise RuntimeError("boom")


@every_kind
def test_weights_class_and_architecture_stay(family, config, tmp_path) -> None:
    model = tiny_model(*family)
    before, kind = {k: v.clone() for k, v in model.state_dict().items()}, type(model)
    assert prune(model, config) is model
    assert type(model) is kind
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).architectures == [kind.__name__]


# -- copies ----------------------------------------------------------------------------------------------------------


@every_kind
def test_deepcopy(family, config) -> None:
    model = tiny_model(*family)
    dense = run(model)
    result = run(prune(model, config))
    clone = copy.deepcopy(model)
    assert torch.equal(run(clone), result)
    assert torch.equal(run(unprune(clone)), dense)
    assert torch.equal(run(model), result), "the original is still pruned"
    assert torch.equal(run(unprune(model)), dense)


@every_kind
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle(family, config, how: str) -> None:
    model = tiny_model(*family)
    dense = run(model)
    result = run(prune(model, config))
    if how == "pickle":
        clone = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)
    assert torch.equal(run(clone), result)
    assert torch.equal(run(unprune(clone)), dense)


@every_pair
def test_save_and_load(family, config, tmp_path) -> None:
    model = prune(tiny_model(*family), config)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(run(loaded), run(model))


# -- what people do to models ----------------------------------------------------------------------------------------


@every_kind
def test_gradient_checkpointing(family, config) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = prune(tiny_model(*family), config).train()
        calls = [0] * len(blocks_of(model))
        for layer, block in enumerate(blocks_of(model)):
            norm = [module for module in block.modules() if isinstance(module, nn.LayerNorm)][-1]  # of the MLP
            norm.register_forward_hook(count(calls, layer))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first_tensor(call(model, images())).square().sum().backward()
        assert calls == [2 if checkpointing else 1] * len(calls), "every block is run again, pruned ones too"
        assert all(p.grad is not None for p in blocks_of(model)[0].parameters())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def count(calls: list[int], layer: int):
    def hook(*_: Any) -> None:
        calls[layer] += 1

    return hook


@pytest.mark.slow
@every_kind
def test_compiles_as_one_graph(family, config) -> None:
    model = prune(tiny_model(*family, num_hidden_layers=3), config)  # every layer is traced, which takes its time
    expected = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        result = first_tensor(compiled(**inputs_for(model, images())))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


@every_pair
def test_bfloat16(family, config) -> None:
    model = prune(tiny_model(*family).to(torch.bfloat16), config)
    with record(model) as rec:
        result = run(model, images().to(torch.bfloat16))
    assert result.dtype == torch.bfloat16 and result.isfinite().all()
    assert rec.tokens[TINY["num_hidden_layers"] - 1] < rec.tokens[0]


@every_pair
@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_scores_are_made_in_float32(family, config, precision: str, monkeypatch) -> None:
    """What a method reads of attention is the softmax in float32 of the queries and keys that the layer used."""
    watched: list[tuple[Capture, Signals]] = []
    stock_store, stock_signals = Capture.store, Capture.signals
    used: dict[Capture, tuple[torch.Tensor, torch.Tensor, float]] = {}

    def store(self: Capture, queries, keys, values, scaling, needs=None) -> None:
        used[self] = queries, keys, scaling
        stock_store(self, queries, keys, values, scaling, needs)

    def signals(self: Capture, *args: Any) -> Signals:
        watched.append((self, stock_signals(self, *args)))
        return watched[-1][1]

    monkeypatch.setattr(Capture, "store", store)
    monkeypatch.setattr(Capture, "signals", signals)
    model, pixels = prune(tiny_model(*family), config), images()
    if precision == "bfloat16":
        model, pixels = model.to(torch.bfloat16), pixels.to(torch.bfloat16)
    with record(model) as rec, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
        assert run(model, pixels).isfinite().all()
    assert rec.tokens[TINY["num_hidden_layers"] - 1] < rec.tokens[0] and watched
    for capture, signal in watched:
        if capture not in used:  # nothing of the attention is read
            continue
        queries, keys, scaling = used[capture]
        assert queries.dtype == torch.bfloat16
        logits = queries.float() @ keys.float().mT * scaling
        expected = (logits if capture.bias is None else logits + capture.bias).softmax(-1)
        if signal.attention is not None:
            torch.testing.assert_close(torch.cat(signal.attention), expected, atol=1e-6, rtol=1e-5)
        if signal.cls_attention is not None:
            torch.testing.assert_close(signal.cls_attention, expected[:, :, 0], atol=1e-6, rtol=1e-5)


@every_pair
def test_other_image_sizes(family, config) -> None:
    model = prune(tiny_model(*family), config)
    shape = get_adapter(family[0]).shape(model)
    with record(model) as rec:
        result = run(model, torch.randn(2, 3, 48, 64))
    assert result.isfinite().all()
    assert rec.tokens[0] == 12 * 16 + shape.num_protected
    remaining = 12 * 16
    for stage in plan(config, shape):
        remaining = stage.num_kept(remaining)
        assert rec.kept[stage.layer].shape[1] == remaining


@every_kind
def test_training_mode_prunes_and_learns(family, config) -> None:
    model = prune(tiny_model(*family, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), config).train()
    first_tensor(call(model, images())).square().sum().backward()
    grads = [p.grad for p in blocks_of(model)[0].parameters()]
    assert grads and all(g is not None and g.isfinite().all() for g in grads)


# -- inputs that are not all images of one size ----------------------------------------------------------------------

PADDABLE = [
    (family, cls) for family in dict(CLASSES) for cls in model_classes(family) if takes(cls, "pixel_attention_mask")
]


@pytest.mark.parametrize("family", PADDABLE, ids=lambda pair: pair[1].__name__)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_images_are_refused_and_run_without_their_padding(family, attention: str) -> None:
    """Images of several numbers of patches in a batch: the mask says where the shorter ones end."""
    model = tiny_model(*family, attention=attention)
    inputs = inputs_for(model, images())
    inputs["spatial_shapes"][1, 0] = 4
    inputs["pixel_attention_mask"][1, 32:] = 0
    alone = {name: value if name == "input_ids" else value[1:] for name, value in inputs.items()}
    alone |= {name: alone[name][:, :32] for name in ("pixel_values", "pixel_attention_mask")}
    prune(model, RandomConfig(keep_ratios=0.5, restore=True))  # which the head that averages needs
    with pytest.raises(UnsupportedModelError, match=r"padding.*unprune\(model\)"):
        model(**inputs)
    with record(model) as rec, torch.no_grad():
        model(**alone)
    assert rec.tokens[0] == 32 and rec.tokens[TINY["num_hidden_layers"] - 1] < 32


@pytest.mark.slow
def test_padded_images_are_refused_where_values_are_not_known_yet() -> None:
    model = tiny_model(*PADDABLE[-1])
    inputs = inputs_for(model, images())
    prune(model, RandomConfig(keep_ratios=0.5, restore=True))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(**inputs)
        inputs["pixel_attention_mask"][1, 32:] = 0
        with pytest.raises(RuntimeError, match="padding"):
            compiled(**inputs)


def test_positional_arguments_of_vit_mae_go_on() -> None:
    """Its pruned encoder adds one between them, the order of the patches."""
    model, pixels = prune(tiny_model("vit_mae", ViTMAEModel), ZeroTPruneConfig()), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        named = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        assert torch.equal(model(pixels, None, True).last_hidden_state, named)


# -- accelerate ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("order", ["hooks, then prune", "prune, then hooks"])
def test_accelerate_hooks(family, config, order: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    assert accelerate

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model = tiny_model(*family)
    dense = run(model)
    expected = run(prune(copy.deepcopy(model), config))
    hooks = [Counting() for _ in blocks_of(model)]
    steps = [
        lambda: [add_hook_to_module(b, h) for b, h in zip(blocks_of(model), hooks, strict=True)],
        lambda: prune(model, config),
    ]
    for step in steps if order.startswith("hooks") else reversed(steps):
        step()
    assert torch.equal(run(model), expected)
    assert [hook.calls for hook in hooks] == [1] * len(hooks)
    unprune(model)
    assert torch.equal(run(model), dense)
    assert [hook.calls for hook in hooks] == [2] * len(hooks)
    prune(model, config)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(run(model), expected), "still pruned when accelerate is gone"
    assert torch.equal(run(unprune(model)), dense)
    assert torch.equal(run(prune(model, config)), expected), "and prunes again"


def offload(model: nn.Module, kind: str, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def offloads(family: tuple[str, type[PreTrainedModel]]) -> bool:
    """Whether accelerate can offload the stock model: its hooks do not reach into nn.MultiheadAttention."""
    return not any(isinstance(module, nn.MultiheadAttention) for module in tiny_model(*family).modules())


@pytest.mark.parametrize("pair", [pair for pair in MECHANICS if offloads(pair[0])], ids=name_of)
@pytest.mark.parametrize("order", ["offload, then prune", "prune, then offload"])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offload(family, config, order: str, kind: str, tmp_path) -> None:
    model = tiny_model(*family)
    expected = run(prune(copy.deepcopy(model), config))
    steps = [lambda: offload(model, kind, tmp_path), lambda: prune(model, config)]
    for step in steps if order.startswith("offload") else reversed(steps):
        step()
    assert next(blocks_of(model)[-1].parameters()).device.type == "meta", "the weights are not there"
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize("family", [family for family in LARGEST if not offloads(family)], ids=lambda pair: pair[0])
def test_stock_models_that_accelerate_cannot_offload(family, tmp_path) -> None:
    """If this fails, test_offload can have them too."""
    offload(dense := tiny_model(*family), "cpu", tmp_path)
    with pytest.raises(RuntimeError, match="meta"):
        run(dense)


# -- a real accelerator ----------------------------------------------------------------------------------------------


@every_pair
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu(family, config, dtype: torch.dtype) -> None:
    """Counts on CUDA in every precision; in float32 the same sets as on the CPU."""
    model = prune(tiny_model(*family), config)
    with record(model) as on_cpu:
        run(model)
    model.to("cuda", dtype)
    with record(model) as on_gpu:
        result = run(model, images().to("cuda", dtype))
    assert result.isfinite().all()
    assert list(on_gpu.tokens.values()) == list(on_cpu.tokens.values())
    if dtype == torch.float32:
        for layer in on_cpu.kept:
            assert torch.equal(on_gpu.kept[layer].cpu(), on_cpu.kept[layer])
