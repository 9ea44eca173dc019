"""Evaluate classifiers, two-tower and vision-language models, dense and pruned: takes any model and knows no method.

Importing this needs torch and Pillow alone; `evaluate`, `datasets` and `accelerate` (``pip install
"hf-tokenprune[eval]"``) are imported by what uses them.
"""

from typing import TYPE_CHECKING, Any

from hf_tokenprune.evaluation.answers import collect_answers, evaluate_answers
from hf_tokenprune.evaluation.answers_report import Answers, AnswersReport, AnswersRow, ExactMatch
from hf_tokenprune.evaluation.data import load_images
from hf_tokenprune.evaluation.images import ImageDataset
from hf_tokenprune.evaluation.loop import Logits, collect_logits
from hf_tokenprune.evaluation.paired import evaluate_paired
from hf_tokenprune.evaluation.preprocess import PreprocessedImages
from hf_tokenprune.evaluation.processor import load_processor
from hf_tokenprune.evaluation.prompts import mean_text_tokens
from hf_tokenprune.evaluation.questions import QuestionDataset, is_right, load_questions
from hf_tokenprune.evaluation.report import PairedReport, PairedRow
from hf_tokenprune.evaluation.resize import interpolated_positions, resized
from hf_tokenprune.evaluation.retrieval import Recall, RetrievalReport, RetrievalRow, evaluate_retrieval
from hf_tokenprune.evaluation.scores import (
    agreement,
    kl_divergence,
    mean_interval,
    paired_interval,
    summarize,
    topk_correct,
)
from hf_tokenprune.evaluation.trainer import compute_metrics
from hf_tokenprune.evaluation.zero_shot import evaluate_zero_shot, zero_shot_classifier

if TYPE_CHECKING:
    from hf_tokenprune.evaluation.metric import TokenPruningMetric

__all__ = [
    "Answers",
    "AnswersReport",
    "AnswersRow",
    "ExactMatch",
    "ImageDataset",
    "Logits",
    "PairedReport",
    "PairedRow",
    "PreprocessedImages",
    "QuestionDataset",
    "Recall",
    "RetrievalReport",
    "RetrievalRow",
    "TokenPruningMetric",
    "agreement",
    "collect_answers",
    "collect_logits",
    "compute_metrics",
    "evaluate_answers",
    "evaluate_paired",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "interpolated_positions",
    "is_right",
    "kl_divergence",
    "load_images",
    "load_processor",
    "load_questions",
    "mean_interval",
    "mean_text_tokens",
    "paired_interval",
    "resized",
    "summarize",
    "topk_correct",
    "zero_shot_classifier",
]


def __getattr__(name: str) -> Any:
    if name == "TokenPruningMetric":  # a subclass of evaluate.Metric: naming it imports evaluate
        from hf_tokenprune.evaluation.metric import TokenPruningMetric

        return TokenPruningMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
