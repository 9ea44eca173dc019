"""Encoders that images alone are not enough for, or that move them: ViT-MAE, SigLIP 2, two towers."""

from typing import Any

import pytest
import torch
from transformers import CLIPModel, Siglip2VisionModel, ViTMAEModel

from hf_tokenprune import UniformConfig, UnsupportedModelError, prune, record, unprune

from .families import images, inputs_for, snapshot, tiny_model

CONFIG = UniformConfig(layers=(2, 5), keep_ratios=0.5)
NUM_PATCHES = 64


def states(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def test_vit_mae_keeps_patches_where_they_are() -> None:
    """The stock encoder shuffles them even with mask_ratio = 0, and positions would mean nothing."""
    model = tiny_model("vit_mae", ViTMAEModel)
    assert not torch.equal(states(model, pixel_values=images()), states(model, pixel_values=images()))
    prune(model, CONFIG)
    found = states(model, pixel_values=images())
    assert torch.equal(found, states(model, pixel_values=images()))
    ascending = torch.linspace(0, 1, NUM_PATCHES).expand(2, -1)
    assert torch.equal(found, states(model, pixel_values=images(), noise=ascending))
    with torch.no_grad():
        assert torch.equal(found, model(images()).last_hidden_state), "positional arguments"
    with pytest.raises(UnsupportedModelError, match="noise shuffles the patches; leave it out"):
        states(model, pixel_values=images(), noise=ascending.flip(1))
    unprune(model)
    assert not torch.equal(states(model, pixel_values=images()), states(model, pixel_values=images()))


def test_vit_mae_that_masks_is_refused() -> None:
    model = tiny_model("vit_mae", ViTMAEModel)
    model.config.mask_ratio = 0.75
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"mask_ratio=0.75.*set model.config.mask_ratio = 0"):
        prune(model, CONFIG)
    assert snapshot(model) == before


def test_vit_mae_that_masks_later_is_refused() -> None:
    model = tiny_model("vit_mae", ViTMAEModel)
    expected = states(prune(model, CONFIG), pixel_values=images())
    model.config.mask_ratio = 0.75
    with pytest.raises(UnsupportedModelError, match=r"mask_ratio=0.75.*set model.config.mask_ratio = 0"):
        states(model, pixel_values=images())
    model.config.mask_ratio = 0.0
    assert torch.equal(states(model, pixel_values=images()), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_siglip2_with_a_mask_that_masks_nothing(attention: str) -> None:
    """It is left out, as the result without it shows; the head would compare it with all patches."""
    model = prune(tiny_model("siglip2_vision_model", Siglip2VisionModel, attention=attention), CONFIG)
    inputs = inputs_for(model, images())
    whole = states(model, **inputs)
    assert torch.equal(whole, states(model, **{**inputs, "pixel_attention_mask": None}))
    assert whole.shape[1] < NUM_PATCHES


def test_siglip2_with_padding_is_refused_and_nothing_is_lost() -> None:
    model = tiny_model("siglip2_vision_model", Siglip2VisionModel)
    inputs = inputs_for(model, images())
    padded = {**inputs, "pixel_attention_mask": inputs["pixel_attention_mask"].clone()}
    padded["pixel_attention_mask"][1, -8:] = 0
    padded["spatial_shapes"] = torch.tensor([[8, 8], [7, 8]])
    dense = states(model, **padded)
    prune(model, CONFIG)
    with pytest.raises(UnsupportedModelError, match=r"has padding.*max_num_patches.*unprune\(model\)"):
        states(model, **padded)
    assert states(model, **inputs).isfinite().all()
    assert torch.equal(states(unprune(model), **padded), dense)


def test_the_text_tower_is_left_alone() -> None:
    model = tiny_model("clip", CLIPModel)
    inputs = inputs_for(model, images())
    with torch.no_grad():
        dense = model(**inputs)
        prune(model, CONFIG)
        with record(model) as rec:
            pruned = model(**inputs)
    assert torch.equal(pruned.text_embeds, dense.text_embeds)
    assert not torch.equal(pruned.image_embeds, dense.image_embeds)
    assert pruned.vision_model_output.last_hidden_state.shape[1] == rec.kept["5"].shape[1] + 1
