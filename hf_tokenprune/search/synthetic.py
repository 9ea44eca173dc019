"""Inputs for a search where there is no image: made from the classifier itself.

Without data, a model's own statistics stand in for it (Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework",
CVPR 2020, arXiv 2001.00281). Vision transformers have no batch statistics to match. What a classifier does know is what
its classes look like: noise with the spectrum of natural images is changed until the model names a drawn class, as in
class impressions, while its smoothness is kept. Tokens of such images differ in how much they matter, as in real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine import find_adapter
from ..errors import UnsupportedModelError
from ..evaluation.turns import eval_mode

RATE = 0.05
SMOOTHNESS = 0.2
MAX_SHIFT = 16  # pixels: what is made must not depend on where patches lie


def synthesize(
    model: Any,
    count: int,
    *,
    steps: int = 40,
    seed: int = 0,
    batch_size: int = 32,
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Tensor]]:
    """Images that a classifier is sure of, as batches of inputs on the model's device.

    Args:
        model: a dense image classifier with an adapter; its parameters get no gradients and do not change.
        count: images.
        steps: of Adam on the pixels, each a forward and a backward of all images.
        seed: of noise, classes and shifts.
        on_step: told every step of every batch.

    Raises:
        UnsupportedModelError: the model returns no logits of classes.
    """
    adapter, parameter = find_adapter(model), next(model.parameters())
    shape, generator = adapter.shape(model), torch.Generator().manual_seed(seed)
    batches = []
    frozen = [(each, each.requires_grad) for each in model.parameters()]
    for each, _ in frozen:
        each.requires_grad_(False)
    try:
        with eval_mode(model), torch.enable_grad():
            for start in range(0, count, batch_size):
                size = min(batch_size, count - start)
                noise = pink_noise(size, shape.num_channels, shape.image_size, generator)
                pixels = noise.to(parameter.device, parameter.dtype).requires_grad_()
                optimizer = torch.optim.Adam([pixels], RATE)
                classes: Tensor | None = None
                for _ in range(steps):
                    shift = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator).tolist()
                    output = model(**adapter.image_inputs(model, pixels.roll(shift, (2, 3))))
                    logits = getattr(output, "logits", None)
                    if logits is None:
                        raise UnsupportedModelError(
                            f"{type(model).__name__} has no classes to make images of; give images to search on"
                        )
                    if classes is None:
                        classes = torch.randint(logits.shape[1], (size,), generator=generator).to(logits.device)
                    loss = F.cross_entropy(logits.float(), classes) + SMOOTHNESS * roughness(pixels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    on_step()
                batches.append(adapter.image_inputs(model, pixels.detach()))
    finally:
        for each, required in frozen:
            each.requires_grad_(required)
    return batches


def pink_noise(count: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(B, C, H, W) noise whose amplitudes fall with 1 / frequency, as those of natural images do; mean 0, deviation 1.

    Most of it is common to the channels, as light is.
    """
    white = torch.randn(count, channels, *size, generator=generator)
    white = 0.8 * white.mean(1, keepdim=True) * channels**0.5 + 0.6 * white
    vertical, horizontal = torch.fft.fftfreq(size[0])[:, None], torch.fft.rfftfreq(size[1])
    frequency = (vertical.square() + horizontal.square()).sqrt().clamp_min(1 / max(size))
    pink = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=size)
    pink = pink - pink.mean((2, 3), keepdim=True)
    return pink / pink.std((2, 3), keepdim=True)


def roughness(pixels: Tensor) -> Tensor:
    """Mean absolute difference of neighbours, a number."""
    return pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()
