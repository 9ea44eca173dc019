"""What a pruned model is to say again, and how far it is from it: classes, similarities, features or answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import find_adapter, unwrapped
from ..errors import ConfigError, TokenPruneError, UnsupportedModelError
from ..evaluation import ImageDataset, PreprocessedImages, QuestionDataset
from ..evaluation.loop import in_dtype_of
from ..evaluation.preprocess import collate
from ..evaluation.prompts import prompts
from ..evaluation.scores import as_logits, kl_divergence
from ..evaluation.teacher_forcing import answer_logits, mean_kl, up_to_end
from ..evaluation.zero_shot import TEMPLATES, ImageTower, similarity_to_classes

AsDense = Callable[[], AbstractContextManager[Any]]


class Target(ABC):
    """What the dense model says of samples, and the distance of what the model says now.

    Attributes:
        measure: see ``RecoveryReport``.
        data: the samples.
        names: of what each shows: those of the same image are held out together.
    """

    measure: str
    data: Any
    names: Sequence[str]

    @abstractmethod
    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch of samples."""

    @abstractmethod
    def dense(self, batch: Any) -> list[Tensor]:
        """What is kept of the dense model, for each of the B samples, on the CPU. The model is dense here."""

    @abstractmethod
    def distance(self, batch: Any, dense: Sequence[Tensor], as_dense: AsDense, temperature: float) -> Tensor:
        """(B,) float64, with gradients, of what the model says now; it is dense within ``as_dense()``.

        Args:
            temperature: that logits are divided by; the KL is multiplied by its square.
        """


def target_of(
    model: nn.Module,
    images: ImageDataset | PreprocessedImages | QuestionDataset,
    processor: Any,
    class_names: Sequence[str] | None,
    templates: Sequence[str] | None,
    prompt: str | None,
    new_tokens: int,
) -> Target:
    """What this model is to say of these images; see ``recover``. It is dense here.

    Raises:
        TokenPruneError: images and model, or a processor and what it is for, do not go together.
    """
    stock = unwrapped(model)
    if find_adapter(stock).shape(stock).kind == "decoder":
        if not isinstance(images, QuestionDataset):
            raise TokenPruneError("a vision-language model is asked questions: give what load_questions returns")
        if class_names is not None or templates is not None:
            raise ConfigError("class_names and templates have no effect on a vision-language model; leave them out")
        return Answers(model, images, processor, prompt, new_tokens)
    if isinstance(images, QuestionDataset):
        raise TokenPruneError(f"{type(stock).__name__} answers no questions: give what load_images returns")
    if prompt is not None:
        raise ConfigError(f"prompt has no effect: {type(stock).__name__} is asked no questions; leave it out")
    if templates is not None and class_names is None:
        raise ConfigError("templates= has no effect without class_names=; give both, or neither")
    if isinstance(images, ImageDataset):
        if processor is None:
            raise TokenPruneError("processor is missing: pass AutoImageProcessor.from_pretrained(the model's path)")
        images = PreprocessedImages(images, processor)
    if hasattr(stock, "get_text_features"):
        if class_names is None:
            tower = ImageTower(stock)
            return Features(images, lambda inputs: tower(**inputs), stock)
        templates = TEMPLATES if templates is None else templates
        return Logits(images, similarity_to_classes(stock, processor, class_names, templates), stock)
    if class_names is not None:
        raise ConfigError("class_names have no effect: this model has no text tower; leave them out")
    first = in_dtype_of(stock, collate([images[0]])["inputs"])
    with torch.no_grad():
        output = model(**{name: value.to(stock.device) for name, value in first.items()})
    if hasattr(output, "logits"):
        return Logits(images, lambda inputs: model(**inputs).logits, stock)
    return Features(images, lambda inputs: features_of(model(**inputs)), stock)


class Logits(Target):
    """(B, C) logits."""

    measure = "kl"

    def __init__(
        self, data: PreprocessedImages, run: Callable[[Mapping[str, Tensor]], Tensor], model: nn.Module
    ) -> None:
        self.data, self.names, self.run, self.model = data, data.images.names, run, model

    def collate(self, samples: Sequence[Any]) -> Any:
        return collate(samples)

    def said(self, batch: Any) -> Tensor:
        return self.run(in_dtype_of(self.model, batch["inputs"])).float().cpu()

    def dense(self, batch: Any) -> list[Tensor]:
        return [*as_logits(self.said(batch), "logits of the dense model")]

    def distance(self, batch: Any, dense: Sequence[Tensor], as_dense: AsDense, temperature: float) -> Tensor:
        wanted = torch.stack([*dense])
        return temperature**2 * kl_divergence(wanted / temperature, self.said(batch) / temperature)


class Features(Logits):
    """(B, D) features."""

    measure = "features"

    def distance(self, batch: Any, dense: Sequence[Tensor], as_dense: AsDense, temperature: float) -> Tensor:
        features = torch.stack([*dense]).double()
        return (self.said(batch).double() - features).square().sum(1) / features.square().sum(1)


def features_of(output: Any) -> Tensor:
    """What an encoder without a head says of B images: (B, D).

    Raises:
        UnsupportedModelError: it says it patch by patch.
    """
    pooled: Tensor | None = getattr(output, "pooler_output", None)
    if pooled is not None:
        return pooled
    states: Tensor | None = getattr(output, "last_hidden_state", None)
    if states is None:
        raise UnsupportedModelError(
            f"{type(output).__name__} has neither logits nor features of whole images: load the model with another head"
        )
    return states[:, 0]


class Answers(Target):
    """Tokens of answers, each (L,) int64; the logits before them are made anew, since they are many."""

    measure = "kl"

    def __init__(self, model: Any, data: QuestionDataset, processor: Any, prompt: str | None, new_tokens: int) -> None:
        self.model, self.data, self.names = model, data, data.images.names
        self.processor, self.prompt_of, self.new_tokens = processor, prompts(processor, prompt), new_tokens

    def collate(self, samples: Sequence[Any]) -> Any:
        return dict(
            self.processor(
                images=[sample["image"] for sample in samples],
                text=[self.prompt_of(sample["question"]) for sample in samples],
                padding=True,
                padding_side="left",  # every prompt ends where its answer begins
                return_tensors="pt",
            )
        )

    def dense(self, batch: Any) -> list[Tensor]:
        inputs = in_dtype_of(self.model, batch)
        found = self.model.generate(**inputs, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1)
        answers = found[:, inputs["input_ids"].shape[1] :]
        return [row[counts].cpu() for row, counts in zip(answers, up_to_end(self.model, answers), strict=True)]

    def distance(self, batch: Any, dense: Sequence[Tensor], as_dense: AsDense, temperature: float) -> Tensor:
        inputs = in_dtype_of(self.model, batch)
        tokens = nn.utils.rnn.pad_sequence([*dense], batch_first=True)
        counts = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in dense])[:, None]
        with as_dense(), torch.no_grad():
            wanted = answer_logits(self.model, inputs, tokens, counts)
        said = answer_logits(self.model, inputs, tokens, counts)
        return temperature**2 * mean_kl(wanted / temperature, said / temperature, counts)
