"""Stock processors of every family with a decoder, around a small tokenizer made in memory, and tiny models for them.

Which classes a family has is asked of Transformers. Pillow is enough for all of them: the part that reads videos, which
needs torchvision, is left out.
"""

import functools
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.smolvlm import processing_smolvlm

from .decoder_families import tiny_vlm
from .decoder_visuals import END, IMAGE, START, VIDEO, VIDEO_START, VOCABULARY

WORDS = ("user", "assistant", ":", ".", "?", "what", "where", "is", "in", "the", "this", "and", "image", "red", "blue")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE_PIECE{% elif c['type'] == 'video' %}VIDEO_PIECE{% else %}{{ c['text'] + ' ' }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """What processors of a kind write, and the sizes of a tiny model that reads it.

    Attributes:
        special: tokens that its prompts have, by number.
        image, video: what a chat template writes for one.
        vision, fields: of the model's config, beside what tiny models have.
        pictures, processor: of the image processor, and of the processor.
        named: tokens that the processor asks its tokenizer for, by name.
        names: further special tokens, numbered behind the others.
    """

    special: dict[int, str]
    image: str
    vision: dict[str, Any]
    pictures: dict[str, Any]
    video: str = "<video>"
    fields: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> dict[str, int]:
        words = dict(zip(("<pad>", "<unk>", *WORDS), range(VOCABULARY), strict=False))
        special = {name: number for number, name in self.special.items()}
        return words | special | {name: VOCABULARY + i for i, name in enumerate(self.names)}


def grids(patch: int) -> dict[str, Any]:
    """Of images of any size, in patches that are merged two by two."""
    unit = (2 * patch) ** 2
    sizes = {"shortest_edge": 4 * unit, "longest_edge": 30 * unit}
    return {"patch_size": patch, "merge_size": 2, "size": sizes}


QWEN_TOKENS = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", START: "<|vision_start|>", END: "<|vision_end|>"}
QWEN_PIECES = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}
GLM_END = VIDEO_START - 1
GLM_TOKENS = {
    IMAGE: "<|image|>",
    VIDEO: "<|video|>",
    START: "<|begin_of_image|>",
    END: "<|end_of_image|>",
    VIDEO_START: "<|begin_of_video|>",
    GLM_END: "<|end_of_video|>",
}
GLM = Kind(
    GLM_TOKENS,
    image="<|begin_of_image|><|image|><|end_of_image|>",
    video="<|begin_of_video|><|video|><|end_of_video|>",
    vision={"patch_size": 14, "image_size": 56},
    pictures=grids(14),
    fields={"video_end_token_id": GLM_END},
)
QWEN2 = Kind(QWEN_TOKENS, **QWEN_PIECES, vision={"patch_size": 14}, pictures=grids(14))
QWEN3 = Kind(QWEN_TOKENS, **QWEN_PIECES, vision={"patch_size": 16}, pictures=grids(16))
IDEFICS3 = Kind(
    {IMAGE: "<image>", VIDEO: "<video>", START: "<fake_token_around_image>"},
    image="<image>",
    vision={"image_size": 64, "patch_size": 16},
    pictures={"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}, "do_image_splitting": True},
    processor={"image_seq_len": 4},
    names=(
        "<global-img>",
        "<end_of_utterance>",
        *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    ),
)
LLAVA_TOKENS = {IMAGE: "<image>", VIDEO: "<video>"}
CLIP = {"image_size": 56, "patch_size": 14}
SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
CROPS = [[56, 112], [112, 56], [112, 112]]
ROWS = {IMAGE: "[IMG]", START: "[IMG_BREAK]", END: "[IMG_END]"}
CLS = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
PIXTRAL = {"image_size": 128, "patch_size": 16}
ONEVISION = {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": CROPS}

KINDS: dict[str, Kind] = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": Kind(QWEN_TOKENS, **QWEN_PIECES, vision={"patch_size": 14, "window_size": 56}, pictures=grids(14)),
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_5": QWEN3,
    "glm4v": GLM,
    "glm46v": GLM,
    "internvl": Kind(
        {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>"},
        image="<IMG_CONTEXT>\n",
        vision={"image_size": [56, 56], "patch_size": [14, 14]},
        pictures={"size": {"height": 56, "width": 56}},
        processor={"image_seq_length": 4},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
    "mistral3": Kind(
        ROWS,
        image="[IMG]",
        vision={"image_size": 112, "patch_size": 14},
        pictures={"size": {"longest_edge": 112}},
        processor={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "llava": Kind(LLAVA_TOKENS, "<image>\n", CLIP, SQUARE, processor=CLS),
    "llava+pixtral": Kind(ROWS, "[IMG]", PIXTRAL, {"size": {"longest_edge": 128}}, processor={"patch_size": 16}),
    "llava_next": Kind(LLAVA_TOKENS, "<image>\n", CLIP, {**SQUARE, "image_grid_pinpoints": CROPS}, processor=CLS),
    "llava_next_video": Kind(LLAVA_TOKENS, "<image>\n", CLIP, {**SQUARE, "image_grid_pinpoints": CROPS}, processor=CLS),
    "llava_onevision": Kind(
        LLAVA_TOKENS,
        "<image>\n",
        CLIP,
        ONEVISION,
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
}
"""By what ``decoder_visuals.FAMILIES`` has."""


def tokenizer_of(kind: Kind) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(kind.vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", extra_special_tokens=kind.named
    )
    tokenizer.add_tokens([*kind.special.values(), *kind.names], special_tokens=True)
    return tokenizer


@functools.cache
def processor_of(family: str) -> ProcessorMixin:
    """The stock processor of a family, as checkpoints of it have one."""
    kind = KINDS[family]
    model_type = re.sub("^llava.pixtral$", "mistral3", family.removesuffix("_moe"))  # whose classes are the same
    config = type(AutoConfig.for_model(model_type))
    pictures = IMAGE_PROCESSOR_MAPPING[config]["pil"](**kind.pictures)
    template = TEMPLATE.replace("IMAGE_PIECE", kind.image).replace("VIDEO_PIECE", kind.video)
    parts = {"image_processor": pictures, "tokenizer": tokenizer_of(kind), "chat_template": template}
    stock = PROCESSOR_MAPPING[config]
    if "video_processor" in stock.get_attributes():
        parts["video_processor"] = SimpleNamespace(num_frames=None, fps=None)
    with (
        mock.patch.object(ProcessorMixin, "check_argument_for_proper_class"),  # takes no None
        mock.patch.object(processing_smolvlm, "num2words", str),  # of which it writes the length of a video
    ):
        return stock(**parts, **kind.processor)


def model_of(family: str) -> PreTrainedModel:
    """A tiny model that takes what the processor of its family makes."""
    kind = KINDS[family]
    vocabulary = VOCABULARY + len(kind.names)
    return tiny_vlm(family, vision_config=kind.vision, text_config={"vocab_size": vocabulary}, **kind.fields)
