"""How far the answers of a pruned vision-language model are from the dense one's, token by token.

The dense model answers once. A candidate is then measured on that answer, teacher-forced, as ``generate`` would run it:
a prefill of the prompt alone, in which image tokens leave, then the answer behind the cache, in one forward.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..config import PruneConfig
from ..engine import find_adapter, plan, pruned
from ..errors import ConfigError, UnsupportedModelError
from ..evaluation.teacher_forcing import answer_logits, mean_kl, up_to_end
from .objective import Goal

NEW_TOKENS = 16
"""Of a dense answer, at most."""
STATES = ("last_hidden_state", "hidden_states", "attentions")
"""Of a vision tower's output, what nobody reads behind it, and what is large."""


class AnswerObjective:
    """Mean distortion over prompts with images, 0 for the dense model.

    Args:
        model: dense, in eval mode, with a language modelling head.
        batches: inputs of ``generate``, padded on the left.
        goal: "kl" or "geometric_kl", plain or geometric mean over prompts of KL(dense || pruned) of the next token in
            nats, plain mean over the tokens of an answer; "agreement", the fraction of answers of which any token
            differs; or "accuracy", the fraction of ``labels`` of which any token is not the most probable one, which is
            not 0 for the dense model.
        labels: (n, L) int64, tokens of the answers to measure on, negative behind the end of each; None: what the dense
            model answers.
        new_tokens: of a dense answer, at most; None: 16.

    Raises:
        ConfigError: inputs, labels or number of tokens that make no answers; the message says which.
        UnsupportedModelError: the model cannot generate.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[Mapping[str, Tensor]],
        goal: Goal = "kl",
        labels: Tensor | None = None,
        new_tokens: int | None = None,
    ) -> None:
        if not model.can_generate():
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot answer; load the checkpoint with a class that has a language modelling "
                "head, such as AutoModelForImageTextToText"
            )
        if goal == "accuracy" and labels is None:
            raise ConfigError("goal='accuracy' needs labels; without them use 'kl', 'geometric_kl' or 'agreement'")
        if new_tokens is not None and labels is not None:
            raise ConfigError(
                f"new_tokens={new_tokens} has no effect on answers that are given as labels; leave it out"
            )
        self.model, self.batches, self.goal, self.labels = model, batches, goal, labels
        self.new_tokens = NEW_TOKENS if new_tokens is None else new_tokens
        if self.new_tokens < 1:
            raise ConfigError(f"new_tokens={new_tokens}: expected at least 1")
        self.adapter = find_adapter(model)
        for batch in batches:
            check_prompts(batch)
        self.sizes = [len(batch["input_ids"]) for batch in batches]
        given = None if labels is None else check_labels(labels, self.sizes, self._placeholders())
        self.features: list[dict[str, Any]] = [{} for _ in batches]  # of each batch, by the method that makes them
        self.answers: list[tuple[Tensor, Tensor]] = []  # of each batch, (B, L) tokens; (B, L) bool, which of them count
        dense, self.seconds = [], 0.0
        with torch.inference_mode():
            for i, (batch, features) in enumerate(zip(batches, self.features, strict=True)):
                with self._encoded_once(features):
                    self.answers.append(self._answer(batch) if given is None else filled(given[i]))
                    start = time.perf_counter()
                    dense.append(answer_logits(model, batch, *self.answers[-1]))
                    self.seconds += time.perf_counter() - start
        self.dense = torch.cat(dense)
        """(P, V) float32: what the dense model says before each token of the answers, one prompt after the other.

        ``seconds`` is how long that takes it, images not counted.
        """

    @property
    def n(self) -> int:
        """Number of prompts."""
        return sum(self.sizes)

    def part_run(self, place: int) -> float:
        """The part of the dense model's ``seconds`` that a candidate takes at most."""
        return 1.0

    def values(self, config: PruneConfig) -> Iterator[Tensor]:
        """Batch by batch, the distortion of each prompt. The model is dense again when the iterator is closed."""
        stages = plan(config, self.adapter.shape(self.model))
        in_tower = any(stage.where == "vision_tower" for stage in stages)  # then the features are not the dense ones
        start = 0
        with pruned(self.model, config):
            for batch, features, (tokens, counts) in zip(self.batches, self.features, self.answers, strict=True):
                with torch.inference_mode(), nullcontext() if in_tower else self._encoded_once(features):
                    logits = answer_logits(self.model, batch, tokens, counts)
                yield self._distortion(self.dense[start : start + len(logits)], logits, tokens, counts)
                start += len(logits)

    def _distortion(self, dense: Tensor, logits: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        if self.goal in ("geometric_kl", "kl"):
            return mean_kl(dense, logits, counts)
        wanted = dense.argmax(1) if self.goal == "agreement" else tokens[counts].cpu()
        differs = logits.argmax(1) != wanted
        return torch.stack([of_one.any() for of_one in differs.split(counts.sum(1).tolist())]).double()

    def _answer(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the model answers, greedily: (B, L) tokens, and which of them are not behind the end."""
        settings = self.model.generation_config
        forbidden = [*(settings.suppress_tokens or ()), *self._placeholders()]  # there would be no image for them
        found = self.model.generate(
            **batch, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1, suppress_tokens=forbidden
        )
        answer = found[:, batch["input_ids"].shape[1] :]
        return answer, up_to_end(self.model, answer)

    def _placeholders(self) -> list[int]:
        return [getattr(self.model.config, name) for name in self.adapter.placeholders.values()]

    @contextmanager
    def _encoded_once(self, features: dict[str, Any]) -> Iterator[None]:
        """Inside, images and videos are encoded if ``features`` does not have them yet, and then kept there."""
        inner = self.adapter.inner(self.model)
        encoding: list[str] = []

        def once(name: str, encode: Any) -> Any:
            @functools.wraps(encode)  # generate reads the signature
            def encoded(*args: Any, **kwargs: Any) -> Any:
                if encoding:  # some families encode videos as images
                    return encode(*args, **kwargs)
                if name not in features:
                    encoding.append(name)
                    output = encode(*args, **kwargs)
                    encoding.clear()
                    read = {name: value for name, value in output.items() if name not in STATES}
                    features[name] = type(output)(**read)
                    features[name].pooler_output = output.pooler_output  # no field of it in Transformers 5.17
                return features[name]

            return encoded

        with ExitStack() as undo:
            for name in (f"get_{kind}_features" for kind in self.adapter.placeholders):
                # An attribute of the instance goes before the method of its class.
                inner.__dict__[name] = once(name, getattr(inner, name))
                undo.callback(inner.__dict__.pop, name)
            yield


def check_prompts(batch: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless the batch has prompts that all end in its last column."""
    if "input_ids" not in batch:
        raise ConfigError(f"batches need input_ids, got {', '.join(batch)}: give what the processor makes of prompts")
    mask = batch.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ConfigError("prompts are padded on the right; answers follow them, so pad with padding_side='left'")


def check_labels(labels: Tensor, sizes: list[int], placeholders: list[int]) -> tuple[Tensor, ...]:
    """The labels of each batch, if there are as many as prompts, and each starts with its tokens."""
    if labels.ndim != 2 or len(labels) != sum(sizes):
        raise ConfigError(
            f"labels of shape {tuple(labels.shape)}: expected ({sum(sizes)}, L), tokens of one answer a prompt"
        )
    counts = labels >= 0
    if not bool(counts[:, 0].all()) or bool((counts[:, 1:] & ~counts[:, :-1]).any()):
        raise ConfigError("labels: expected the tokens of each answer, at least one, and negative numbers behind them")
    if bool(torch.isin(labels, torch.tensor(placeholders, device=labels.device)).any()):
        raise ConfigError(f"labels have placeholders of images ({placeholders}): expected tokens of text")
    return labels.split(sizes)


def filled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) tokens without negative ones, and which of them count; columns that no answer reaches are cut off."""
    counts = labels >= 0
    counts = counts[:, : int(counts.sum(1).max())]
    labels = labels[:, : counts.shape[1]]
    return torch.where(counts, labels, labels[:, :1]), counts
