"""Short prompts against pruning at the entrance, with positions that close up: the same logits and the same tokens."""

import copy
import pickle
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin, ViTModel, pipeline
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from hf_tokenprune import (
    ConfigError,
    DivPruneConfig,
    FastVConfig,
    PruneConfig,
    PruneStateError,
    SalienceMergeConfig,
    StackConfig,
    UnsupportedModelError,
    from_pretrained,
    prune,
    pruned,
    record,
    save_pretrained,
    unprune,
)
from hf_tokenprune.engine import current_config
from hf_tokenprune.methods.evs import EvsConfig
from hf_tokenprune.serving import short_prompts

from .decoder_families import CASES, FAMILIES, Case, adapter_of, built, is_refused, places, run, stages_of
from .decoder_visuals import Inputs
from .families import tiny_model
from .real_processors import model_of, processor_of
from .test_real_processors import LARGE, TALL, WIDE, can_be_had, prompt

CONFIG = DivPruneConfig(keep_ratio=0.3)
PROMPTS = [prompt(LARGE, "and", TALL, "what is this ?"), prompt("what is red ?"), prompt("this", WIDE, "where ?")]


def in_rows(family: str) -> bool:
    """Whether text stands between the rows of an image."""
    return family in ("mistral3", "llava+pixtral")


ONE_AXIS = [family for family in FAMILIES if adapter_of(built(family)).position_axes == 1 and not in_rows(family)]
HERE = [family for family in ONE_AXIS if can_be_had(family)]


def config_of(case: Case, model: PreTrainedModel) -> PruneConfig:
    return case.config(model, dominant=1, contextual=1, positions="contiguous")


def fits(family: str, case: Case) -> bool:
    """Whether tokens leave in front of the decoder, as many as the image's size says, whatever the prompt."""
    if is_refused(family, case) or "after_block" in places(case):
        return False
    model = built(family)
    stages = stages_of(model, config_of(case, model))
    unpads = "vision_tower" in places(case) and adapter_of(model).shape(model).newline_tokens > 0
    of_image = all(stage.budget == "image" or stage.where == "vision_tower" for stage in stages)
    return of_image and not unpads and not any(stage.text_rows for stage in stages)


FITTING = [(family, case) for family in HERE for case in CASES if fits(family, case)]
TOO_MUCH = [
    (family, case) for family in ONE_AXIS for case in CASES if not is_refused(family, case) and not fits(family, case)
]


def whole(model: PreTrainedModel) -> dict[str, Any]:
    """What to tell the processor so that it cuts no image into tiles."""
    name, _, value = adapter_of(model).tile_option.partition("=")
    return {name: {"False": False}[value]} if name else {}


def inputs_of(processor: ProcessorMixin, prompts: list, model: PreTrainedModel) -> Inputs:
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options = {"padding": True, "padding_side": "left", **whole(model)}
    made = processor.apply_chat_template(prompts, **how, processor_kwargs=options)
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def of_text(model: PreTrainedModel, inputs: Inputs) -> list[Tensor]:
    """Logits (T, V) of the text of each prompt."""
    kept = inputs["attention_mask"].bool() & (inputs["input_ids"] != model.config.image_token_id)
    return [logits[row] for logits, row in zip(run(model, inputs).logits, kept, strict=True)]


def new_tokens(model: PreTrainedModel, inputs: Inputs, **how: Any) -> list[list[int]]:
    made = model.generate(**inputs, max_new_tokens=4, do_sample=False, **how)
    return made[:, inputs["input_ids"].shape[1] :].tolist()


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def stand_in(model: PreTrainedModel) -> Any:
    """What is looked at of a processor before the config is."""
    fields = {"image_token_id": model.config.image_token_id, "replace_image_token": None}
    return type(PROCESSOR_MAPPING_NAMES[model.config.model_type], (), fields)()


@pytest.mark.parametrize("family", HERE)
def test_answers_are_those_of_pruning_at_the_entrance(family: str) -> None:
    """Of a batch of prompts with two images, none, and one."""
    check_answers(family, CONFIG, PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), FITTING, ids=str)
@pytest.mark.parametrize("number", [1, 3])
def test_answers_are_those_of_pruning_by_every_method(family: str, case: Case, number: int) -> None:
    check_answers(family, config_of(case, model_of(family)), PROMPTS[-number:])


def check_answers(family: str, config: PruneConfig, prompts: list) -> None:
    model, processor = model_of(family), processor_of(family)
    reference = prune(model_of(family), config)
    model, short = short_prompts(model, processor, config)
    inputs, long = inputs_of(short, prompts, model), inputs_of(processor, prompts, model)
    with record(reference) as rec:
        expected = of_text(reference, long)
    kept = list(rec.kept.values())[-1]
    placeholders = inputs["input_ids"] == model.config.image_token_id
    assert placeholders.sum(1).tolist() == (kept >= 0).sum(1).tolist()
    assert 0 < placeholders.sum() < (long["input_ids"] == model.config.image_token_id).sum()
    close(of_text(model, inputs), expected)
    tokens = new_tokens(model, inputs)
    assert tokens == new_tokens(reference, long)
    assert new_tokens(model, inputs, cache_implementation="static") == tokens, "which a pruned model refuses"


@pytest.mark.parametrize("family", HERE)
def test_it_is_undone_exactly(family: str) -> None:
    dense, model, processor = model_of(family), model_of(family), processor_of(family)
    long, state = inputs_of(processor, PROMPTS, dense), vars(processor).copy()
    expected = run(dense, long).logits
    model, short = short_prompts(model, processor, CONFIG)
    assert current_config(model) == CONFIG
    with pytest.raises(PruneStateError, match="already pruned"):
        short_prompts(model, processor, CONFIG)
    with pytest.raises(UnsupportedModelError, match="nothing to record"), record(model):
        pass
    unprune(model)
    assert torch.equal(run(model, long).logits, expected)
    assert vars(model.base_model).keys() == vars(dense.base_model).keys()
    assert vars(processor) == state and type(processor) is type(processor_of(family))
    assert type(short).__name__ == type(processor).__name__ and isinstance(short, type(processor))


def test_a_with_block_gives_short_prompts_back() -> None:
    model, short = short_prompts(model_of("llava"), processor_of("llava"), CONFIG)
    inputs = inputs_of(short, PROMPTS, model)
    expected = run(model, inputs).logits
    with pruned(model, DivPruneConfig(keep_ratio=0.5)), record(model):
        run(model, inputs_of(processor_of("llava"), PROMPTS, model))
    assert torch.equal(run(model, inputs).logits, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_short_too_and_their_own(copied: Any) -> None:
    model, short = short_prompts(model_of("llava"), processor_of("llava"), CONFIG)
    twin, twin_processor = copied(model), copied(short)
    inputs = inputs_of(short, PROMPTS, model)
    expected = run(model, inputs).logits
    unprune(model)
    assert torch.equal(inputs_of(twin_processor, PROMPTS, twin)["input_ids"], inputs["input_ids"])
    assert torch.equal(run(twin, inputs).logits, expected)
    with torch.no_grad():
        twin.base_model.multi_modal_projector.linear_2.weight.zero_()
    assert not torch.equal(run(twin, inputs).logits, expected)


def test_what_is_saved_is_pruned_in_the_usual_way(tmp_path: Any) -> None:
    processor = processor_of("llava")
    model, short = short_prompts(model_of("llava"), processor, CONFIG)
    expected = of_text(model, inputs_of(short, PROMPTS, model))
    save_pretrained(model, tmp_path / "model")
    short.save_pretrained(tmp_path / "model")
    loaded, its_processor = from_pretrained(tmp_path / "model"), AutoProcessor.from_pretrained(tmp_path / "model")
    close(of_text(loaded, inputs_of(its_processor, PROMPTS, loaded)), expected)


def test_a_tower_that_merges_comes_first() -> None:
    in_tower = SalienceMergeConfig(exact_last_block=False)
    config = StackConfig((in_tower, CONFIG))
    reference = prune(model_of("llava"), config)
    model, short = short_prompts(model_of("llava"), processor_of("llava"), config)
    close(
        of_text(model, inputs_of(short, PROMPTS, model)),
        of_text(reference, inputs_of(processor_of("llava"), PROMPTS, reference)),
    )
    unprune(model)
    assert current_config(model) is None


COUNTING = [family for family in HERE if hasattr(processor_of(family), "_get_num_multimodal_tokens")]


@pytest.mark.parametrize("family", COUNTING)
def test_engines_are_told_as_many_tokens_as_are_written(family: str) -> None:
    """What is asked before the processor is called; tokens around the placeholders count."""
    model, short = short_prompts(model_of(family), processor_of(family), CONFIG)
    for image in (LARGE, TALL):
        (told,) = short._get_num_multimodal_tokens([(image.height, image.width)], **whole(model)).num_image_tokens
        asked = {"text": [short.image_token], "images": [[image]], "return_text_replacement_offsets": True}
        made = short(**asked, return_mm_token_type_ids=True, **whole(model))
        (ids,), ((offset,),) = made["input_ids"], made["text_replacement_offsets"]
        assert len(ids) == told == len(short.tokenizer(offset["replacement"], add_special_tokens=False)["input_ids"])
        assert sum(made["mm_token_type_ids"][0]) == told
    assert short._get_num_multimodal_tokens().num_image_tokens is None
    assert short._get_num_multimodal_tokens(video_sizes=[(2, 56, 56)]).num_video_tokens is None, "there are no videos"


def test_pipelines_take_both() -> None:
    model, short = short_prompts(model_of("llava"), processor_of("llava"), CONFIG)
    answer = pipeline("image-text-to-text", model=model, processor=short, device="cpu")
    asked = [prompt(TALL, "what is this ?")]
    (said,) = answer(text=asked, max_new_tokens=4, return_full_text=False)
    tokens = new_tokens(model, inputs_of(short, asked, model))
    assert said[0]["generated_text"].strip() == short.decode(tokens[0], skip_special_tokens=True).strip()


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "case"), TOO_MUCH, ids=str)
def test_methods_whose_choice_does_not_follow_from_an_image_alone_are_refused(family: str, case: Case) -> None:
    model = model_of(family)
    with pytest.raises(UnsupportedModelError, match=r"no short prompts.* Use prune"):
        short_prompts(model, stand_in(model), config_of(case, model))
    assert current_config(model) is None and "get_image_features" not in vars(model.base_model)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ONE_AXIS])
def test_families_with_places_that_a_shorter_prompt_does_not_tell_are_refused(family: str) -> None:
    reason = "text stands between the rows" if in_rows(family) else "time, row and column"
    model = model_of(family)
    with pytest.raises(UnsupportedModelError, match=f"no short prompts for.*{reason}"):
        short_prompts(model, stand_in(model), CONFIG)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("llava", DivPruneConfig(positions="original"), "without gaps.*positions='contiguous'"),
        ("llava", DivPruneConfig(budget="sample"), "budget='image'"),
        ("llava", FastVConfig(), "behind decoder layer"),
        ("llava", PruneConfig.for_method("cdpruner"), "reads the question"),
        ("llava_next", DivPruneConfig(newlines="protect"), "newlines='prune'"),
        ("llava_onevision", EvsConfig(), "prunes videos"),
        ("llava_next", DivPruneConfig(features="tower"), "cuts padding off"),
    ],
    ids=lambda value: value.method if isinstance(value, PruneConfig) else None,
)
def test_the_reason_is_said(family: str, config: PruneConfig, reason: str) -> None:
    model = model_of(family)
    with pytest.raises(UnsupportedModelError, match=reason):
        short_prompts(model, stand_in(model), config)


@pytest.mark.parametrize("family", [family for family in HERE if adapter_of(built(family)).tile_option])
def test_an_image_in_tiles_is_refused(family: str) -> None:
    model, short = short_prompts(model_of(family), processor_of(family), CONFIG)
    ((option, _),) = whole(model).items()
    split = {option: True} | ({"min_patches": 2} if family == "internvl" else {})
    with pytest.raises(UnsupportedModelError, match=f"Call the processor with {option}=False"):
        short(text=[short.image_token], images=[[LARGE]], **split)


def test_videos_are_refused() -> None:
    family = "llava_onevision"
    _, short = short_prompts(model_of(family), processor_of(family), CONFIG)
    with pytest.raises(UnsupportedModelError, match="no videos"):
        short.replace_video_token({}, video_idx=0)


def test_what_is_no_processor_of_the_model_is_refused() -> None:
    model, processor = model_of("llava"), processor_of("llava")
    other_id = copy.copy(processor)
    other_id.image_token_id += 1
    for other in (processor.tokenizer, Image.new("RGB", (2, 2)), other_id):
        with pytest.raises(ConfigError, match="expected the processor of this checkpoint"):
            short_prompts(model, other, CONFIG)
    with pytest.raises(UnsupportedModelError, match="takes no prompt"):
        short_prompts(tiny_model("vit", ViTModel), processor, CONFIG)


@pytest.mark.parametrize("family", HERE)
def test_processors_of_other_families_are_refused(family: str) -> None:
    """Also one with the same token for an image, of which it writes another number."""
    model = model_of(family)
    for other in FAMILIES:
        if can_be_had(other) and type(processor_of(other)) is not type(processor_of(family)):
            processor = copy.copy(processor_of(other))
            processor.image_token_id = model.config.image_token_id
            message = f"{type(processor).__name__} is of another family.*expected {type(processor_of(family)).__name__}"
            with pytest.raises(ConfigError, match=message):
                short_prompts(model, processor, CONFIG)
            assert current_config(model) is None


def test_a_class_of_the_users_own_is_a_processor_of_the_family() -> None:
    class Own(type(processor_of("llava"))):  # type: ignore[misc]
        pass

    processor = copy.copy(processor_of("llava"))
    processor.__class__ = Own
    _, short = short_prompts(model_of("llava"), processor, CONFIG)
    assert isinstance(short, Own)


@pytest.mark.parametrize("family", HERE)
def test_a_prompt_of_another_length_than_the_model_is_an_error_of_transformers(family: str) -> None:
    model, processor = model_of(family), processor_of(family)
    model, short = short_prompts(model, processor, CONFIG)
    prompts = {name: inputs_of(made, PROMPTS, model) for name, made in {"long": processor, "short": short}.items()}

    def refuses(inputs: Inputs) -> None:
        for call in (lambda: run(model, inputs), lambda: new_tokens(model, inputs)):
            with pytest.raises(ValueError, match="Image features and image tokens do not match"):
                call()

    refuses(prompts["long"])
    unprune(model)
    refuses(prompts["short"])
    prune(model, CONFIG)
    refuses(prompts["short"])


def test_a_processor_that_is_short_already_is_refused() -> None:
    model, short = short_prompts(model_of("llava"), processor_of("llava"), CONFIG)
    unprune(model)
    with pytest.raises(ConfigError, match="makes short prompts already"):
        short_prompts(model, short, CONFIG)
    assert current_config(model) is None
