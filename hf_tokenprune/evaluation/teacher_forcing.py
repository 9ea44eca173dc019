"""What a vision-language model says before each token of a given answer, as ``generate`` would run it.

A prefill of the prompt alone, in which image tokens may leave, then the answer behind the cache, in one forward: in a
single forward over both, a method that reads the text would choose by the answer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_tokenprune.evaluation.scores import kl_divergence

PLACEHOLDERS = ("image_token_id", "video_token_id")


def up_to_end(model: Any, answer: Tensor) -> Tensor:
    """Which of the tokens (B, L) that ``generate`` made are not behind the end of their answer: (B, L) bool.

    A placeholder of an image, should a model say one, is an end too: fed again, it would ask for an image.
    """
    eos = model.generation_config.eos_token_id
    ends = [*(eos if isinstance(eos, list) else [eos]), *(getattr(model.config, name, None) for name in PLACEHOLDERS)]
    known = torch.tensor([token for token in ends if token is not None], device=answer.device, dtype=torch.long)
    is_end = torch.isin(answer, known)
    return is_end.long().cumsum(1) - is_end.long() == 0


def answer_logits(model: Any, batch: Mapping[str, Tensor], tokens: Tensor, counts: Tensor) -> Tensor:
    """The logits from which the P tokens of the answers that count are chosen, sample by sample.

    Args:
        model: with a language modelling head.
        batch: inputs of ``generate``, padded on the left.
        tokens: (B, L) int64 answers, teacher-forced.
        counts: (B, L) bool, which of them count: in every row the first ones.

    Returns:
        (P, V) float32 on the CPU.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).long()
    positions = model._prepare_position_ids_for_generation  # of one axis or several, as generate makes them
    inputs: dict[str, Any] = {**batch, "attention_mask": mask}
    inputs["position_ids"] = positions(ids, inputs)
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    logits, tokens = output.logits, tokens.to(ids.device)
    fed = tokens[:, :-1].where(counts[:, 1:].to(ids.device), 0)  # nothing is asked of the last one, nor behind it
    if fed.shape[1]:
        cache = "cache" if "cache" in output else "past_key_values"  # the latter before Transformers 5.24
        inputs = {"input_ids": fed, "attention_mask": torch.cat([mask, torch.ones_like(fed)], 1), cache: output[cache]}
        inputs["position_ids"] = positions(fed, inputs)[..., -fed.shape[1] :]
        # As assisted decoding has candidates checked: so a pruned model knows that this is no further turn of a chat.
        logits = torch.cat([logits, model(**inputs, use_cache=True, logits_to_keep=fed.shape[1]).logits], 1)
    return logits[counts.to(logits.device)].float().cpu()


def mean_kl(dense: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
    """KL(dense || other) of the next token in nats, mean over the tokens of each answer: (B,) float64.

    Args:
        dense, logits: (P, V) of the two models, what `answer_logits` returns.
        counts: (B, L) bool, as given to it.
    """
    return torch.stack([of_one.mean() for of_one in kl_divergence(dense, logits).split(counts.sum(1).tolist())])
