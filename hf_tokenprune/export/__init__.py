"""Pruned and dense encoders as files for ONNX Runtime, OpenVINO and ``torch.export``: batches of any size."""

from .loading import load_exported
from .run import export

__all__ = ["export", "load_exported"]
