"""Vision-language models whose image tokens pass a decoder: what they share, and one file a family."""

from ._adapter import DecoderAdapter
from ._layer import LAYER_CLASSES

__all__ = ["LAYER_CLASSES", "DecoderAdapter"]
