"""How the presets of the package are made: by rule from sizes alone, and from the results of `hf-tokenprune search`.

    python examples/make_presets.py PRESETS_JSON --searched deit-tiny=FOLDER --searched ... --on "which images"

A folder is what `hf-tokenprune search MODEL IMAGES --out FOLDER` wrote.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tokenprune import (
    DivPruneConfig,
    PruneConfig,
    SalienceMergeConfig,
    ToMeConfig,
    TransPruneConfig,
    ZeroTPruneConfig,
)
from hf_tokenprune.cost import cost

METHODS = (SalienceMergeConfig(), ToMeConfig(), ZeroTPruneConfig(where="mid_block"))
PARTS = (0.88, 0.8, 0.68, 0.56)  # of the dense MACs; for DeiT-Tiny 1.10, 1.00, 0.85 and 0.70 G
VIT = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
CLIP = {
    "base-patch32-224": {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 32, "image_size": 224},
    "base-patch16-224": {"hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16, "image_size": 224},
    "large-patch14-224": {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 224},
    "large-patch14-336": {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336},
}
PUBLISHED = {  # ratios of the papers, which hold for any number of image tokens
    "divprune/llava-1.5@keep0.098": (DivPruneConfig(), "the paper's 56 of 576 tokens (arXiv 2503.02175)"),
    "divprune/llava-next@keep0.098": (DivPruneConfig(), "the paper's ratio (arXiv 2503.02175)"),
    "transprune/llava-1.5@high": (TransPruneConfig(), "the official scripts' TransPrune-High (arXiv 2507.20630)"),
    "transprune/llava-next@high": (TransPruneConfig(), "the official scripts' TransPrune-High (arXiv 2507.20630)"),
}


def shells() -> dict[str, PreTrainedModel]:
    """Models of the common shapes, without memory for weights."""
    found: dict[str, PreTrainedModel] = {}
    with torch.device("meta"):
        for name, (width, depth) in VIT.items():
            sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
            config = ViTConfig(**sizes, num_attention_heads=width // 64, num_labels=1000)
            family = "vit" if name == "large" else "deit"
            found[f"{family}-{name}"] = ViTForImageClassification(config)
        found["vit-base"] = found["deit-base"]
        for name, sizes in CLIP.items():
            width = sizes["hidden_size"]
            config = CLIPVisionConfig(**sizes, intermediate_size=4 * width, num_attention_heads=width // 64)
            found[f"clip-{name}"] = CLIPVisionModelWithProjection(config)
    return found


def name_of(config: PruneConfig, shape: str, gmacs: float) -> str:
    """What a preset is called."""
    return f"{config.method}/{shape}@{gmacs:.{2 if gmacs < 2 else 1 if gmacs < 10 else 0}f}g"


def by_rule() -> dict[str, dict]:
    """Every method on every shape, at each part of the dense MACs."""
    presets = {}
    for shape, model in shells().items():
        for config in METHODS:
            for part in PARTS:
                budget = float(f"{part * cost(model).dense.macs / 1e9:.2g}")
                found = config.for_budget(model, macs=budget * 1e9)
                gmacs = round(cost(model, found).pruned.macs / 1e9, 4)
                entry = {"config": found.to_dict(), "provenance": {"source": "rule", "gmacs": gmacs}}
                presets[name_of(config, shape, budget)] = entry
    return presets


def searched(shape: str, folder: Path, images: str) -> tuple[str, dict]:
    """The preset of a search, under the name of its budget."""
    report = json.loads((folder / "search.json").read_text(encoding="utf-8"))
    config = PruneConfig.from_dict(report["config"])
    provenance = {
        "source": "searched",
        "on": images,
        **report["settings"],
        "gmacs": round(report["cost"] / 1e9, 4),
        "distortion": report["distortion"],
        "distortion_of_the_rule": report["rule"] and report["rule"]["distortion"],
    }
    entry = {"config": config.to_dict(), "provenance": provenance}
    return name_of(config, shape, report["budget"] / 1e9), entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--searched", action="append", default=[], help="SHAPE=FOLDER of a search; may be repeated")
    parser.add_argument("--on", default="", help="what the searches saw; goes into the provenance")
    arguments = parser.parse_args()
    presets = by_rule()
    for name, (config, source) in PUBLISHED.items():
        presets[name] = {"config": config.to_dict(), "provenance": {"source": "published", "from": source}}
    for item in arguments.searched:
        shape, _, folder = item.partition("=")
        name, entry = searched(shape, Path(folder), arguments.on)
        presets[name] = entry
    arguments.out.write_text(json.dumps(presets, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(presets)} presets in {arguments.out}")


if __name__ == "__main__":
    main()
