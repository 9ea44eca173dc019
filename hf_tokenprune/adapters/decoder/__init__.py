"""Vision-language models whose image tokens pass a decoder: what they share, and one file a family."""

from ._adapter import LAYER_CLASSES, DecoderAdapter

__all__ = ["LAYER_CLASSES", "DecoderAdapter"]
