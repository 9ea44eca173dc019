"""Bring a pruned model nearer to its dense self, on images without labels: a few of its parameters are trained.

Importing this needs no more than the package; accelerate (``pip install "hf-tokenprune[eval]"``) is imported by use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from ..engine import current_config, find_adapter, unwrapped
from ..errors import PruneStateError
from ..weights import forget
from .report import RecoveryReport

if TYPE_CHECKING:
    from ..evaluation import ImageDataset, PreprocessedImages, QuestionDataset

__all__ = ["RecoveryReport", "merge_recovery", "recover"]

Model = TypeVar("Model", bound=nn.Module)


def recover(
    model: nn.Module,
    images: ImageDataset | PreprocessedImages | QuestionDataset,
    processor: Callable[..., Any] | None = None,
    *,
    passes: int = 10,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    held_out: float = 0.1,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    prompt: str | None = None,
    new_tokens: int = 16,
    checkpoint: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = True,
) -> RecoveryReport:
    """Train norms and biases of a pruned model, in place, until it says what it says dense.

    Labels are not needed. What the dense model says, with the values that it had, is what is learned: the classes of a
    classifier, the similarities of a two-tower model to ``class_names``, the tokens that a vision-language model
    answers, the features of an encoder without a head. Images that are held out decide which values are kept, so on
    these the model is never farther from the dense one than before. ``unprune`` takes the values out again,
    ``save_pretrained`` writes them into a file of their own, and ``merge_recovery`` makes them the model's.

    Of a ``PeftModel`` the parameters that its adapters leave trainable are trained, in place of norms and biases; they
    are PEFT's to save and to merge.

    Under ``accelerate launch`` every process has a part of each batch. The same arguments give the same values.

    Args:
        model: pruned, in float32 or bfloat16. If this raises, it is as it was.
        images: what ``load_images`` or, for a vision-language model, ``load_questions`` returns.
        processor: of the model; for vision-language models, and with ``class_names``, that of images and texts.
        passes: over the images, at most: it ends after 3 that were no better on those held out.
        learning_rate: the highest of AdamW, without weight decay: it rises for a tenth of the steps and falls as a
            cosine does.
        batch_size: images or questions a step and process.
        held_out: part of the images that is not trained on, at least one.
        seed: of the order of the images.
        class_names: for a two-tower model, what its images are compared with; None: their embeddings are what is
            learned.
        templates: texts with ``{}`` where a class name goes; None: "a photo of a {}.".
        prompt: for a vision-language model, see ``collect_answers``.
        new_tokens: of an answer, at most.
        checkpoint: a file that is written after each pass, and from which the same call goes on if it is there.
        accelerator: an ``accelerate.Accelerator``; None makes one, which follows ``accelerate launch``.
        progress: show a bar on the main process.

    Raises:
        PruneStateError: the model is not pruned.
        ConfigError: a number out of range, an argument that has no effect, or ``checkpoint`` is of other arguments.
        DataError: an image cannot be read, there are fewer than two, or class names and templates cannot be used.
        UnsupportedModelError: the model is in float16, or its parameters are offloaded or sharded.
        ImportError: `accelerate` is not installed.
    """
    from .training import Settings, train

    settings = Settings(passes, learning_rate, batch_size, held_out, seed)
    texts: dict[str, Any] = {
        "class_names": class_names, "templates": templates, "prompt": prompt, "new_tokens": new_tokens,
    }  # fmt: skip
    return train(model, images, processor, settings, texts, checkpoint, accelerator, progress)


def merge_recovery(model: Model) -> Model:
    """Let the recovered values of a pruned model be its own, so that it is saved as a checkpoint without their file.

    ``unprune`` does not take them out any more.

    Returns:
        The model.

    Raises:
        PruneStateError: there are none in it.
    """
    stock = unwrapped(model)
    config = current_config(stock)
    if config is None or config.recovery is None:
        raise PruneStateError("this model has no recovered values to merge; hf_tokenprune.recover makes them")
    forget(stock)
    for state in find_adapter(stock).states(stock):
        state.config = config.with_recovery(None)
    return model
