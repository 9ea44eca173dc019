"""Choosing in towers that make one token of several patches, against loops over images and tokens.

Which patches become a token, no test is told: that is what the gradient of the token's features says.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from hf_tokenprune import PruneStateError, UnsupportedModelError, prune, record, unprune
from hf_tokenprune.adapters import _capture
from hf_tokenprune.adapters._capture import CURRENT, is_captured, received_attention
from hf_tokenprune.engine import counts
from hf_tokenprune.methods.cls_attention import ClsAttentionConfig
from hf_tokenprune.methods.visionzip import VisionZipConfig
from hf_tokenprune.registry import get_adapter
from hf_tokenprune.signals import DecoderShape, Reduction, Signals, Stage

from .decoder_families import FAMILIES, adapter_of, built, run, stages_of, tiny_vlm
from .decoder_prompts import of_images, of_videos, sample
from .decoder_visuals import Inputs, family_of
from .reference_llava_methods import best, naive_visionzip


def shape_of(family: str) -> DecoderShape:
    model = tiny_vlm(family)
    return adapter_of(model).shape(model)


MERGING = [
    family
    for family in FAMILIES
    if not get_adapter(family).tower_grid and shape_of(family).tower_tokens < shape_of(family).tower.num_patches
]
PROMPTS = [
    (family, parts)
    for family in MERGING
    for parts in ("..I.i..", ".V..")
    if set(parts) <= {".", *family_of(built(family)).kinds}
]
WATCHING = "watching"
SEEN: list[tuple[Any, Tensor, Tensor]] = []
"""Of every call of the attention function: the module, probabilities (b, H, T, T) and keys (b, H, T, d) in float64."""


def watching(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    logits = query.double() @ key.double().mT * kwargs["scaling"]
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, -torch.inf)
    weights = logits.softmax(-1)
    SEEN.append((module, weights.detach(), key.double().detach()))
    return (weights @ value.double()).to(value.dtype).transpose(1, 2), None


AttentionInterface.register(WATCHING, watching)
AttentionMaskInterface.register(WATCHING, sdpa_mask)


@dataclass(frozen=True)
class Token:
    """An image token: its image, the patches it is made of, the attention that they draw and what their keys say."""

    image: int
    patches: tuple[int, ...]
    score: float
    metric: Tensor


class Watched:
    """A dense model that has encoded the images, or the videos, of a prompt with its attention watched.

    Attributes:
        features: (N, D) of all image tokens.
        tokens: one for each of them.
        states: (T, W) what the tower gives out for each patch and CLS token, of one image behind the other.
        cls: for each image, the number of its CLS token; empty without one.
        made_in_tower: whether the tower itself makes tokens of its patches.
    """

    def __init__(self, model: PreTrainedModel, inputs: Inputs) -> None:
        adapter = adapter_of(model)
        self.model, self.inputs, self.tower = model, inputs, adapter.tower(model.model)
        has_cls = adapter.shape(model).tower.has_cls
        self.tower.config._attn_implementation = WATCHING
        blocks = next(m for m in self.tower.modules() if isinstance(m, nn.ModuleList))
        scoring = blocks[max(getattr(self.tower.config, "fullatt_block_indexes", [len(blocks) - 1]))]
        outputs: list[Any] = []
        parts = (blocks[-1], self.tower)
        handles = [part.register_forward_hook(lambda module, args, output: outputs.append(output)) for part in parts]
        handles.append(self.tower.register_forward_hook(self.look))
        SEEN.clear()
        self.features = features_of(model, inputs)
        for handle in handles:
            handle.remove()
        last, output = outputs
        self.states = output.last_hidden_state.detach().flatten(0, -2)
        seen = [
            (weights[i], keys[i])
            for module, weights, keys in SEEN
            if module in set(scoring.modules())
            for i in range(len(weights))
        ]
        starts = torch.tensor([0, *(weights.shape[-1] for weights, _ in seen)]).cumsum(0).tolist()
        self.cls = starts[:-1] if has_cls else []
        self.tokens = []
        for feature in self.features:
            (gradient,) = torch.autograd.grad(feature.sum(), last, retain_graph=True)
            patches = gradient.flatten(0, -2).abs().sum(-1).nonzero().flatten().tolist()
            (image,) = {sum(start <= patch for start in starts) - 1 for patch in patches}
            weights, keys = seen[image]
            local = [patch - starts[image] for patch in patches]
            rows = [0] if has_cls else [q for q in range(weights.shape[1]) if weights[:, :, q].any()]  # not of padding
            score = sum(float(weights[h, q, p]) for h in range(len(weights)) for q in rows for p in local) / len(rows)
            metric = sum((keys[h, p] for h in range(len(keys)) for p in local), torch.zeros(())) / len(local)
            self.tokens.append(Token(image, tuple(patches), score, metric))
        self.features = self.features.detach()

    def look(self, module: Any, args: Any, output: Any) -> None:
        self.made_in_tower = output.get("pooler_output") is not None  # later the model puts its features there

    @property
    def images(self) -> list[list[int]]:
        """The numbers of the tokens of each image: of each tile, or frame of a video."""
        number = 1 + max(token.image for token in self.tokens)
        return [[i for i, token in enumerate(self.tokens) if token.image == image] for image in range(number)]

    def visionzip(self, dominant: int, contextual: int) -> dict[int, Tensor]:
        """Features (D,) by number of the tokens that stay, each image for itself."""
        states: dict[int, Tensor] = {}
        for image, members in enumerate(self.images):
            tokens = torch.stack([self.state(i) for i in members])
            scores, metric = ([getattr(self.tokens[i], name) for i in members] for name in ("score", "metric"))
            chosen, targets, merged = naive_visionzip(
                tokens, scores, torch.stack(metric), dominant - bool(self.cls), contextual
            )
            found = {p: tokens[p] for p in chosen} | dict(zip(targets, merged, strict=True))
            if self.cls:  # in the place of the first token that leaves, as if all of its patches were CLS
                patches = len(self.tokens[0].patches)
                found[min(set(range(len(members))) - set(found))] = self.states[self.cls[image]].repeat(patches)
            states |= {members[p]: state for p, state in found.items()}
        return self.projected(states)

    def state(self, token: int) -> Tensor:
        """(W,) what methods see of a token: its feature where the tower makes it, else the states of its patches."""
        return self.features[token] if self.made_in_tower else self.states[list(self.tokens[token].patches)].flatten()

    def projected(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        """Features of tokens of these ``states``, by the model itself."""
        if self.made_in_tower:
            return states
        replaced = torch.zeros_like(self.states)
        for token, state in states.items():
            patches = list(self.tokens[token].patches)
            replaced[patches] = state.to(replaced.dtype).view(len(patches), -1)

        def replace(module: Any, args: Any, output: Any) -> None:
            output.last_hidden_state = replaced.view_as(output.last_hidden_state)

        handle = self.tower.register_forward_hook(replace)
        features = features_of(self.model, self.inputs).detach()
        handle.remove()
        return {token: features[token] for token in states}


def features_of(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """(N, D) of all images, or videos, of a prompt; with a graph."""
    videos = of_videos(inputs)
    encode = model.model.get_video_features if videos else model.model.get_image_features
    return torch.cat(
        [part.flatten(0, -2) for part in encode(**(videos or of_images(inputs)), return_dict=True).pooler_output]
    )


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "parts"), PROMPTS)
def test_visionzip_is_the_naive_loop(family: str, parts: str, implementation: str) -> None:
    """Of every image, tile and frame: dominant tokens are those of the dense model, contextual ones are merged."""
    dense, model = tiny_vlm(family), tiny_vlm(family, attention=implementation)
    inputs = sample(dense, parts)
    expected = Watched(dense, inputs).visionzip(3, 2)
    assert_chosen(prune(model, VisionZipConfig(dominant=3, contextual=2)), inputs, expected)


@pytest.mark.parametrize(
    "family", [name for name in MERGING if adapter_of(built(name)).shape(built(name)).tower.has_cls]
)
def test_cls_attention_is_the_naive_loop(family: str) -> None:
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, "..I.i..")
    watched = Watched(dense, inputs)
    kept = [members[p] for members in watched.images for p in best([watched.tokens[i].score for i in members], 4)]
    expected = {token: watched.features[token] for token in kept}
    assert_chosen(prune(model, ClsAttentionConfig(keep_ratio=4 / 9)), inputs, expected)


def assert_chosen(model: PreTrainedModel, inputs: Inputs, expected: dict[int, Tensor]) -> None:
    """The pruned model's features are the expected ones and else NaN, and these tokens enter the decoder."""
    with torch.no_grad():
        features = features_of(model, inputs)
    left = ~features.isnan().any(1)
    assert left.nonzero().flatten().tolist() == sorted(expected)
    assert features[~left].isnan().all()
    wanted = torch.stack([expected[token].float() for token in sorted(expected)])
    torch.testing.assert_close(features[left], wanted, atol=1e-5, rtol=1e-5)
    with record(model) as rec:
        run(model, inputs)
    assert rec.kept["vision_tower"][0].tolist() == sorted(expected)
    text = inputs["input_ids"].shape[1] - len(features)
    assert rec.tokens[0] == text + len(expected)


@pytest.mark.parametrize(("family", "parts"), PROMPTS)
def test_as_many_stay_as_counted(family: str, parts: str) -> None:
    """Of each image, tile or frame what the cost model and schedules reckon with."""
    model = tiny_vlm(family)
    inputs, shape = sample(model, parts), shape_of(family)
    number = [len(members) for members in Watched(tiny_vlm(family), inputs).images]
    config = VisionZipConfig(dominant=3, contextual=2)
    (stage,) = stages_of(model, config)
    if {shape.tower_tokens} == set(number):  # images of one size
        ((_, entering, left),) = counts((stage,), shape)
        assert (entering, left) == (shape.image_tokens, shape.tower_images * 5)
        assert shape.image_tokens == shape.tower_images * shape.tower_tokens
    else:
        unit = model.config.vision_config.patch_size * model.config.vision_config.spatial_merge_size
        for length in set(number):
            of_size = adapter_of(model).shape(model, (length * unit, unit))
            assert of_size.tower_tokens == length
            assert [left for _, _, left in counts((stage,), of_size)] == [5]
    with record(prune(model, config)) as rec:
        run(model, inputs)
    assert rec.kept["vision_tower"].shape == (1, 5 * len(number))


OF_ANY_SIZE = [family for family in MERGING if family_of(built(family)).typed]


@pytest.mark.parametrize("family", OF_ANY_SIZE)
def test_an_image_that_is_short_enough_keeps_all(family: str) -> None:
    """And a video whose frames are; as long as another image loses something, or alone."""
    dense, model = tiny_vlm(family), tiny_vlm(family)
    prune(model, VisionZipConfig(dominant=4, contextual=2))
    prompts = [".i..", ".I.i."] + [".V.."] * ("V" in family_of(dense).kinds)
    for parts in prompts:
        inputs = sample(dense, parts)
        with torch.no_grad():
            features, stock = features_of(model, inputs), features_of(dense, inputs)
        whole = len(stock) - 24 * parts.count("I")
        torch.testing.assert_close(features[-whole:], stock[-whole:], atol=1e-6, rtol=1e-5)
        assert int(features.isnan().any(1).sum()) == (24 - 6) * parts.count("I")
        logits = run(model, inputs).logits
        if "I" not in parts:
            torch.testing.assert_close(logits, run(dense, inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", MERGING)
def test_features_of_a_dense_model_are_noticed(family: str) -> None:
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, ".I..")
    prune(model, VisionZipConfig(dominant=3, contextual=2))
    with torch.no_grad():
        features = dense.model.get_image_features(**of_images(inputs), return_dict=True)
    rest = {name: tensor for name, tensor in inputs.items() if not name.startswith("pixel")}
    with pytest.raises(PruneStateError, match="the vision tower dropped nothing"):
        run(model, rest, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("family", MERGING)
def test_the_tower_may_be_called_by_itself(family: str) -> None:
    """By position as by name; not for a tuple, in which nothing tells what is what."""
    model = prune(tiny_vlm(family), VisionZipConfig(dominant=3, contextual=2))
    inputs, tower, calls = sample(model, ".I.."), adapter_of(model).tower(model.model), []
    tower.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        features_of(model, inputs)
        ((args, kwargs),) = calls
        grids = {name: value for name, value in kwargs.items() if name == "grid_thw"}
        named = {name: value for name, value in kwargs.items() if name not in grids}
        outputs = tower(*args, **kwargs), tower(*args, *grids.values(), **named)
        for name, expected in outputs[0].items():
            torch.testing.assert_close(outputs[1][name], expected, rtol=0, atol=0, equal_nan=True)
        with pytest.raises(UnsupportedModelError, match="return_dict=True"):
            tower(*args, **{**kwargs, "return_dict": False})
    assert CURRENT.get() is None


# -- what a stage can ask for ------------------------------------------------------------------------------------------


class ReadsMaps(Stage):
    """A stage of somebody else, which wants whole maps of the attention."""

    needs = frozenset({"attention"})  # type: ignore[assignment]

    def num_kept(self, num_prunable: int) -> int:
        return 1

    def reduce(self, signals: Signals, n_keep: int) -> Reduction:
        raise AssertionError


@pytest.mark.parametrize("family", MERGING)
def test_maps_of_patches_are_refused(family: str) -> None:
    model = tiny_vlm(family)
    with pytest.raises(UnsupportedModelError, match=r"ReadsMaps needs attention.*provides: .*received_attention"):
        adapter_of(model).check(model, (ReadsMaps(-1, "vision_tower"),))


def test_a_tower_of_windows_alone_is_refused() -> None:
    model = tiny_vlm("qwen2_5_vl", vision_config={"fullatt_block_indexes": []})
    with pytest.raises(UnsupportedModelError, match=r"fullatt_block_indexes is empty.*divprune"):
        prune(model, VisionZipConfig(dominant=3, contextual=2))
    assert not adapter_of(model).states(model)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("limit", [1, 4 * 19 * 7, 4 * 19 * 19 * 2, 1 << 20])
def test_attention_is_summed_in_pieces(limit: int, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one map, one map, some, all at a time; of padding neither keys nor queries count."""
    monkeypatch.setattr(_capture, "CACHE_BYTES", limit)
    queries, keys = torch.randn(2, 2, 3, 19, 4, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(2, 1, 1, 19)
    bias[1, ..., 15:] = torch.finfo(torch.float32).min
    found = received_attention(queries, keys, 0.5, bias if masked else None)
    for row, length in enumerate([19, 15 if masked else 19]):
        weights = (queries[row, :, :length] @ keys[row, :, :length].mT * 0.5).softmax(-1)
        torch.testing.assert_close(found[row, :, :length], weights.mean(1), atol=1e-6, rtol=1e-5)
        assert not found[row, :, length:].any()


# -- no state is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MERGING)
def test_nothing_is_left_of_a_forward(family: str) -> None:
    """Nor of one that raises; and a dense model is bit for bit what it was."""
    dense, model = tiny_vlm(family), tiny_vlm(family)
    inputs = sample(dense, ".I..")
    prune(model, VisionZipConfig(dominant=3, contextual=2))
    expected = run(model, inputs).logits
    assert CURRENT.get() is None
    blocks = next(m for m in adapter_of(model).tower(model.model).modules() if isinstance(m, nn.ModuleList))
    handle = blocks[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, inputs)
    handle.remove()
    assert CURRENT.get() is None
    assert torch.equal(run(model, inputs).logits, expected)
    assert torch.equal(run(unprune(model), inputs).logits, run(dense, inputs).logits)


def test_two_threads_do_not_mix_their_images() -> None:
    model = prune(tiny_vlm("qwen2_5_vl"), VisionZipConfig(dominant=3, contextual=2))
    prompts = [sample(model, parts, seed) for seed, parts in enumerate([".I..", ".i..", "..I.i..", ".V.."] * 3)]
    alone = [run(model, inputs).logits for inputs in prompts]
    found: dict[int, Tensor] = {}

    def work(own: range) -> None:
        for i in own:
            found[i] = run(model, prompts[i]).logits

    threads = [threading.Thread(target=work, args=(range(first, len(prompts), 3),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], logits) for i, logits in enumerate(alone))


@pytest.mark.parametrize("family", MERGING)
def test_checkpointed_towers_have_the_same_gradients(family: str) -> None:
    """Blocks run once more behind the forward, when nobody captures; they must do what they did."""
    gradients = []
    for checkpointed in (False, True):
        model = prune(tiny_vlm(family), VisionZipConfig(dominant=3, contextual=2)).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        inputs = sample(model, "..I.i..")
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    assert all(gradient.isfinite().all() for gradient in plain.values())
    tower = adapter_of(model).tower_name
    assert any(tower in name and gradient.any() for name, gradient in plain.items())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-5, rtol=1e-4)


def test_unprune_is_exact_whatever_the_config_says_by_then() -> None:
    """The block that scores is the one that the config named when the model was pruned."""
    model = prune(tiny_vlm("llava"), VisionZipConfig(dominant=3, contextual=2))
    model.config.vision_feature_layer = 1
    unprune(model)
    dense = tiny_vlm("llava", vision_feature_layer=1)
    inputs = sample(dense, "..I..")
    assert torch.equal(run(model, inputs).logits, run(dense, inputs).logits)
    assert not any(map(is_captured, model.modules()))
