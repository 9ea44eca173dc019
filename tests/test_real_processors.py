"""Pruned models take what stock processors make of pictures of several sizes: real placeholders, tiles, grids, rows."""

import pytest
import torch
from PIL import Image
from torch import Tensor

from hf_tokenprune import DivPruneConfig, prune, record

from .decoder_families import run, stages_of
from .decoder_visuals import FAMILIES, Inputs
from .real_processors import model_of, processor_of
from .reference_decoder import reference

RATIO = 0.3
CONFIG = DivPruneConfig(keep_ratio=RATIO)


def can_be_had(family: str) -> bool:
    """Whether this version and what is installed offer its processor: some want torchvision, for a name or a kernel."""
    try:
        processor_of(family)
    except ImportError:
        return False
    return True


every_family = pytest.mark.parametrize("family", [family for family in FAMILIES if can_be_had(family)])


def picture(width: int, height: int, angle: int = 0) -> Image.Image:
    """One that is not the same everywhere."""
    bands = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
    return Image.merge("RGB", bands).rotate(angle).resize((width, height))


WIDE, TALL, LARGE = picture(300, 200), picture(90, 160, 30), picture(640, 400, 60)


def prompt(*parts: str | Image.Image) -> list[dict]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def inputs_of(family: str, prompts: list, **options: object) -> Inputs:
    """Of one prompt, or of several in a batch."""
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = processor_of(family).apply_chat_template(prompts, **how, processor_kwargs=options)
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@every_family
@pytest.mark.parametrize("pictures", [(LARGE,), (WIDE, TALL)], ids=["one", "two"])
def test_answers_are_those_of_the_reference(family: str, pictures: tuple[Image.Image, ...]) -> None:
    dense, model = model_of(family), model_of(family)
    inputs = inputs_of(family, prompt(*pictures, "where is the red image ?"))
    stages = stages_of(dense, CONFIG)
    prune(model, CONFIG)
    with record(model) as rec:
        logits = run(model, inputs).logits[0]
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    told = reference(dense, inputs, stages, rec, pruned=model)
    close(logits, told.forward().logits)
    tokens, _ = told.generate(3)
    assert output[0, -3:].tolist() == tokens


@every_family
def test_a_ratio_is_of_each_picture_as_the_processor_made_it(family: str) -> None:
    """All its tiles, crops, rows and newlines together. The word between two pictures tells their tokens apart."""
    model = model_of(family)
    inputs = inputs_of(family, prompt(LARGE, "and", TALL, "what is this ?"))
    (ids,) = inputs["input_ids"]
    between = int((ids == processor_of(family).tokenizer.convert_tokens_to_ids("and")).nonzero().item())
    is_image = ids == model.config.image_token_id
    first, second = int(is_image[:between].sum()), int(is_image[between:].sum())
    prune(model, CONFIG)
    with record(model) as rec:
        run(model, inputs)
    (kept,) = rec.kept["entrance"]
    of_first = int((kept < first).sum())
    assert abs(of_first - RATIO * first) <= 0.5
    assert abs(len(kept) - of_first - RATIO * second) <= 0.5
    assert rec.tokens["0"] == len(ids) - first - second + len(kept)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_prompts_alone(family: str, side: str) -> None:
    model = model_of(family)
    prompts = [prompt(LARGE, "what is this ?"), prompt("what is red ?"), prompt("this", TALL, WIDE, "where ?")]
    prune(model, CONFIG)
    batch = inputs_of(family, prompts, padding=True, padding_side=side)
    logits = run(model, batch).logits
    for row, one in enumerate(prompts):
        close(logits[row][batch["attention_mask"][row].bool()], run(model, inputs_of(family, one)).logits[0])
