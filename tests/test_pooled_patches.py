"""Merging in front of heads that read all patches: merging equal tokens must cost nothing but rounding."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    PreTrainedModel,
    VisionEncoderDecoderModel,
    ViTModel,
)

from hf_tokenprune import PruneConfig, prune, pruned, unprune
from hf_tokenprune.adapters.vision._carry import Carry
from hf_tokenprune.cost import cost
from hf_tokenprune.engine import plan
from hf_tokenprune.registry import get_adapter
from hf_tokenprune.signals import Merging, Reduction

from .families import inputs_for, methods_for, refused, supported_classes, takes, tiny_model

CLASSES = supported_classes()


def merging() -> list[PruneConfig]:
    """Every method that keeps sizes, merging few enough tokens for all merged ones to be flat background."""
    shape = get_adapter("vit").shape(tiny_model("vit", ViTModel))
    found = []
    for name in methods_for("vision"):
        fields = {"salience_merge": {"r": 5, "salience": "contrast", "exact_last_block": False}}
        config = PruneConfig.for_method(name, **fields.get(name, {"r": 5} if name == "tome" else {}))
        if name != "exact" and any(stage.merges for stage in plan(config, shape)):
            found.append(config)
    return found


def flat_but_for_a_corner() -> Tensor:
    pixels = torch.full((2, 3, 32, 32), 0.3)
    pixels[:, :, :12, :12] += 2 * torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    return pixels


def without_positions(model: PreTrainedModel) -> Any:
    """So that equal patches are equal tokens."""
    for name, parameter in model.named_parameters():
        if "position_emb" in name and "text" not in name:
            parameter.data.zero_()
    return model


def pooled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Everything that a model says of whole images."""
    inputs = inputs_for(model, flat_but_for_a_corner())
    names = ("logits", "logits_per_image", "image_embeds", "pooler_output", "cls_logits")
    with torch.no_grad():
        output = model(**inputs)
        found = {name: output[name] for name in names if output.get(name) is not None}
        if hasattr(model, "get_image_features"):
            takes_also = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
            features: Any = model.get_image_features(**takes_also)
            found["features"] = getattr(features, "pooler_output", features)
    return found


@pytest.mark.parametrize("family", CLASSES, ids=lambda pair: pair[1].__name__)
@pytest.mark.parametrize("config", merging(), ids=lambda config: config.method)
def test_merging_equal_tokens_changes_no_head(family: Any, config: PruneConfig) -> None:
    model = without_positions(tiny_model(*family))
    if refused(model, config):
        pytest.skip("this family lacks what the method needs")
    dense = pooled(model)
    if not dense:
        pytest.skip("it says nothing of whole images")
    with pruned(model, config):
        found = pooled(model)
    for name, expected in dense.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    again = pooled(model)
    assert all(torch.equal(again[name], expected) for name, expected in dense.items())


def test_cross_attention_reads_restored_patches() -> None:
    """A decoder that attends to the encoder's states knows no sizes; restore=True is what it needs."""
    encoder = without_positions(tiny_model("vit", ViTModel))
    text = BertConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(text)).eval()
    inputs = {"pixel_values": flat_but_for_a_corner(), "decoder_input_ids": torch.tensor([[1, 2, 3]] * 2)}
    with torch.no_grad():
        dense = model(**inputs).logits
        prune(model.encoder, PruneConfig.for_method("tome", r=5, restore=True))
        torch.testing.assert_close(model(**inputs).logits, dense, rtol=1e-4, atol=2e-5)
        assert torch.equal((unprune(model.encoder), model(**inputs).logits)[1], dense)


@pytest.mark.parametrize("kinds", list(product(("merge", "drop", "both"), repeat=3)), ids="-".join)
def test_a_patch_gets_the_state_of_who_stands_for_it_or_its_own_last_one(kinds: tuple[str, ...]) -> None:
    """Through three blocks in which tokens are merged, leave, or both; beside a loop over patches."""
    batch, tokens, protected, width = 2, torch.randn(2, 1 + 12, 3), 1, 3
    carry = Carry(exact=False)
    owner: list[list[int | None]] = [list(range(12)) for _ in range(batch)]
    last = torch.zeros(batch, 12, width)
    for layer, kind in enumerate(kinds):
        count = tokens.shape[1] - protected
        order = torch.rand(batch, count).argsort(1)
        n_keep, left = count - 3, {"merge": count, "drop": count - 3, "both": count - 1}[kind]
        keep, merged = order[:, :n_keep].sort(dim=1).values, order[:, n_keep:left]
        into = torch.randint(n_keep, merged.shape)
        first = torch.tensor([[0], [protected + count]])  # row of each sample's first token
        zeros = torch.zeros(batch, protected, dtype=torch.int64)
        rows = torch.cat([zeros, protected + torch.cat([keep, merged], dim=1)], dim=1) + first
        merging = Merging(rows, protected + into, first, protected)
        carry.on_block(layer)
        carry.remember(layer, Reduction(keep) if kind == "drop" else merging, tokens, protected)
        for b, patch in product(range(batch), range(12)):
            place = owner[b][patch]
            if place is None:
                continue
            stands = dict(zip(merged[b].tolist(), into[b].tolist(), strict=True))
            stands |= {position: i for i, position in enumerate(keep[b].tolist())}
            owner[b][patch] = stands.get(place)
            if place not in stands:
                last[b, patch] = tokens[b, protected + place]
        tokens = torch.randn(batch, protected + n_keep, width)
    found = carry.restored(len(kinds) - 1, tokens, protected)
    assert torch.equal(found[:, :protected], tokens[:, :protected])
    for b, patch in product(range(batch), range(12)):
        place = owner[b][patch]
        expected = last[b, patch] if place is None else tokens[b, protected + place]
        assert torch.equal(found[b, protected + patch], expected)


def test_the_work_of_a_pooling_head_is_counted_for_all_patches() -> None:
    heads = [pair for pair in CLASSES if pair[0] == "siglip_vision_model" and takes(pair[1], "pixel_values")]
    model = prune(tiny_model(*heads[0]), PruneConfig.for_method("tome", r=5))
    assert cost(model).pruned.head == cost(model).dense.head
