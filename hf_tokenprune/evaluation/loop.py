"""Run a classifier over images and keep its logits: on one device, or on many through `accelerate`."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_tokenprune.errors import TokenPruneError, UnsupportedModelError
from hf_tokenprune.evaluation.images import ImageDataset
from hf_tokenprune.evaluation.optional import require
from hf_tokenprune.evaluation.preprocess import PreprocessedImages, collate
from hf_tokenprune.evaluation.scores import as_logits


@dataclass(frozen=True)
class Logits:
    """What a model said about n images, in their order.

    Attributes:
        logits: ``(n, C)`` float32 on the CPU.
        labels: ``(n,)`` int64 on the CPU, -1 where an image has none; None if no image has one.
        seconds: time spent in forward passes; of the slowest process in a distributed run.
    """

    logits: Tensor
    labels: Tensor | None
    seconds: float

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.logits)

    @property
    def images_per_second(self) -> float:
        """Throughput of the forward passes, all processes together; infinite where no time was taken down."""
        return self.n / self.seconds if self.seconds else math.inf


def collect_logits(
    model: nn.Module,
    images: ImageDataset | PreprocessedImages,
    processor: Callable[..., Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    accelerator: Any = None,
    progress: bool = True,
    desc: str = "evaluate",
) -> Logits:
    """Logits of a classifier for all images, on every process.

    The model runs in eval mode without gradients, in its own dtype, on the accelerator's device, where it stays (one
    that was dispatched over devices is left alone); the training flags of its modules are put back.
    The first batch runs once more, untimed, before the clock starts: whichever model goes first would otherwise pay for
    loading kernels, and the others would look faster than they are. Decoding and preprocessing are not timed.

    Args:
        model: returns an object with ``logits``, a tuple that starts with them, or the ``(B, C)`` logits themselves.
        images: what `load_images` returns, or those already behind a processor.
        processor: image processor of the model; not needed for preprocessed images.
        batch_size: images per forward pass and process.
        accelerator: an ``accelerate.Accelerator``; None makes one, which follows ``accelerate launch``.
        progress: show a bar on the main process.
        desc: what the bar, and an error about the logits, calls this run.

    Raises:
        DataError: an image cannot be decoded or a label is not among the model's classes; the message names it.
        TokenPruneError: no processor, or the logits are NaN or infinite.
        UnsupportedModelError: the model returns no logits of shape ``(B, C)``.
        ImportError: `accelerate` is not installed.
    """
    accelerate = require("accelerate")
    if isinstance(images, ImageDataset):
        if processor is None:
            raise TokenPruneError("processor is missing: pass AutoImageProcessor.from_pretrained(the model's path)")
        images = PreprocessedImages(images, processor)
    accelerator = accelerator or accelerate.Accelerator()
    loader = batches(images, batch_size, collate, accelerator)
    place(model, accelerator)
    rows, labels, seconds = [], [], 0.0
    with eval_mode(model), torch.inference_mode(), accelerator.autocast():
        bar = tqdm(loader, desc=desc, disable=not (progress and accelerator.is_main_process))
        for step, batch in enumerate(bar):
            inputs = in_dtype_of(model, batch["inputs"])
            if step == 0:
                images.check_labels(_forward(model, inputs).shape[1])
            synchronize(accelerator.device)
            start = time.perf_counter()
            logits = _forward(model, inputs)
            synchronize(accelerator.device)
            seconds += time.perf_counter() - start
            # Drops what was repeated to give every process a full last batch.
            logits, label = accelerator.gather_for_metrics((logits.float(), batch["labels"]))
            rows.append(logits.cpu())
            labels.append(label.cpu())
        slowest = accelerator.gather(torch.tensor([seconds], device=accelerator.device)).max()
    all_labels = torch.cat(labels)
    return Logits(
        logits=as_logits(torch.cat(rows), f"logits of {desc!r}"),
        labels=all_labels if bool((all_labels >= 0).any()) else None,
        seconds=float(slowest),
    )


def batches(data: Any, batch_size: int, collate: Callable[[Any], Any], accelerator: Any) -> Any:
    """A loader of this process's part of the data, on the accelerator's device."""
    # What Accelerator.prepare calls. Going through the accelerator would make it hold the data for as long as it lives,
    # and even_batches=False, which is for training, would make processes wait for each other forever.
    return require("accelerate").data_loader.prepare_data_loader(
        DataLoader(data, batch_size=batch_size, collate_fn=collate),
        device=accelerator.device,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        put_on_device=True,
    )


def place(model: nn.Module, accelerator: Any) -> None:
    """Move a model to the accelerator's device, unless it was dispatched over devices."""
    if getattr(model, "hf_device_map", None) is None and _device(model) != accelerator.device:
        model.to(accelerator.device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own flag back: ``model.train()`` would also wake those that were frozen in eval."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple):
        logits = output[0]
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"none in {type(output).__name__}"
        raise UnsupportedModelError(
            f"{type(model).__name__} must return logits of shape (batch, classes), found {found}; load it with "
            "AutoModelForImageClassification"
        )
    return logits


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def in_dtype_of(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with floats in the dtype of the model's weights."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


def synchronize(device: torch.device) -> None:
    """Wait for a device, so that a clock sees what it did."""
    if device.type != "cpu":  # kernels run behind the clock's back
        torch.accelerator.synchronize(device)
