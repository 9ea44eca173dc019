"""What stock ``generate`` says before each token of an answer that it is made to give, for one prompt alone."""

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from .decoder_visuals import Inputs

NEW_TOKENS = 5


class Forced(LogitsProcessor):
    """Makes ``generate`` say given tokens; its ``output_logits`` are those before this."""

    def __init__(self, tokens: Tensor, start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.start]] = 0
        return forced


def generated(model: PreTrainedModel, inputs: Inputs, answer: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(L,) tokens that stock generate answers, or is made to answer, and the (L, V) logits of each."""
    start = inputs["input_ids"].shape[1]
    forced = {} if answer is None else {"logits_processor": [Forced(answer, start)]}
    output = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS if answer is None else len(answer),
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **forced,
    )
    return output.sequences[0, start:], torch.cat(output.logits)


def kl(dense: Tensor, other: Tensor) -> Tensor:
    """(L,) KL(dense || other) from two (L, V)."""
    log_p, log_q = dense.double().log_softmax(1), other.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
