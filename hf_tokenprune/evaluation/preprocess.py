"""Images to model inputs, once for all arms that share a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation.images import ImageDataset


class Example(TypedDict):
    """What the processor made of one image, without batch axis, and its label (-1 without one)."""

    inputs: dict[str, Tensor]
    label: int


class Batch(TypedDict):
    """B examples: every input with a batch axis first, and ``(B,)`` int64 labels."""

    inputs: dict[str, Tensor]
    labels: Tensor


class PreprocessedImages(Dataset[Example]):
    """Images behind an image processor.

    Args:
        images: what `load_images` returns.
        processor: an image processor of transformers, or a callable like one: ``processor(images=[image],
            return_tensors="pt")`` gives a mapping of ``(1, ...)`` tensors.
    """

    def __init__(self, images: ImageDataset, processor: Callable[..., Mapping[str, Any]]) -> None:
        self.images = images
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """Decode and process one image.

        Raises:
            DataError: it cannot be decoded; the message names it.
        """
        label = self.images.labels[index]
        batch = self.processor(images=[self.images[index]["image"]], return_tensors="pt")
        inputs = {key: value[0] for key, value in batch.items() if isinstance(value, Tensor)}
        return {"inputs": inputs, "label": -1 if label is None else label}

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
        inputs = {key: torch.stack([example["inputs"][key] for example in examples]) for key in examples[0]["inputs"]}
    except RuntimeError as error:
        raise DataError(
            f"the processor makes inputs of different sizes ({error}); have it resize or crop to one size, or use "
            "batch_size=1"
        ) from error
    return {"inputs": inputs, "labels": torch.tensor([example["label"] for example in examples])}
