"""A checkpoint that stands in for LLaVA-1.5-7B: as many layers and image tokens, random weights of next to no width.

Text that examples and documentation print about tokens is therefore that of the real model, without a download.
"""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
WORDS = ("USER", "ASSISTANT", ":", ".", "?", "what", "where", "is", "in", "the", "this", "image", "red", "blue")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def save_tiny_llava(folder: Path) -> Path:
    """Write the model with its processor; 576 image tokens, 32 decoder layers. It never says a special token."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)

    torch.manual_seed(0)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "initializer_range": 0.3}
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "num_hidden_layers": 2, **width}
    text = {"model_type": "llama", "num_hidden_layers": 32, "vocab_size": len(vocabulary), **width}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=vocabulary["<image>"])
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))
    model.generation_config.pad_token_id = vocabulary["<pad>"]
    model.save_pretrained(folder)
    return folder


def save_photo(path: Path) -> None:
    """Write an image that is not the same everywhere."""
    Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256))]).save(path)
