"""Write a checkpoint that carries its prune config, and upload it to the Hub.

    python examples/share_on_hub.py me/digits-vit-pruned               # writes the folder only
    hf auth login && python examples/share_on_hub.py me/digits-vit-pruned --no-dry-run

Whoever loads it with ``hf_tokenprune.from_pretrained("me/digits-vit-pruned")`` gets the pruned model; Transformers'
own ``from_pretrained`` gives the dense one.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForImageClassification

from hf_tokenprune import PruneConfig, list_methods, prune, save_pretrained
from hf_tokenprune.cost import config_for_macs, cost
from hf_tokenprune.demo.digits import MODEL_DIR
from hf_tokenprune.evaluation import load_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo_id", help="owner/name on the Hub")
    parser.add_argument("--model", default=str(MODEL_DIR), help="folder, or owner/name on the Hub")
    parser.add_argument("--method", default="salience_merge", choices=list_methods("vision"))
    parser.add_argument("--macs-ratio", type=float, default=0.7, help="fraction of the dense multiply-adds to spend")
    parser.add_argument("--out", type=Path, help="folder to write; default: the name in repo_id")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action=argparse.BooleanOptionalAction, default=True, help="do not upload")
    args = parser.parse_args()

    model = AutoModelForImageClassification.from_pretrained(args.model)
    processor = load_processor(args.model)
    budget = args.macs_ratio * cost(model).dense.macs
    config = config_for_macs(model, PruneConfig.for_method(args.method), budget)
    prune(model, config)

    out = args.out or Path(args.repo_id.split("/")[-1])
    upload = {} if args.dry_run else {"push_to_hub": True, "repo_id": args.repo_id, "private": args.private}
    save_pretrained(model, out, **upload)
    # With a Path, Transformers' processors fail when they upload.
    processor.save_pretrained(str(out), **{key: value for key, value in upload.items() if key != "private"})
    print(f"{config}\n{cost(model).ratio:.1%} of the multiply-adds")
    print(f"written: {', '.join(sorted(path.name for path in out.iterdir()))} in {out}")
    print("dry run, nothing uploaded" if args.dry_run else f"uploaded: https://huggingface.co/{args.repo_id}")


if __name__ == "__main__":
    main()
