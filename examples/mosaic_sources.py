"""What mosaics can be made of, and processors for their models."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import CLIPImageProcessorPil, CLIPProcessor, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerFast

from hf_tokenprune.demo.mosaics import PATCH, SIDE, Pictures, digit_pictures

MOST_PHOTOGRAPHS = 50_000
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>", "<image>")  # </s> is not 2: for a CLIP that means "the largest id"


def load_pictures(source: str, split: str) -> Pictures:
    """``digits``, or a folder with a `datasets` dataset of small photographs in ten classes, such as CIFAR-10's."""
    if source == "digits":
        return digit_pictures(split)
    from datasets import load_dataset

    dataset = load_dataset(source, split=split)
    dataset = dataset.shuffle(seed=0).select(range(min(len(dataset), MOST_PHOTOGRAPHS)))
    names = tuple(dataset.features["label"].names)
    return Pictures(
        np.stack([np.asarray(image.convert("RGB")) for image in dataset["image"]]),
        np.array(dataset["label"]),
        names,
        tuple(f"{name}s" for name in names),
        order="later in the alphabet",
    )


def word_tokenizer(words: list[str], end: bool, padding_side: str) -> PreTrainedTokenizerFast:
    """A token a word; texts begin with <s> and, if ``end``, end with </s>."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if end else "<s> $A",
        special_tokens=[(token, vocabulary[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side=padding_side,
        extra_special_tokens={"image_token": "<image>"},
    )


def image_processor() -> CLIPImageProcessorPil:
    """For images of 128×128 pixels."""
    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size, image_mean=half, image_std=half)


def clip_processor(words: list[str]) -> CLIPProcessor:
    """Images and captions."""
    return CLIPProcessor(image_processor(), word_tokenizer(words, end=True, padding_side="right"))


def llava_processor(words: list[str]) -> LlavaProcessor:
    """Images and questions; its chat template is the one that the model is trained with."""
    template = (
        "{% for message in messages %}{{ message['role'] + ' : ' }}"
        "{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<image> {% else %}{{ content['text'] + ' ' }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )
    tokenizer = word_tokenizer(sorted({*words, "user", "assistant"}), end=False, padding_side="left")
    return LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def save_half(model: PreTrainedModel, folder: Path) -> None:
    """Weights as float16, which ``from_pretrained`` loads as float32: half the size on disk, and no slow half floats
    on CPU."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = str(torch.float32).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
