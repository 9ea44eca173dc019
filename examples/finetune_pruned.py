"""Fine-tune a model with pruning on, by the stock Trainer: the packaged digits model at half of its multiply-adds.

    python examples/finetune_pruned.py
    python examples/finetune_pruned.py --method zero_tprune --macs 0.3 --epochs 10 --out finetuned

Without arguments with ``uniform``, which chooses nothing: the others lose less, and have less to learn. Needs
``pip install "hf-tokenprune[demo]"``; runs offline. It trains on the train split alone and prints, of the test
split, the model dense, pruned without training, pruned after it, and the trained weights dense.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTImageProcessorPil

from hf_tokenprune import PruneConfig, list_methods, prune, pruned, save_pretrained, unprune
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.evaluation import Logits, PairedReport

SEED = 1000
"""Of canvases, and the next ones: the packaged model was trained on others of the same digits."""


def inputs(split: Any, seed: int, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Pixels and labels as a Trainer takes them."""
    processor, digits = ViTImageProcessorPil.from_pretrained(MODEL_DIR), load_digits_split(split, seed)
    for i in range(min(limit or len(digits), len(digits))):
        pixels = processor(digits[i]["image"], return_tensors="pt").pixel_values[0]
        yield {"pixel_values": pixels, "labels": digits.labels[i]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="uniform", choices=list_methods("vision"))
    parser.add_argument("--macs", type=float, default=0.5, help="part of the dense model's multiply-adds")
    parser.add_argument("--epochs", type=int, default=2, help="each with other canvases of the 1437 training digits")
    parser.add_argument("--limit", type=int, help="digits of each split; default: all")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, help="folder for the fine-tuned model, with its prune config")
    args = parser.parse_args()

    model = ViTForImageClassification.from_pretrained(MODEL_DIR)
    config = PruneConfig.for_method(args.method).for_budget(model, macs=args.macs * cost(model).dense.macs)
    train = [item for seed in range(args.epochs) for item in inputs("train", SEED + seed, args.limit)]
    test = list(inputs("test", 0, args.limit))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=32, num_train_epochs=1, learning_rate=args.lr, warmup_steps=20,
            lr_scheduler_type="cosine", save_strategy="no", report_to="none", logging_steps=100,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=train)

        def logits() -> Logits:
            found = trainer.predict(test)
            return Logits(torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids), 0.0)

        dense = logits()
        with pruned(model, config):
            runs = {"pruned": logits()}
        prune(model, config)
        trainer.train()  # the Trainer holds the same model object, so pruning it is all there is to do
        runs["pruned, fine-tuned"] = logits()
    work = cost(model)
    if args.out:
        save_pretrained(model, args.out)
    unprune(model)
    runs["fine-tuned, dense"] = logits()
    macs = dict.fromkeys(runs, work.pruned.macs) | {"fine-tuned, dense": work.dense.macs}
    print(PairedReport.from_logits(dense, runs, {"dense": work.dense.macs, **macs}).to_markdown())


if __name__ == "__main__":
    main()
