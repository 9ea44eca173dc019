"""A CLIP of next to no size with random weights, and its processor, which reads letters: stands in for a real one."""

import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}


def letters() -> CLIPTokenizer:
    """Small letters and the full stop, each a token, by themselves or (another token) at the end of a word."""
    signs = [*string.ascii_lowercase, "."]
    words = ["<|startoftext|>", "<|endoftext|>", *signs, *(f"{sign}</w>" for sign in signs)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def tiny_clip() -> tuple[CLIPModel, CLIPProcessor]:
    """In eval mode; 64 patches, up to 40 text tokens."""
    tokenizer = letters()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={"image_size": 32, "patch_size": 4, "initializer_factor": 5.0, **SIZES},
        text_config={**text, "pad_token_id": 1, **SIZES},
        projection_dim=16,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPModel(config).eval(), CLIPProcessor(images, tokenizer)


def save_tiny_clip(folder: Path) -> Path:
    """Write model and processor."""
    model, processor = tiny_clip()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
