"""What `prune` refuses or reads of the attention holds when the attention changes, or is read twice, afterwards."""

from typing import Any

import pytest
import torch

from hf_tokenprune import (
    PruneConfig,
    ToMeConfig,
    UnsupportedModelError,
    prune,
    record,
    unprune,
)
from hf_tokenprune.engine import plan
from hf_tokenprune.registry import get_adapter

from .decoder_families import CASES, Case, places, tiny_vlm
from .families import first_tensor, images, inputs_for, methods_for, refused, supported_classes, tiny_model

FAMILIES = list({family: (family, cls) for family, cls in supported_classes()}.values())
CONFIGS = [
    PruneConfig.for_method(name, **({"exact_last_block": False} if name == "salience_merge" else {}))
    for name in methods_for("vision")
    if name != "exact"
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda pair: pair[0])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_attention_that_changes_after_prune_is_followed_or_refused(family: Any, config: PruneConfig) -> None:
    model = tiny_model(*family)
    if refused(model, config):
        pytest.skip("this family lacks what the method needs")
    proportional = any(stage.proportional for stage in plan(config, get_adapter(family[0]).shape(model)))
    prune(model, config)
    inputs, encoder = inputs_for(model, images()), get_adapter(family[0]).encoder(model)
    with torch.no_grad():
        fused = first_tensor(model(**inputs))
        model.set_attn_implementation("eager")
        if getattr(config, "where", "") != "queries":
            tower_inputs = get_adapter(family[0]).image_inputs(model, images())
            assert all(each is not None for each in encoder(**tower_inputs, output_attentions=True).attentions)
        torch.testing.assert_close(first_tensor(model(**inputs)), fused, atol=1e-5, rtol=1e-4)
        if proportional and encoder._supports_flex_attn:
            model.set_attn_implementation("flex_attention")
            with pytest.raises(UnsupportedModelError, match="'flex_attention' takes no bias for the sizes"):
                model(**inputs)
        model.set_attn_implementation("sdpa")
        assert torch.equal(first_tensor(model(**inputs)), fused)


@pytest.mark.parametrize("case", [case for case in CASES if "vision_tower" in places(case)], ids=str)
def test_a_tower_is_not_read_by_two_methods(case: Case) -> None:
    merged = ToMeConfig(r=2, restore=True)
    model = tiny_vlm("llava")
    config = case.config(model)
    prune(model.model.vision_tower, merged)
    with pytest.raises(UnsupportedModelError, match=r"the vision tower is pruned itself.*divprune"):
        prune(model, config)
    unprune(model.model.vision_tower)
    prune(model, config)
    with pytest.raises(UnsupportedModelError, match=r"(block \d|encoder) is read by the method that prunes"):
        prune(model.model.vision_tower, merged)
    unprune(model)
    with record(prune(model.model.vision_tower, merged)) as rec, torch.no_grad():
        model.model.vision_tower(images(1, model.config.vision_config.image_size))
    assert rec.tokens[2] < rec.tokens[0], "and either alone works again"
