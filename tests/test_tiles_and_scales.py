"""What single families owe beside the contract: how images are cut into tiles; queries that positions scale."""

import pytest
import torch

from hf_tokenprune import DivPruneConfig, prune, record
from hf_tokenprune.errors import UnsupportedModelError

from .decoder_families import Case, adapter_of, collate, run, sample, stages_of, tiny_vlm
from .reference_decoder import reference

SIZES = [(24, 24), (48, 48), (30, 70), (70, 30), (100, 640), (480, 640), (1000, 400)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_internvl_is_cut_as_its_processor_cuts(size) -> None:
    module = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    processor = module.GotOcr2ImageProcessorPil(crop_to_patches=True, size={"height": 24, "width": 24})
    model = tiny_vlm("internvl")
    tiles = processor.get_number_of_image_patches(*size)
    assert adapter_of(model).image_tokens(model, size) == (tiles, tiles * 9, 0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
def test_idefics3_is_cut_as_its_processor_cuts(family, size) -> None:
    module = pytest.importorskip("transformers.models.idefics3.image_processing_pil_idefics3")
    model = tiny_vlm(family)
    tiles, *_ = module.Idefics3ImageProcessorPil().get_number_of_image_patches(*size)
    assert adapter_of(model).image_tokens(model, size) == (tiles, tiles * 9, 0)


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "idefics3"])
@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_tiles_of_an_image_share_its_budget(family, given) -> None:
    """A ratio is of the whole image, and tiles differ in how many tokens they keep."""
    model = tiny_vlm(family)
    inputs = sample(model, "..iI.I..")
    config = DivPruneConfig(keep_ratio=0.3)
    (stage,) = stages_of(model, config)
    prune(model, config)
    if given == "inputs_embeds":
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with record(model) as rec:
        run(model, inputs)
    tiles = 3 if family == "internvl" else 5
    in_tile = (rec.kept["entrance"][0] // 9).bincount(minlength=1 + 2 * tiles)
    of_images = [int(part.sum()) for part in in_tile.split([1, tiles, tiles])]
    assert of_images == [stage.num_kept(9), stage.num_kept(9 * tiles), stage.num_kept(9 * tiles)]
    assert len(set(in_tile[1:].tolist())) > 1


# -- Ministral 3 -----------------------------------------------------------------------------------------------------

SCALED = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "max_position_embeddings": 1024,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 2.0,
}
"""Queries behind position 7 are scaled, by 2.4 and more."""


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("case", [Case("divprune"), Case("fastv"), Case("pyramiddrop")], ids=str)
def test_queries_are_scaled_by_the_positions_tokens_have(case: Case, positions) -> None:
    dense = tiny_vlm("mistral3", "ministral3", text_config={"rope_parameters": SCALED})
    model = tiny_vlm("mistral3", "ministral3", text_config={"rope_parameters": SCALED})
    config = case.config(model, positions=positions)
    prune(model, config)
    samples = [sample(model, parts, seed) for seed, parts in enumerate(["..I...", ".I.i..", ".i......"])]
    with record(model) as rec:
        tokens = model.generate(**collate(samples), max_new_tokens=4, do_sample=False)[:, -4:]
    for row, inputs in enumerate(samples):
        told = reference(dense, inputs, stages_of(model, config), rec, row)
        assert tokens[row].tolist() == told.generate(4)[0]
        with record(model) as alone:
            logits = run(model, inputs).logits[0]
        expected = reference(dense, inputs, stages_of(model, config), alone).forward()
        torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layer", [0, 3])
def test_scores_read_scaled_queries(layer) -> None:
    """The attention that methods read is the one that the layer computes."""
    model = tiny_vlm("mistral3", "ministral3", attention="eager", text_config={"rope_parameters": SCALED})
    inputs = sample(model, "..I...")
    dense = run(model, inputs, output_attentions=True).attentions[layer][0, :, -1]
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    wanted = image[dense.mean(0)[image].topk(8).indices].sort().values
    prune(model, Case("fastv").config(model, layer=layer, keep_ratio=8 / len(image)))
    with record(model) as rec:
        run(model, inputs)
    assert image[next(iter(rec.kept.values()))[0]].tolist() == wanted.tolist()


def test_flash_attention_is_refused_where_it_is_given_gaps() -> None:
    model = tiny_vlm("mistral3", "ministral3")
    inputs = sample(model, "..I...")
    prune(model, DivPruneConfig(keep_ratio=0.5, positions="original"))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"'ministral3' reads positions.*positions=\"contiguous\""):
        run(model, inputs)
