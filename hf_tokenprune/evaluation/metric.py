"""`evaluate` metric for pruned models. It is a class, not a Hub script, so it works offline."""

from typing import Any

import torch

from hf_tokenprune.errors import TokenPruneError
from hf_tokenprune.evaluation.optional import missing
from hf_tokenprune.evaluation.scores import summarize

try:
    import datasets
    import evaluate
except ModuleNotFoundError as error:
    raise missing(error) from error

_DESCRIPTION = "Accuracy of a classifier and, next to the logits of its dense original, how far pruning moved it."

_INPUTS = """
Args:
    predictions: logits, (n, C).
    references: labels, (n,) int; -1 or None where there is none.
    dense_predictions: logits of the dense model on the same images, (n, C); optional.
Returns:
    accuracy: fraction of labelled images whose label has the largest logit, 0 to 1.
    top5_accuracy: the same for the five largest; with five or fewer classes it is 1 by definition.
    agreement: fraction of images for which both models name the same class, 0 to 1. Only with dense_predictions.
    kl: mean KL(softmax(dense) || softmax(pruned)) in nats, 0 or more. Only with dense_predictions.
Examples:
    >>> from hf_tokenprune.evaluation import TokenPruningMetric
    >>> TokenPruningMetric().compute(predictions=[[2.0, 0.0], [0.0, 1.0]], references=[0, 0])
    {'accuracy': 0.5, 'top5_accuracy': 1.0}
"""


class TokenPruningMetric(evaluate.Metric):
    """Accuracy, top-5 accuracy, agreement with the dense model and KL to it, as an ``evaluate.Metric``.

    Use it as any other: ``compute(...)``, or ``add_batch(...)`` and then ``compute()``, or inside ``evaluate.combine``
    (whose ``add_batch`` wants every input named: pass ``dense_predictions=None`` if there are none).

    Raises:
        TokenPruneError: from ``compute``: shapes that do not match, dense logits for some images only, NaN, neither
            labels nor dense logits.
    """

    def _info(self) -> evaluate.EvaluationModuleInfo:
        logits = datasets.Sequence(datasets.Value("float32"))
        return evaluate.EvaluationModuleInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": logits, "references": datasets.Value("int64"), "dense_predictions": logits}
            ),
        )

    # evaluate has no optional inputs. A missing one is stored as "no label" (-1) or as an empty row of logits. The
    # base class's compute passes what it is given on to add_batch, so that is the one place to fill in.

    def compute(
        self, *, predictions: Any = None, references: Any = None, dense_predictions: Any = None, **kwargs: Any
    ) -> dict[str, float] | None:
        """Scores of what was added, or of the inputs given here. None on all but the main process."""
        return super().compute(
            predictions=predictions, references=references, dense_predictions=dense_predictions, **kwargs
        )

    def add_batch(
        self, *, predictions: Any = None, references: Any = None, dense_predictions: Any = None, **kwargs: Any
    ) -> None:
        """Add logits, labels (optional) and dense logits (optional) of a batch."""
        if predictions is None:
            raise TokenPruneError("predictions are missing: pass the logits of the model, one row an image")
        n = len(predictions)
        super().add_batch(
            predictions=_rows(predictions),
            references=[-1] * n
            if references is None
            else [-1 if label is None else int(label) for label in references],
            dense_predictions=[[]] * n if dense_predictions is None else _rows(dense_predictions),
            **kwargs,
        )

    def add(
        self, *, prediction: Any = None, reference: Any = None, dense_predictions: Any = None, **kwargs: Any
    ) -> None:
        """Add one image: ``(C,)`` logits, a label, ``(C,)`` dense logits."""
        dense = None if dense_predictions is None else [dense_predictions]
        self.add_batch(predictions=[prediction], references=[reference], dense_predictions=dense, **kwargs)

    def _compute(self, predictions: Any, references: Any, dense_predictions: Any) -> dict[str, float]:
        with_dense = [len(row) > 0 for row in dense_predictions]
        if any(with_dense) and not all(with_dense):
            raise TokenPruneError(
                f"dense_predictions were given for {sum(with_dense)} of {len(with_dense)} images; give all or none"
            )
        scores = summarize(predictions, references, dense_predictions if any(with_dense) else None)
        if not scores:
            raise TokenPruneError("there is nothing to compare with: pass references, dense_predictions, or both")
        return scores


def _rows(logits: Any) -> Any:
    """Logits in a form Arrow can write: tensors (on any device, in bfloat16) as float32 arrays."""
    if isinstance(logits, torch.Tensor):
        return logits.detach().float().cpu().numpy()
    return [_rows(row) if isinstance(row, torch.Tensor) else row for row in logits]
