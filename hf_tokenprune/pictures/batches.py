"""A batch through a pruned encoder, in one line."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor, nn

from ..engine import current_config, find_adapter, unwrapped
from ..errors import PruneStateError, UnsupportedModelError
from .pixels import to_image
from .said import Classes, classifier
from .sheets import sheet
from .style import as_image
from .tracing import trace_inputs


def visualize(model: nn.Module, pixel_values: Tensor, processor: Any = None, columns: int = 5) -> Image.Image:
    """Draw what a pruned encoder leaves of each image of a batch, and what it says of it beside the dense model.

    Args:
        model: a pruned vision model; one with a text tower runs without it.
        pixel_values: (B, C, H, W) as the image processor makes them (of SigLIP 2: before it cuts them); a few images.
        processor: turns pixels back into colours; None: contrast is stretched.
        columns: of pruning points, see ``sheet``.

    Raises:
        PruneStateError: the model is not pruned.
        UnsupportedModelError: it is a vision-language model, which has to be asked something.
        ImportError: matplotlib is not installed.
    """
    stock, config = unwrapped(model), current_config(model)
    if find_adapter(stock).shape(stock).kind != "vision":
        raise UnsupportedModelError(
            f"visualize draws what vision encoders leave of a batch, and {type(stock).__name__} is a vision-language "
            "model: use sheet(trace(model, image, configs, processor, question=...))"
        )
    if config is None:
        raise PruneStateError("this model is not pruned, so nothing leaves it; call prune(model, config) first")
    traces = []
    for pixels in pixel_values:
        said = Classes(model, {"pixel_values": pixels.unsqueeze(0)}, *classifier(model, processor, None))
        traces.append(trace_inputs(model, to_image(pixels, processor), {config.method: config}, said, processor))
    return as_image(sheet(traces, columns))
