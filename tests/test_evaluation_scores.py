"""Scores, the `evaluate` metric and the Trainer helper against other people's formulas and sums done by hand."""

import itertools
import math

import evaluate
import numpy as np
import pytest
import torch
from scipy.stats import entropy, multinomial
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_tokenprune.errors import DataError, TokenPruneError
from hf_tokenprune.evaluation import (
    TokenPruningMetric,
    agreement,
    compute_metrics,
    kl_divergence,
    mean_interval,
    paired_interval,
    summarize,
    topk_correct,
)


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and dense logits of 60 images and 12 classes, of a model that is right now and then."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 12, (60,), generator=generator)
    dense = torch.randn(60, 12, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 12)
    return dense + 0.7 * torch.randn(60, 12, generator=generator), labels, dense


def expected(logits: torch.Tensor, labels: torch.Tensor, dense: torch.Tensor) -> dict[str, float]:
    """The four scores, from scikit-learn and SciPy."""
    x, y, d = logits.double().numpy(), labels.numpy(), dense.double().numpy()
    classes = range(x.shape[1])
    p, q = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (d, x))
    return {
        "accuracy": accuracy_score(y, x.argmax(1)),
        "top5_accuracy": top_k_accuracy_score(y, x, k=5, labels=classes),
        "agreement": accuracy_score(d.argmax(1), x.argmax(1)),
        "kl": entropy(p, q, axis=1).mean(),
    }


def test_summarize_matches_scikit_learn_and_scipy(sample):
    logits, labels, dense = sample
    want = expected(logits, labels, dense)
    assert summarize(logits, labels, dense) == pytest.approx(want, rel=1e-9)
    assert 0.2 < want["accuracy"] < want["top5_accuracy"] < 1, "the sample must be able to tell the scores apart"


def test_kl_by_hand():
    dense = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    other = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    # (1/2, 1/2) to (3/4, 1/4), and back
    want = [0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)]
    got = kl_divergence(dense, other)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(want, rel=1e-6)  # log 3 is rounded to float32


def test_kl_of_nearly_equal_logits_keeps_its_digits():
    dense = torch.zeros(1, 2, dtype=torch.float64)
    other = torch.tensor([[1e-5, 0.0]], dtype=torch.float64)
    assert kl_divergence(dense, other).item() == pytest.approx(1e-10 / 8, rel=1e-4)  # second order: e²/8


def test_kl_skips_masked_classes_and_is_infinite_where_mass_is_lost():
    dense = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf]])
    assert kl_divergence(dense, other).tolist() == [0.0, math.inf]


def test_kl_of_more_rows_than_a_chunk():
    dense, other = torch.randn(2, 5000, 3, generator=torch.Generator().manual_seed(1))
    alone = torch.stack([kl_divergence(dense[i : i + 1], other[i : i + 1])[0] for i in (0, 4095, 4096, 4999)])
    torch.testing.assert_close(kl_divergence(dense, other)[[0, 4095, 4096, 4999]], alone, rtol=0, atol=0)


def test_topk_ties_go_to_the_lower_class():
    logits = torch.tensor([[1.0, 1.0, 0.0]] * 3)
    assert topk_correct(logits, torch.tensor([0, 1, 2])).tolist() == [True, False, False]
    assert topk_correct(logits, torch.tensor([0, 1, 2]), k=2).tolist() == [True, True, False]
    assert agreement(logits, torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 1]])).tolist() == [True, False, True]


def test_top5_with_at_most_five_classes_is_one():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert summarize(logits, torch.tensor([2, 0])) == {"accuracy": 0.5, "top5_accuracy": 1.0}


def test_images_without_a_label_do_not_count(sample):
    logits, labels, dense = sample
    some = labels.clone()
    some[10:] = -1
    got = summarize(logits, some, dense)
    want = expected(logits[:10], labels[:10], dense[:10])
    assert got["accuracy"] == pytest.approx(want["accuracy"])
    assert got["top5_accuracy"] == pytest.approx(want["top5_accuracy"])
    assert got["kl"] == pytest.approx(expected(logits, labels, dense)["kl"], rel=1e-9)
    assert set(summarize(logits, torch.full((60,), -100), dense)) == {"agreement", "kl"}
    assert set(summarize(logits, None, dense)) == {"agreement", "kl"}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (([1.0, 2.0], [0]), TokenPruneError, r"shape \(2,\); expected \(images, classes\)"),
        ((torch.zeros(0, 3), []), TokenPruneError, r"shape \(0, 3\)"),
        (([[1.0, 2.0], [1.0]], [0, 1]), TokenPruneError, "not a table of numbers"),
        (([[1.0, 2.0], [1.0, math.nan]], [0, 1]), TokenPruneError, "1 of 2 images are NaN or infinite .first: image 1"),
        (([[1.0, math.inf]], [0]), TokenPruneError, "NaN or infinite"),
        (([[1.0, 2.0]], [2]), DataError, "label 2 is outside the 2 classes"),
        (([[1.0, 2.0]], [0, 1]), DataError, r"labels have shape \(2,\), but there are 1 images"),
        (([[1.0, 2.0]], [0.5]), DataError, "labels are torch.float32; give class indices as integers"),
        (([[1.0, 2.0]], [0], [[1.0, 2.0, 3.0]]), TokenPruneError, r"dense logits have shape \(1, 3\), the others"),
    ],
)
def test_bad_input_is_named(arguments, error, says):
    with pytest.raises(error, match=says):
        summarize(*arguments)


def from_counts(both: int, gained: int, lost: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    dense = [True] * both + [False] * gained + [True] * lost + [False] * neither
    other = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return torch.tensor(dense), torch.tensor(other)


def test_paired_interval_by_hand():
    # The airway data of Fagerland, Lydersen and Laake (2014): 1, 1, 7, 12 of 21.
    # q_gained = 2/23, q_lost = 8/23, d = -6/23, se = sqrt((10/23 - 36/529) / 23) = sqrt(194 / 12167)
    centre, half = -6 / 23, 1.959964 * math.sqrt(194 / 12167)
    low, high = paired_interval(*from_counts(1, 1, 7, 12))
    assert (low, high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_paired_interval_never_claims_certainty():
    low, high = paired_interval(*from_counts(50, 0, 0, 50))
    assert low == pytest.approx(-high)
    assert high == pytest.approx(1.959964 * math.sqrt(2 / 102 / 102), rel=1e-6)
    assert paired_interval(*from_counts(0, 0, 1, 0))[0] >= -1


@pytest.mark.parametrize(("gain", "loss"), [(0.01, 0.01), (0.02, 0.05), (0.1, 0.1)])
def test_paired_interval_covers_the_truth(gain, loss):
    """Exact coverage for 60 images, over every possible outcome: at least the nominal 95 %, less one point."""
    n, coverage = 60, 0.0
    outcomes = multinomial(n, [gain, loss, 1 - gain - loss])
    for gained, lost in itertools.product(range(n + 1), repeat=2):
        probability = outcomes.pmf([gained, lost, n - gained - lost]) if gained + lost <= n else 0.0
        if probability > 1e-9:
            low, high = paired_interval(*from_counts(n - gained - lost, gained, lost, 0))
            coverage += probability * (low <= gain - loss <= high)
    assert coverage >= 0.94


def test_mean_interval_by_hand():
    low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    half = 1.959964 * math.sqrt(14 / 3) / 2  # squared deviations 4 + 1 + 0 + 9, over n - 1; sqrt(n) = 2
    assert (low, high) == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert mean_interval(torch.tensor([1.0])) is None


@pytest.fixture
def metric(tmp_path) -> TokenPruningMetric:
    return TokenPruningMetric(cache_dir=str(tmp_path))


def test_metric_in_one_go_in_batches_and_one_by_one(metric, sample):
    logits, labels, dense = sample
    want = pytest.approx(expected(logits, labels, dense), rel=1e-9)
    assert metric.compute(predictions=logits, references=labels, dense_predictions=dense) == want
    assert (
        metric.compute(predictions=logits.numpy(), references=labels.tolist(), dense_predictions=dense.tolist()) == want
    )
    for part in (slice(0, 25), slice(25, 60)):
        metric.add_batch(predictions=logits[part], references=labels[part], dense_predictions=dense[part])
    assert metric.compute() == want
    for row in range(60):
        metric.add(prediction=logits[row], reference=labels[row], dense_predictions=dense[row])
    assert metric.compute() == want


def test_metric_without_dense_logits_or_labels(metric, sample):
    logits, labels, dense = sample
    want = expected(logits, labels, dense)
    accuracies = {key: want[key] for key in ("accuracy", "top5_accuracy")}
    assert metric.compute(predictions=logits, references=labels) == pytest.approx(accuracies)
    metric.add_batch(predictions=logits, references=labels)
    assert metric.compute() == pytest.approx(accuracies)
    rest = {key: want[key] for key in ("agreement", "kl")}
    assert metric.compute(predictions=logits, dense_predictions=dense) == pytest.approx(rest, rel=1e-9)
    one = metric.compute(predictions=[[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]], references=[None, 0, -1])
    assert one == {"accuracy": 1.0, "top5_accuracy": 1.0}


def test_metric_takes_bfloat16(metric):
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.bfloat16)
    assert metric.compute(predictions=logits, references=[1, 1])["accuracy"] == 0.5


def test_metric_combines(tmp_path, sample):
    logits, labels, dense = sample
    metrics = {name: TokenPruningMetric(cache_dir=str(tmp_path / name)) for name in ("a", "b")}
    combined = evaluate.combine(metrics)
    want = expected(logits, labels, dense)
    want = {f"{name}_{key}": value for name in metrics for key, value in want.items()}
    got = combined.compute(predictions=logits, references=labels, dense_predictions=dense)
    assert got == pytest.approx(want, rel=1e-9)
    combined.add_batch(predictions=logits, references=labels, dense_predictions=None)
    assert set(combined.compute()) == {"a_accuracy", "a_top5_accuracy", "b_accuracy", "b_top5_accuracy"}


def test_metric_refuses_half_of_the_dense_logits(metric, sample):
    logits, labels, dense = sample
    metric.add_batch(predictions=logits, references=labels)
    metric.add_batch(predictions=logits, references=labels, dense_predictions=dense)
    with pytest.raises(TokenPruneError, match="given for 60 of 120 images; give all or none"):
        metric.compute()


def test_metric_refuses_nothing_to_compare_with(metric):
    with pytest.raises(TokenPruneError, match="pass references, dense_predictions, or both"):
        metric.compute(predictions=[[1.0, 2.0]])
    with pytest.raises(TokenPruneError, match="predictions are missing"):
        metric.add_batch(references=[1])


@pytest.fixture
def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=7,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


@pytest.fixture
def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(10, 3, 8, 8, generator=generator), torch.arange(10) % 7
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]


def evaluate_with_trainer(vit, examples, tmp_path, metrics):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True
    )
    return Trainer(vit, arguments, eval_dataset=examples, compute_metrics=metrics).evaluate()


def logits_of(vit, examples) -> torch.Tensor:
    with torch.no_grad():
        return vit(torch.stack([example["pixel_values"] for example in examples])).logits


@pytest.mark.parametrize("hidden_states", [False, True], ids=["logits", "tuple"])
def test_trainer_helper(vit, examples, tmp_path, hidden_states):
    labels = torch.stack([example["labels"] for example in examples])
    dense = logits_of(vit, examples)
    with torch.no_grad():
        vit.classifier.weight.neg_()
    want = expected(logits_of(vit, examples), labels, dense)
    vit.config.output_hidden_states = hidden_states
    got = evaluate_with_trainer(vit, examples, tmp_path, compute_metrics(dense))
    assert {key: got[f"eval_{key}"] for key in want} == pytest.approx(want, rel=1e-4)  # batches of 4 round otherwise
    assert want["kl"] > 0.01, "the changed model must differ from the dense one"
    got = evaluate_with_trainer(vit, examples, tmp_path, compute_metrics())
    assert got["eval_accuracy"] == pytest.approx(want["accuracy"])
    assert "eval_kl" not in got
    assert "eval_agreement" not in got


def test_trainer_helper_refuses_logits_of_another_set(vit, examples, tmp_path):
    dense = logits_of(vit, examples[:4])
    with pytest.raises(TokenPruneError, match=r"dense logits have shape \(4, 7\), the others \(10, 7\)"):
        evaluate_with_trainer(vit, examples, tmp_path, compute_metrics(dense))


def test_metric_inside_a_trainer(vit, examples, tmp_path, metric):
    labels = torch.stack([example["labels"] for example in examples])
    dense = logits_of(vit, examples)
    with torch.no_grad():
        vit.classifier.weight.neg_()

    def metrics(prediction):
        return metric.compute(
            predictions=prediction.predictions, references=prediction.label_ids, dense_predictions=dense
        )

    got = evaluate_with_trainer(vit, examples, tmp_path, metrics)
    want = expected(logits_of(vit, examples), labels, dense)
    assert {key: got[f"eval_{key}"] for key in want} == pytest.approx(want, rel=1e-4)
