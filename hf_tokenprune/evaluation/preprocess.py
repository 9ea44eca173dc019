"""Images to model inputs, once for all arms that share a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation.images import ImageDataset


class Example(TypedDict):
    """What the processor, and others by name, made of one image, without batch axis; its label (-1 without one)."""

    inputs: dict[str, Tensor]
    others: dict[str, dict[str, Tensor]]
    label: int


class Batch(TypedDict):
    """B examples: every input with a batch axis first, and ``(B,)`` int64 labels."""

    inputs: dict[str, Tensor]
    others: dict[str, dict[str, Tensor]]
    labels: Tensor


class PreprocessedImages(Dataset[Example]):
    """Images behind an image processor.

    Args:
        images: what `load_images` returns.
        processor: an image processor of transformers, or a callable like one: ``processor(images=[image],
            return_tensors="pt")`` gives a mapping of ``(1, ...)`` tensors.
        others: further ones by name, for runs that see the images otherwise.
    """

    def __init__(
        self,
        images: ImageDataset,
        processor: Callable[..., Mapping[str, Any]],
        others: Mapping[str, Callable[..., Mapping[str, Any]]] | None = None,
    ) -> None:
        self.images = images
        self.processor = processor
        self.others = others or {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """Decode and process one image.

        Raises:
            DataError: it cannot be decoded; the message names it.
        """
        label, image = self.images.labels[index], self.images[index]["image"]
        others = {name: _inputs(other, image) for name, other in self.others.items()}
        return {"inputs": _inputs(self.processor, image), "others": others, "label": -1 if label is None else label}

    def check_labels(self, n_classes: int) -> None:
        """Hold the labels against the number of classes of a model.

        Raises:
            DataError: a label is not below ``n_classes``, or the source names another number of classes.
        """
        labels, classes = self.images.labels, self.images.classes
        for name, label in zip(self.images.names, labels, strict=True):
            if label is not None and label >= n_classes:
                raise DataError(
                    f"{name}: label {label} is outside the model's {n_classes} classes (0..{n_classes - 1}); correct "
                    "the label, or evaluate without labels (label_column=None, --no-labels)"
                )
        if classes is not None and len(classes) != n_classes:
            raise DataError(
                f"the images have {len(classes)} classes ({', '.join(classes[:3])}, ...), the model has {n_classes}, "
                "so its class numbers mean something else; give the model's in a labels.csv or in an integer column, "
                "or evaluate without labels (label_column=None, --no-labels)"
            )


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples.

    Raises:
        DataError: the processor made inputs of different sizes.
    """
    try:
        inputs = _stacked([example["inputs"] for example in examples])
        others = {name: _stacked([example["others"][name] for example in examples]) for name in examples[0]["others"]}
    except RuntimeError as error:
        raise DataError(
            f"the processor makes inputs of different sizes ({error}); have it resize or crop to one size, or use "
            "batch_size=1"
        ) from error
    return {"inputs": inputs, "others": others, "labels": torch.tensor([example["label"] for example in examples])}


def _inputs(processor: Callable[..., Mapping[str, Any]], image: Any) -> dict[str, Tensor]:
    batch = processor(images=[image], return_tensors="pt")
    return {key: value[0] for key, value in batch.items() if isinstance(value, Tensor)}


def _stacked(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([each[key] for each in inputs]) for key in inputs[0]}
