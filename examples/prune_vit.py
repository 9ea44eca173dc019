"""Prune a vision transformer, see which patches stay, save it with its config and load it again.

    python examples/prune_vit.py
    python examples/prune_vit.py --model facebook/deit-small-patch16-224 --images photos/ --method tome

Without arguments it runs offline, on the digits model that comes with the package (needs scikit-learn).
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageClassification

from hf_tokenprune import PruneConfig, from_pretrained, list_methods, prune, record, save_pretrained
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split
from hf_tokenprune.evaluation import load_images, load_processor
from hf_tokenprune.pictures import visualize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder, or owner/name on the Hub")
    parser.add_argument("--images", help="folder of images; default: the packaged digits")
    parser.add_argument("--method", default="salience_merge", choices=list_methods("vision"))
    parser.add_argument("--limit", type=int, default=4, help="number of images")
    parser.add_argument("--out", type=Path, default=Path("prune_vit_output"))
    args = parser.parse_args()

    model = AutoModelForImageClassification.from_pretrained(args.model)
    processor = load_processor(args.model)
    dataset = load_images(args.images or list(load_digits_split("test")), limit=args.limit, label_column=None)
    images = [dataset[i]["image"] for i in range(len(dataset))]
    pixels = processor(images=images, return_tensors="pt").pixel_values

    with torch.no_grad():
        dense = model(pixels).logits
        prune(model, PruneConfig.for_method(args.method))  # in place
        with record(model) as rec:
            pruned = model(pixels).logits
    print(rec.summary())
    same = int((dense.argmax(-1) == pruned.argmax(-1)).sum())
    print(f"{cost(model).ratio:.1%} of the multiply-adds; the same class for {same} of {len(images)} images")

    save_pretrained(model, args.out)  # a stock checkpoint with prune_config.json beside it
    processor.save_pretrained(args.out)
    visualize(model, pixels, processor).save(args.out / "kept_patches.png")
    with torch.no_grad():
        reloaded = from_pretrained(args.out)(pixels).logits
    print(f"saved to {args.out}; the same logits after loading: {torch.equal(reloaded, pruned)}")


if __name__ == "__main__":
    main()
