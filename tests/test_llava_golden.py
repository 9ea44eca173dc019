"""The official TransPrune code, end to end on a toy decoder, against a stock LLaVA model that is pruned: what it kept,
what its cache held, its logits, and what it generated (golden/README.md, ``e2e_*``)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_tokenprune import TransPruneConfig, prune, record, unprune
from hf_tokenprune.adapters.decoder._cache import CACHE_NAME

from .decoder_families import lengths

IMAGE, NUM_IMAGE = 96, 16
POSITION = 5  # of the first image token
CONFIG = TransPruneConfig(accumulate_layers=(1, 2, 3), layers=(1, 3), keep_ratios=(0.5, 0.25))


@dataclass
class GivenFeatures:
    """``get_image_features`` that returns the vectors of the golden run; generate looks at its parameters."""

    features: Tensor

    def __call__(self, pixel_values: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.features, pooler_output=list(self.features))


@dataclass
class Golden:
    model: LlavaForConditionalGeneration
    inputs: dict[str, Tensor]
    values: dict[str, Tensor]


@pytest.fixture(params=["sdpa", "eager"])
def golden(request: pytest.FixtureRequest, shared: Path) -> Golden:
    with np.load(shared / "golden" / "llava_methods.npz") as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith("e2e_")}
    text = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    config._attn_implementation = request.param
    model = LlavaForConditionalGeneration(config).eval()
    weights = {name.split("::")[1]: value for name, value in values.items() if "::" in name}
    own = {
        f"model.language_model.{key.removeprefix('model.')}" if key.startswith("model.") else key: value
        for key, value in weights.items()
    }
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and not [key for key in missing if "language_model" in key or "lm_head" in key]
    model.model.get_image_features = GivenFeatures(values["e2e_vis"].float())
    text_ids = values["e2e_text_ids"].long()
    placeholders = torch.full((1, NUM_IMAGE), IMAGE)
    ids = torch.cat([text_ids[:, :POSITION], placeholders, text_ids[:, POSITION:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 16, 16)}
    return Golden(model, inputs, values)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_prefill_is_the_official_one(golden: Golden) -> None:
    """Which image tokens stay at each stage, keys in each layer, last states and logits of all tokens that are left."""
    values = golden.values
    prune(golden.model, CONFIG)
    with record(golden.model) as rec, torch.no_grad():
        output = golden.model(**golden.inputs, use_cache=True, output_hidden_states=True)
    first = values["e2e_keep0"].long().flatten()  # positions within all 28 tokens
    second = first[values["e2e_keep1"].long().flatten()]
    assert second.equal(values["e2e_abs_kept"].long().flatten())
    for name, expected in (("1", first), ("3", second)):
        image = expected[(expected >= POSITION) & (expected < POSITION + NUM_IMAGE)] - POSITION
        assert rec.kept[name].tolist() == [image.tolist()]
    assert lengths(output[CACHE_NAME]) == values["e2e_kvlens"].flatten().tolist()
    close(output.hidden_states[-1][:, second], values["e2e_hidden"].float())
    close(output.logits[:, second], values["e2e_logits"].float())


def test_generate_gives_the_official_tokens(golden: Golden) -> None:
    """Stock greedy generate() with its cache: tokens, logits of every step, and the keys that each layer holds."""
    values = golden.values
    prune(golden.model, CONFIG)
    tokens = values["e2e_tokens"].long().flatten()
    output = golden.model.generate(
        **golden.inputs,
        max_new_tokens=len(tokens),
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.sequences[0, -len(tokens) :].equal(tokens)
    expected = torch.cat([values["e2e_logits"][:, -1], values["e2e_decode_logits"][0]])[: len(tokens)]
    close(torch.cat(output.logits), expected.float())
    fed = len(tokens) - 1  # the last one was never fed
    assert lengths(output[CACHE_NAME]) == [n + fed for n in values["e2e_kvlens"].flatten().tolist()]


def test_the_dense_model_is_another_one(golden: Golden) -> None:
    """So the agreement above is not that of models that nothing was pruned of."""
    prune(golden.model, CONFIG)
    unprune(golden.model)
    with torch.no_grad():
        logits = golden.model(**golden.inputs).logits
    kept = golden.values["e2e_abs_kept"].long().flatten()
    assert (logits[:, kept] - golden.values["e2e_logits"]).abs().max() > 1e-2
