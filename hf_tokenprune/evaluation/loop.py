"""Run a classifier over images and keep its logits: on one device, or on many through `accelerate`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
from hf_tokenprune.evaluation.turns import DENSE, Turns, Variants


@dataclass(frozen=True)
class Logits:
    """What a model said about n images, in their order.

    Attributes:
        logits: ``(n, C)`` float32 on the CPU.
        labels: ``(n,)`` int64 on the CPU, -1 where an image has none; None if no image has one.
        seconds: time spent in forward passes; of the slowest process for every batch of a distributed run. Times of two
            models that ran one after the other do not compare: `evaluate_paired` lets them take turns.
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
    logits, labels = Rows(len(images)), Rows(len(images))

    def keep(said: dict[str, Tensor], label: Tensor) -> None:
        logits.add(said[DENSE])
        labels.add(label)

    turns, _ = run_in_turn(model, images, {}, keep, batch_size, accelerator, progress, desc)
    return Logits(
        logits=as_logits(logits.all, f"logits of {desc!r}"),
        labels=labels.all if bool((labels.all >= 0).any()) else None,
        seconds=sum(turns.slowest()[DENSE]),
    )


def run_in_turn(
    model: nn.Module,
    images: PreprocessedImages,
    variants: Variants,
    on_batch: Callable[[dict[str, Tensor], Tensor], None],
    batch_size: int,
    accelerator: Any,
    progress: bool,
    desc: str = "evaluate",
) -> tuple[Turns, list[int]]:
    """Every batch through the model as it is and through its variants; see `collect_logits` and `Turns`.

    Args:
        on_batch: is given, on every process, the ``(B, C)`` float32 logits by arm and the ``(B,)`` labels (-1 for none)
            of the batches of all processes together, on the CPU.

    Returns:
        The turns with their times, and the number of images in every batch, all processes together.
    """
    loader = batches(images, batch_size, collate, accelerator)
    place(model, accelerator)
    turns = Turns(model, variants, accelerator)
    counts: list[int] = []
    for batch in tqdm(loader, desc=desc, disable=not (progress and accelerator.is_main_process)):
        every = {DENSE: batch["inputs"], **batch["others"]}
        call = partial(_forward, model, {name: in_dtype_of(model, inputs) for name, inputs in every.items()})
        if not counts:
            images.check_labels(turns.warm_up(call).shape[1])
        said = {name: logits.float() for name, logits in turns.take(call).items()}
        with torch.inference_mode():
            # Drops what was repeated to give every process a full last batch.
            said, labels = accelerator.gather_for_metrics((said, batch["labels"]))
        counts.append(len(labels))
        on_batch({name: logits.cpu() for name, logits in said.items()}, labels.cpu())
    return turns, counts


class Rows:
    """A tensor of ``n`` rows that comes in parts, in their order, and is held once.

    Attributes:
        all: ``(n, ...)``.
    """

    all: Tensor

    def __init__(self, n: int) -> None:
        self.n = n
        self.filled = 0

    def add(self, part: Tensor) -> None:
        """The next rows."""
        if not self.filled:
            self.all = torch.empty(self.n, *part.shape[1:], dtype=part.dtype)
        self.all[self.filled : self.filled + len(part)] = part
        self.filled += len(part)


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


def _forward(model: nn.Module, inputs: Mapping[str, dict[str, Tensor]], arm: str) -> Tensor:
    output = model(**inputs.get(arm, inputs[DENSE]))
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
