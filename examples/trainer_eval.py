"""Evaluate a model with the stock Trainer, dense and pruned, on the packaged digits.

    python examples/trainer_eval.py --limit 360

Needs ``pip install "hf-tokenprune[demo]"``; runs offline.
"""

import argparse
import json
import tempfile
from pathlib import Path

from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTImageProcessorPil

from hf_tokenprune import PruneConfig, list_methods, pruned
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.evaluation import compute_metrics

SCORES = ("accuracy", "top5_accuracy", "agreement", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method", action="append", choices=list_methods("vision"), help="may be repeated; default: all"
    )
    parser.add_argument("--limit", type=int, default=360, help="number of test digits")
    parser.add_argument("--out", type=Path, help="JSON file for the scores")
    args = parser.parse_args()

    model = ViTForImageClassification.from_pretrained(MODEL_DIR)
    processor = ViTImageProcessorPil.from_pretrained(MODEL_DIR)
    digits = load_digits_split("test")
    data = [
        {"pixel_values": processor(digits[i]["image"], return_tensors="pt").pixel_values[0], "labels": digits.labels[i]}
        for i in range(min(args.limit, len(digits)))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_eval_batch_size=32, report_to="none")
        trainer = Trainer(model=model, args=arguments, eval_dataset=data, compute_metrics=compute_metrics())
        dense = trainer.predict(data)
        scores = {"dense": {name: dense.metrics[f"test_{name}"] for name in SCORES[:2]}}
        # The Trainer holds the same model object, so pruning it is all there is to do.
        trainer.compute_metrics = compute_metrics(dense.predictions)
        for method in args.method or list_methods("vision"):
            with pruned(model, PruneConfig.for_method(method)):
                metrics = trainer.evaluate()
            scores[method] = {name: metrics[f"eval_{name}"] for name in SCORES}

    print(json.dumps(scores, indent=2))
    if args.out:
        args.out.write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
