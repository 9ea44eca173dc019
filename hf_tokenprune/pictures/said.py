"""What a model says of one image, first dense and then pruned: its classes, or its answer to a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..engine import find_adapter, unwrapped
from ..errors import TokenPruneError, UnsupportedModelError
from ..evaluation.classes import names_of
from ..evaluation.loop import in_dtype_of
from ..evaluation.scores import kl_divergence
from ..evaluation.teacher_forcing import answer_logits, mean_kl, up_to_end
from ..evaluation.zero_shot import similarity_to_classes

BEST = 5
Logits = Callable[[Mapping[str, Any]], "Tensor | None"]


class Said(NamedTuple):
    """Fields of a ``TracedRun``."""

    answer: str | None
    classes: tuple[tuple[str, float], ...]
    kl: float | None


class Classes:
    """Of an encoder.

    Args:
        inputs: of one image; pixels of any size.
        logits: the function from inputs to (1, C); to None, where the model says no classes.
        names: of the classes; None: what the model's config calls them.
    """

    noun: ClassVar[str] = "block"

    def __init__(self, model: Any, inputs: Mapping[str, Any], logits: Logits, names: Sequence[str] | None) -> None:
        self.stock, self.logits = unwrapped(model), logits
        self.names = names_of(self.stock) if names is None else dict(enumerate(names))
        pixels = inputs["pixel_values"]
        # Else the processor has cut them into patches.
        whole = find_adapter(self.stock).image_inputs(self.stock, pixels) if pixels.dim() == 4 else {}
        self.inputs = placed(model, {**inputs, **whole})

    def count(self, adapter: Any) -> tuple[int, int]:
        """Prunable tokens of the image, and tokens that enter the first block."""
        rows, columns = adapter.views(self.stock, self.inputs, (1, 1))[0].grid
        return rows * columns, rows * columns + adapter.shape(self.stock).num_protected

    def dense(self) -> Said:
        """Of the model as it is."""
        self.reference = self.logits(self.inputs)
        return self.pruned()

    def pruned(self) -> Said:
        """Of the model as it is now, beside the dense one."""
        logits = self.logits(self.inputs)
        if logits is None or self.reference is None:
            return Said(None, (), None)
        best = logits[0].float().softmax(-1).cpu().topk(min(BEST, logits.shape[1]))
        called = [(self.names or {}).get(i, f"class {i}") for i in best.indices.tolist()]
        kl = float(kl_divergence(self.reference.cpu(), logits.cpu()))
        return Said(called[0], tuple(zip(called, best.values.tolist(), strict=True)), kl)


def classifier(model: Any, processor: Any, class_names: Sequence[str] | None) -> tuple[Logits, Sequence[str] | None]:
    """The function from inputs to logits, and what its classes are called, for ``Classes``.

    Raises:
        TokenPruneError: names of classes for a model without a text tower.
    """
    stock = unwrapped(model)
    if hasattr(stock, "get_text_features"):
        if class_names is not None:
            return similarity_to_classes(stock, processor, class_names), class_names
        model = find_adapter(stock).encoder(stock)
    elif class_names is not None:
        raise TokenPruneError(f"class_names have no effect: {type(stock).__name__} has no text tower")

    def logits(inputs: Mapping[str, Any]) -> Tensor | None:
        found: Tensor | None = getattr(model(**inputs), "logits", None)
        return found if found is not None and found.dim() == 2 else None

    return logits, None


class Answers:
    """Of a vision-language model; the KL is of the next token along the dense answer.

    Args:
        inputs: of one prompt with one image.
        most: tokens of an answer.

    Raises:
        UnsupportedModelError: the model does not generate.
    """

    noun: ClassVar[str] = "layer"

    def __init__(self, model: Any, inputs: Mapping[str, Any], processor: Any, most: int) -> None:
        if getattr(model, "generate", None) is None:
            name = type(model).__name__
            raise UnsupportedModelError(f"{name} has no generate(); load it with AutoModelForImageTextToText")
        self.model, self.stock, self.processor, self.most = model, unwrapped(model), processor, most
        self.inputs = placed(model, inputs)

    def count(self, adapter: Any) -> tuple[int, int]:
        """Tokens of the image, and of the whole prompt."""
        ids = self.inputs["input_ids"]
        placeholder = getattr(self.stock.config, adapter.placeholders["image"])
        return int((ids == placeholder).sum()), ids.shape[1]

    def dense(self) -> Said:
        """Of the model as it is."""
        self.tokens = self._generate()
        self.counts = up_to_end(self.stock, self.tokens)
        self.reference = self._logits()
        return Said(self._text(self.tokens), (), 0.0)

    def pruned(self) -> Said:
        """Of the model as it is now, beside the dense one."""
        kl = float(mean_kl(self.reference, self._logits(), self.counts))
        return Said(self._text(self._generate()), (), kl)

    def _generate(self) -> Tensor:
        made: Tensor = self.model.generate(**self.inputs, max_new_tokens=self.most, do_sample=False)
        return made[:, self.inputs["input_ids"].shape[1] :]

    def _logits(self) -> Tensor:
        return answer_logits(self.stock, self.inputs, self.tokens, self.counts)

    def _text(self, tokens: Tensor) -> str:
        return str(self.processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()


def placed(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of what a processor made, where the model is and in its dtype."""
    tensors = {name: value.to(model.device) for name, value in inputs.items() if isinstance(value, Tensor)}
    return in_dtype_of(model, tensors)
