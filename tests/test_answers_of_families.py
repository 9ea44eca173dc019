"""Questions asked of every family of vision-language models: in ragged batches they are answered as one by one, and as
far from the dense answers."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from hf_tokenprune import DivPruneConfig, FastVConfig, pruned
from hf_tokenprune.evaluation import collect_answers, evaluate_answers, load_questions, mean_text_tokens
from hf_tokenprune.search.run import _mean_text_tokens

from .decoder_families import FAMILIES, tiny_vlm
from .decoder_prompts import collate
from .decoder_visuals import IMAGE, Inputs, family_of
from .forced_answers import NEW_TOKENS, generated, kl

pytest.importorskip("accelerate")

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
CONFIG, PROMPT = DivPruneConfig(keep_ratio=0.3), "1 2 <image> {} 3"
QUESTIONS = ("4 5", "6", "7 8 9", "10", "11 12")


class NumbersProcessor:
    """Stands in for a family's processor: words are numbers of tokens, pixels are drawn at random for every colour."""

    chat_template = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.family = model, family_of(model)

    def tokenizer(self, texts: list[str]) -> Any:
        ids = [[IMAGE if word == "<image>" else int(word) for word in text.split()] for text in texts]
        return SimpleNamespace(input_ids=ids)

    def __call__(self, images: list[Image.Image], text: list[str], **padded_on_the_left: Any) -> Inputs:
        return collate([self.prompt(*pair) for pair in zip(images, self.tokenizer(text).input_ids, strict=True)])

    def prompt(self, image: Image.Image, ids: list[int]) -> Inputs:
        generator = torch.Generator().manual_seed(image.getpixel((0, 0))[0])

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        visual = self.family.image(self.model, "I" if image.width > image.height else "i", draw)
        place = ids.index(IMAGE)
        ids = torch.tensor([[*ids[:place], *visual.ids, *ids[place + 1 :]]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **visual.tensors}
        return inputs | ({"mm_token_type_ids": (ids == IMAGE).long()} if self.family.typed else {})

    def batch_decode(self, tokens: Any, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in map(Tensor.tolist, tokens)]


def asked(answers: list[str] | None = None, wide: tuple[bool, ...] = (True, False, True, True, False)) -> Any:
    sizes = [(9, 4) if each else (4, 9) for each in wide]
    images = [Image.new("RGB", size, (40 * number, 0, 0)) for number, size in enumerate(sizes)]
    answers = answers or ["-"] * len(QUESTIONS)
    fields = zip(images, QUESTIONS, answers, strict=True)
    return load_questions([{"image": image, "question": text, "answer": answer} for image, text, answer in fields])


def one_by_one(
    model: PreTrainedModel, processor: NumbersProcessor, answers: list[Tensor] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Tokens and logits of stock generate on every prompt alone, made to say ``answers`` if they are given."""
    alone = [processor([each["image"]], [PROMPT.replace("{}", each["question"])]) for each in asked()]
    return [generated(model, *each) for each in zip(alone, answers or [None] * len(alone), strict=True)]


@EVERY_FAMILY
def test_answers_in_batches_are_those_one_by_one(family: str) -> None:
    model = tiny_vlm(family)
    processor, settings = NumbersProcessor(model), {"batch_size": 3, "max_new_tokens": NEW_TOKENS, "prompt": PROMPT}
    said = one_by_one(model, processor)
    with pruned(model, CONFIG):
        others = one_by_one(model, processor)
        forced = one_by_one(model, processor, [tokens for tokens, _ in said])
        dense, other = ([*processor.batch_decode([tokens for tokens, _ in each], True)] for each in (said, others))
        assert list(collect_answers(model, asked(), processor, progress=False, **settings).texts) == other
    assert other != dense
    variants: dict[str, Any] = {"pruned": lambda: pruned(model, CONFIG), "same": nullcontext}
    report = evaluate_answers(model, asked(dense), processor, variants, progress=False, **settings)
    assert report.rows[0].overall.accuracy == 1
    same = sum(a == b for a, b in zip(dense, other, strict=True)) / len(dense)
    assert report.rows[1].overall.accuracy == report.rows[1].agreement == pytest.approx(same)
    expected = [float(kl(one, two).mean()) for (_, one), (_, two) in zip(said, forced, strict=True)]
    assert report.rows[1].kl == pytest.approx(sum(expected) / len(expected), rel=1e-3) and min(expected) > 1e-6
    assert (report.rows[0].kl, report.rows[2].kl) == (None, 0.0)


@EVERY_FAMILY
def test_tokens_of_text_are_those_that_stand_for_no_image(family: str) -> None:
    """Those that a processor puts between the tokens of an image, too."""
    model = tiny_vlm(family)
    processor, questions = NumbersProcessor(model), asked(wide=(True,) * 5)
    prompts = [processor([each["image"]], [PROMPT.replace("{}", each["question"])]) for each in questions]
    counts = [int((prompt["input_ids"] != IMAGE).sum()) for prompt in prompts]
    assert mean_text_tokens(model, questions, processor, PROMPT) == round(sum(counts) / len(counts))
    assert _mean_text_tokens(model, [collate(prompts)]) == round(sum(counts) / len(counts))


def test_a_model_may_say_the_placeholder_of_an_image() -> None:
    """As untrained ones do: an answer is measured up to there, and no image is looked for."""
    model = tiny_vlm("llava")
    said = [tokens for tokens, _ in one_by_one(model, NumbersProcessor(model))]
    order = torch.arange(model.config.text_config.vocab_size)
    order[[IMAGE, int(said[0][1])]] = order[[int(said[0][1]), IMAGE]]
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[order].detach())  # says one where it said the other
    model.generation_config.suppress_tokens = None
    forced = one_by_one(model, NumbersProcessor(model))
    assert any(IMAGE in tokens for tokens, _ in forced)
    variants = {"pruned": lambda: pruned(model, CONFIG)}
    settings: dict[str, Any] = {"batch_size": 3, "max_new_tokens": NEW_TOKENS, "prompt": PROMPT, "progress": False}
    report = evaluate_answers(model, asked(), NumbersProcessor(model), variants, **settings)
    expected = []
    with pruned(model, CONFIG):
        others = one_by_one(model, NumbersProcessor(model), [tokens for tokens, _ in forced])
    for (tokens, one), (_, other) in zip(forced, others, strict=True):
        end = [*tokens.tolist(), IMAGE].index(IMAGE) + 1
        expected.append(float(kl(one, other)[:end].mean()))
    assert report.rows[1].kl == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_a_measured_answer_is_no_further_turn() -> None:
    """It would be told of, since the method chose by the question; many tokens behind a cache are one elsewhere."""
    model = tiny_vlm("llava")
    variants = {"pruned": lambda: pruned(model, FastVConfig(layer=1, keep_ratio=0.3))}
    settings: dict[str, Any] = {"batch_size": 3, "max_new_tokens": NEW_TOKENS, "prompt": PROMPT, "progress": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*chose image tokens by the question")
        report = evaluate_answers(model, asked(), NumbersProcessor(model), variants, **settings)
    assert report.rows[1].kl > 0
