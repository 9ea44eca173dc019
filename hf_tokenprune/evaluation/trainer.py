"""For ``transformers.Trainer``."""

from collections.abc import Callable
from typing import Any

from hf_tokenprune.evaluation.scores import summarize


def compute_metrics(dense_logits: Any = None) -> Callable[[Any], dict[str, float]]:
    """Make the function that ``Trainer(compute_metrics=...)`` wants.

    Args:
        dense_logits: ``(n, C)`` of the dense model on the evaluation set, in its order; array or tensor. For example
            ``trainer.predict(dataset).predictions`` before pruning (of a tuple, the first part).

    Returns:
        A function of an ``EvalPrediction`` that gives ``accuracy`` and ``top5_accuracy`` (if there are labels), and
        ``agreement`` and ``kl`` (in nats) if ``dense_logits`` were given. Where the model returned more than logits
        (hidden states, say), ``predictions`` is a tuple and the logits are its first part.

    Raises:
        TokenPruneError: from that function, if ``dense_logits`` are of another shape than the predictions.
    """

    def metrics(prediction: Any) -> dict[str, float]:
        return summarize(_first(prediction.predictions), _first(prediction.label_ids), _first(dense_logits))

    return metrics


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
