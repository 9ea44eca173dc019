"""What is computed from logits: plain functions of tensors, shared by the metric, the report and the Trainer helper.

Axes: n images, C classes. A label below 0 means "no label": such an image never counts in an accuracy.
"""

import math
from typing import Any

import torch
from torch import Tensor

from hf_tokenprune.errors import DataError, TokenPruneError

_Z95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal
_CHUNK = 2**22  # logits per float64 chunk of the KL: 50 000 x 1000, or 256 x 150 000, would otherwise need gigabytes


def as_logits(values: Any, name: str = "logits") -> Tensor:
    """Check logits and bring them to the CPU.

    Args:
        values: ``(n, C)`` tensor, array or nested list; ``-inf`` is allowed (a masked class).
        name: what to call them in an error.

    Returns:
        ``(n, C)`` float32 on the CPU.

    Raises:
        TokenPruneError: not two axes, no image or no class, NaN or ``+inf``; the message has the shape or the row.
    """
    try:
        logits = torch.as_tensor(values).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TokenPruneError(f"{name} are not a table of numbers, (images, classes): {error}") from error
    if logits.ndim != 2 or 0 in logits.shape:
        raise TokenPruneError(f"{name} have shape {tuple(logits.shape)}; expected (images, classes), neither of them 0")
    broken = (logits.isnan() | logits.isposinf()).any(dim=1)
    if broken.any():
        raise TokenPruneError(
            f"{name} of {int(broken.sum())} of {len(logits)} images are NaN or infinite (first: image "
            f"{int(broken.int().argmax())}); scores of them mean nothing. Run the model in float32 or bfloat16"
        )
    return logits


def as_labels(values: Any, logits: Tensor) -> Tensor:
    """Check labels against ``(n, C)`` logits: ``(n,)`` int64 on the CPU.

    Raises:
        DataError: not integers, another number of labels than images, or a label that is not below C.
    """
    labels = torch.as_tensor(values)
    if labels.is_floating_point():
        raise DataError(f"labels are {labels.dtype}; give class indices as integers, negative where there is none")
    labels = labels.to("cpu", torch.int64)
    if labels.shape != logits.shape[:1]:
        raise DataError(f"labels have shape {tuple(labels.shape)}, but there are {len(logits)} images: pass one each")
    if int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"label {int(labels.max())} is outside the {logits.shape[1]} classes of the logits (0 is first)"
        )
    return labels


def topk_correct(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the label is among the k largest logits. Ties go to the lower class index, as in ``argmax``.

    With fewer than k classes every label is among them. Images without a label are False.

    Args:
        logits: ``(n, C)``.
        labels: ``(n,)`` int64, below C; negative where missing.

    Returns:
        ``(n,)`` bool.
    """
    own = logits.gather(1, labels.clamp_min(0)[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & earlier)
    return (ahead.sum(dim=1) < k) & (labels >= 0)


def agreement(dense_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether both models name the same class: ``(n,)`` bool from two ``(n, C)``."""
    return dense_logits.argmax(dim=1) == logits.argmax(dim=1)


def kl_divergence(dense_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(dense) || softmax(other)) of every image, in nats: what the pruned model loses of the dense one.

    Args:
        dense_logits: ``(n, C)`` of the dense model.
        logits: ``(n, C)`` of the pruned model.

    Returns:
        ``(n,)`` float64, at least 0. Computed in float64, because near 0 it is a small difference of large terms.
    """
    rows = max(1, _CHUNK // dense_logits.shape[1])
    chunks = zip(dense_logits.split(rows), logits.split(rows), strict=True)
    return torch.cat([_kl(dense, other) for dense, other in chunks])


def _kl(dense_logits: Tensor, logits: Tensor) -> Tensor:
    log_p = dense_logits.double().log_softmax(dim=1)
    log_q = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # 0 log 0 = 0
    return terms.sum(dim=1).clamp_min(0)


def paired_interval(dense_correct: Tensor, correct: Tensor) -> tuple[float, float]:
    """95 % interval of a difference in accuracy measured on the same images (Bonett and Price, 2012).

    Only images on which the two models differ carry information: ``gained`` are right in the second alone, ``lost`` in
    the first alone. With q = (count + 1) / (n + 2) for either, the interval is ``d +- 1.96 sqrt((q_gained + q_lost
    - d²) / (n + 2))`` around ``d = q_gained - q_lost``. The plain ``mean +- 1.96 sd / sqrt(n)`` of the per-image
    differences converges to the same, but for few differing images it is too narrow, and for none, which good pruning
    reaches on small sets, it claims certainty (width 0). Fagerland, Lydersen and Laake (Stat. Med. 2014) compare both.

    Args:
        dense_correct: ``(n,)`` bool.
        correct: ``(n,)`` bool, the same images in the same order.

    Returns:
        Lower and upper end as fractions, within [-1, 1].
    """
    n = len(correct)
    gained = (int((correct & ~dense_correct).sum()) + 1) / (n + 2)
    lost = (int((dense_correct & ~correct).sum()) + 1) / (n + 2)
    centre = gained - lost
    half = _Z95 * math.sqrt((gained + lost - centre**2) / (n + 2))
    return max(centre - half, -1.0), min(centre + half, 1.0)


def mean_interval(values: Tensor) -> tuple[float, float] | None:
    """95 % interval ``mean +- 1.96 sd / sqrt(n)`` of ``(n,)`` values; None for fewer than two of them."""
    if len(values) < 2:
        return None
    half = _Z95 * float(values.double().std()) / math.sqrt(len(values))
    mean = float(values.double().mean())
    return mean - half, mean + half


def summarize(logits: Any, labels: Any = None, dense_logits: Any = None) -> dict[str, float]:
    """All scores that the inputs allow.

    Args:
        logits: ``(n, C)``.
        labels: ``(n,)`` int, negative where an image has none; None if none has.
        dense_logits: ``(n, C)`` of the dense model on the same images in the same order.

    Returns:
        ``accuracy`` and ``top5_accuracy`` (fractions of the labelled images; absent without labels), ``agreement``
        (fraction with the dense argmax) and ``kl`` (mean KL(dense || this) in nats); absent without dense logits.

    Raises:
        TokenPruneError: shapes that do not match, no images, NaN logits. DataError: labels that do not fit.
    """
    logits = as_logits(logits)
    scores: dict[str, float] = {}
    if labels is not None:
        labels = as_labels(labels, logits)
        known = labels >= 0
        if known.any():
            scores["accuracy"] = float(topk_correct(logits, labels)[known].double().mean())
            scores["top5_accuracy"] = float(topk_correct(logits, labels, k=5)[known].double().mean())
    if dense_logits is not None:
        dense_logits = as_logits(dense_logits, "dense logits")
        if dense_logits.shape != logits.shape:
            raise TokenPruneError(
                f"dense logits have shape {tuple(dense_logits.shape)}, the others {tuple(logits.shape)}; "
                "both must come from the same images and classes"
            )
        scores["agreement"] = float(agreement(dense_logits, logits).double().mean())
        scores["kl"] = float(kl_divergence(dense_logits, logits).mean())
    return scores
