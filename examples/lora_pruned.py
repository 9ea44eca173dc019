"""Train LoRA adapters on a pruned model, save them with the prune config beside them, load, merge, and take it back.

    python examples/lora_pruned.py
    python examples/lora_pruned.py --method zero_tprune --epochs 2 --out adapter

Needs ``pip install "hf-tokenprune[demo]" peft``; runs offline, on the digits model that comes with the package.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTImageProcessorPil

from hf_tokenprune import from_pretrained, list_methods, prune, save_pretrained, unprune
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.sharing.resume import PruningCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="salience_merge", choices=list_methods("vision"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=320, help="number of training digits")
    parser.add_argument("--out", type=Path, default=Path("lora_pruned_output"))
    args = parser.parse_args()

    processor, digits = ViTImageProcessorPil.from_pretrained(MODEL_DIR), load_digits_split("train", seed=1000)
    data = [
        {"pixel_values": processor(digits[i]["image"], return_tensors="pt").pixel_values[0], "labels": digits.labels[i]}
        for i in range(args.limit)
    ]
    pixels = torch.stack([item["pixel_values"] for item in data[:8]])

    model = prune(ViTForImageClassification.from_pretrained(MODEL_DIR), args.method)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        str(args.out / "trainer"), per_device_train_batch_size=32, num_train_epochs=args.epochs, learning_rate=1e-3,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data, callbacks=[PruningCallback()]).train()
    save_pretrained(model, args.out)  # the adapter alone, and prune_config.json
    with torch.no_grad():
        trained = model.eval()(pixels).logits

        loaded = from_pretrained(args.out)  # its model, the adapter, pruned as it was trained
        print(f"{cost(loaded).ratio:.1%} of the multiply-adds")
        print(f"the same logits after loading: {torch.allclose(loaded(pixels).logits, trained, atol=1e-4)}")
        merged = loaded.merge_and_unload()  # a stock model, still pruned
        print(f"after merging: {torch.allclose(merged(pixels).logits, trained, atol=1e-4)}")
        with model.disable_adapter():
            print(f"without the adapter: {torch.allclose(model(pixels).logits, trained, atol=1e-4)}")
        unprune(merged)
        print(f"dense, what it was not trained for: {torch.allclose(merged(pixels).logits, trained, atol=1e-4)}")


if __name__ == "__main__":
    main()
