"""For engines that make room for a prompt before they see its images: prompts as long as what stays of them.

Stock Transformers, ``pipeline`` and ``transformers serve`` need none of this: there ``prune`` is enough.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..engine import ConfigLike, attach, find_adapter
from ..errors import ConfigError, UnsupportedModelError

Model = TypeVar("Model", bound=nn.Module)
Processor = TypeVar("Processor")


def short_prompts(model: Model, processor: Processor, config: ConfigLike | None = None) -> tuple[Model, Processor]:
    """Let image tokens leave before the prompt: fewer placeholders, and only the features that were chosen.

    The processor that is returned writes as many placeholders for an image as tokens of it stay, and
    ``model.get_image_features`` returns those. All else is stock: any cache, any engine that calls these two. Logits
    and tokens are those of ``prune(model, config)`` with its own processor.

    ``unprune(model)`` undoes it; the processor that was given is never changed. Saving the model saves its config, by
    which it is pruned in the usual way when it is loaded.

    Args:
        model: a vision-language model that is not pruned; changed in place.
        processor: of this model, from ``AutoProcessor``.
        config: as ``hf_tokenprune.prune`` takes it. It has to choose in front of the decoder, by each image alone.

    Returns:
        The same model, and a processor of the same class that shares tokenizer and image processor with the given one.

    Raises:
        UnsupportedModelError: what stays of an image does not follow from its size alone, or it has places that a
            shorter prompt cannot tell; the message says which.
        ConfigError: the config does not fit, or the processor is not this model's.
        PruneStateError: the model is already pruned.
    """
    adapter = find_adapter(model)
    if adapter.shape(model).kind != "decoder":
        raise UnsupportedModelError(
            f"short prompts are for vision-language models, and {type(model).__name__} takes no prompt; use prune"
        )
    adapter.check_short_prompts(model)
    token, of_model = getattr(processor, "image_token_id", None), model.config.image_token_id  # type: ignore[union-attr]
    if token != of_model or not hasattr(processor, "replace_image_token"):
        raise ConfigError(
            f"{type(processor).__name__} has image_token_id={token!r}, and this model {of_model}: expected the "
            "processor of this checkpoint, AutoProcessor.from_pretrained(...)"
        )
    name = adapter.processor_name(model)
    if name not in ("", *(base.__name__ for base in type(processor).__mro__)):
        raise ConfigError(
            f"{type(processor).__name__} is of another family, and writes another number of placeholders: "
            f"expected {name}, as AutoProcessor.from_pretrained(...) of this checkpoint gives"
        )
    if isinstance(processor, ShortPlaceholders):
        raise ConfigError(
            "this processor makes short prompts already; give the stock one, AutoProcessor.from_pretrained(...)"
        )
    attach(model, config, short=True)
    (state,) = adapter.states(model)
    return model, _shortened(processor, adapter.short_length(model, state.stages))


def _shortened(processor: Processor, length: Any) -> Processor:
    """A copy of a processor, of a class of the same name, so that it saves as what it was."""
    cls = type(processor)
    shortened = copy.copy(processor)
    shortened.__class__ = type(cls.__name__, (ShortPlaceholders, cls), {"stock": cls, "length": length})
    return shortened


class ShortPlaceholders:
    """Before a processor's own class: what it writes for an image has as many placeholders as tokens stay."""

    stock: ClassVar[Any]
    length: ClassVar[Any]
    image_token: str

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        text: str = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        number = text.count(self.image_token)
        return text.replace(self.image_token, "", number - self.length(number))

    def replace_video_token(self, *args: Any, **kwargs: Any) -> str:
        raise UnsupportedModelError("short prompts are of images. Give no videos, or use prune(model, config)")

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, video_sizes: Any = None, **kwargs: Any) -> Any:
        """What engines ask for before they call the processor; of videos nothing is told, as by one that has none."""
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)  # type: ignore[misc]
        if image_sizes is not None:
            tile = self.length.tile
            # Idefics3 says 0 where it does not cut an image.
            lengths = [tile * max(1, n) for n in data.num_image_patches] if tile else data.num_image_tokens
            data.num_image_tokens = [
                total - length + self.length(length)
                for total, length in zip(data.num_image_tokens, lengths, strict=True)
            ]
        return data

    def __reduce__(self) -> Any:
        stock = self.stock.__new__(self.stock)
        vars(stock).update(vars(self))
        return _shortened, (stock, self.length)
