"""What a file holds: pixels to logits, embeddings or states, as one graph for batches of any size."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..engine import find_adapter
from ..errors import UnsupportedModelError
from ..evaluation.turns import eval_mode
from ..evaluation.zero_shot import ImageTower, SimilarityToClasses

INPUT = "pixel_values"


class Graph(nn.Module):
    """A vision encoder as a function of pixels alone.

    Args:
        model: pruned or dense.
        classes: ``(C, D)`` embeddings of a two-tower model's classes; None: it gives the embeddings of images.
    """

    def __init__(self, model: Any, classes: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.adapter = model, find_adapter(model)
        self.two_towers = hasattr(model, "get_text_features")
        self.output = "image_embeds" if classes is None else "logits"
        self.run = model
        if self.two_towers:
            self.run = ImageTower(model) if classes is None else SimilarityToClasses(model, classes)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to the tensors of the model's output, by name."""
        output = self.run(**self.adapter.image_inputs(self.model, pixel_values))
        if self.two_towers:
            return {self.output: output}
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def trace(model: Any, image_size: tuple[int, int] | None = None, classes: Tensor | None = None) -> ExportedProgram:
    """The graph of a model for images of one size and batches of any; ``classes`` as in `Graph`.

    Raises:
        UnsupportedModelError: the model has no such graph.
    """
    shape = check_exportable(model)
    parameter = next(model.parameters())
    pixels = torch.zeros(2, shape.num_channels, *(image_size or shape.image_size))
    graph = Graph(model, classes)
    with eval_mode(model), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        try:
            return torch.export.export(
                graph.eval(),
                (),
                {INPUT: pixels.to(parameter.device, parameter.dtype)},
                dynamic_shapes={INPUT: {0: Dim("batch", min=1)}},
            )
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise UnsupportedModelError(
                f"torch.export makes no graph of this {type(model).__name__} for batches of any size ({first}); run it "
                "as it is, or with torch.compile"
            ) from error


def check_exportable(model: Any) -> Any:
    """The shape of a model that can be exported.

    Raises:
        UnsupportedModelError: it cannot, by what its adapter says.
    """
    adapter = find_adapter(model)
    shape = adapter.shape(model)
    if shape.kind != "vision":
        raise UnsupportedModelError(
            f"{type(model).__name__} is a vision-language model, and a file holds one graph: prefill and decoding with "
            "a cache are none. Serve it with `hf-tokenprune serve`, or export a vision encoder"
        )
    if adapter.no_graph:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be exported: {adapter.no_graph}")
    return shape
