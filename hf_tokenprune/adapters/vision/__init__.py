"""Encoders of image patches: what they share, and one file a family."""

from ._adapter import VisionAdapter
from ._block import Projections, PrunedVisionBlock

__all__ = ["Projections", "PrunedVisionBlock", "VisionAdapter"]
