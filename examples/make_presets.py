"""How the presets of the package are made: by rule from sizes alone, and from the results of `hf-tokenprune search`.

    python examples/make_presets.py PRESETS_JSON --searched deit-tiny=FOLDER --searched ... --on "which images"

A folder is what `hf-tokenprune search MODEL IMAGES --out FOLDER` wrote.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tokenprune import (
    CDPrunerConfig,
    DivPruneConfig,
    PruneConfig,
    SalienceMergeConfig,
    StackConfig,
    ToMeConfig,
    TransPruneConfig,
    VisionZipConfig,
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
ON_LLAVA = {"positions": "contiguous"}
PUBLISHED: dict[str, tuple[PruneConfig, str]] = {  # ratios of the papers, which hold for any number of image tokens
    "divprune/llava-1.5@keep0.098": (
        DivPruneConfig(**ON_LLAVA),
        "the paper's 56 of 576 tokens (arXiv 2503.02175)",
    ),
    "divprune/llava-next@keep0.098": (DivPruneConfig(**ON_LLAVA), "the paper's ratio (arXiv 2503.02175)"),
    "transprune/llava-1.5@high": (
        TransPruneConfig(**ON_LLAVA),
        "the official scripts' TransPrune-High (arXiv 2507.20630)",
    ),
    "transprune/llava-next@high": (
        TransPruneConfig(**ON_LLAVA),
        "the official scripts' TransPrune-High (arXiv 2507.20630)",
    ),
}
PUBLISHED |= {  # in front of the decoder, then inside it
    f"stack/llava-1.5@{first.method}{tokens}-transprune{tokens // 8}": (
        StackConfig((first, TransPruneConfig(**ON_LLAVA))),
        f"tables 4 and 5 of arXiv 2507.20630: {tokens} tokens in front of the decoder, {tokens // 8} in the end{note}",
    )
    for tokens in (288, 192)
    for first, note in (
        (VisionZipConfig(**ON_LLAVA).with_total(tokens), ""),
        (CDPrunerConfig(keep_ratio=tokens / 576, **ON_LLAVA), "; relevance is not CLIP's here, see the method's page"),
    )
}
KEPT = (0.5, 0.33, 0.22, 0.11)  # of the image tokens


def text(width: int, mlp_width: int, depth: int, heads: int, key_value_heads: int, **more: object) -> dict:
    """Sizes of a language model, as its config calls them."""
    sizes = {"hidden_size": width, "intermediate_size": mlp_width, "num_hidden_layers": depth}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": key_value_heads, **more}


QWEN3 = {"model_type": "qwen3_vl_text", "head_dim": 128, "vocab_size": 151936}
QWEN3_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
SIGLIP_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 512}
SIGLIP_SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "image_size": 384}
VISION_LANGUAGE = {  # model_type, and what differs from its stock config; parameters are as many as the checkpoints'
    "qwen2.5-vl-3b": ("qwen2_5_vl", {
        "text_config": text(2048, 11008, 36, 16, 2, vocab_size=151936),
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    }),
    "qwen2.5-vl-7b": ("qwen2_5_vl", {
        "text_config": text(3584, 18944, 28, 28, 4, vocab_size=152064), "vision_config": {"hidden_size": 1280},
    }),
    "qwen3-vl-2b": ("qwen3_vl", {
        "text_config": text(2048, 6144, 28, 16, 8, **QWEN3),
        "vision_config": {**QWEN3_TOWER, "out_hidden_size": 2048},
        "tie_word_embeddings": True,
    }),
    "qwen3-vl-4b": ("qwen3_vl", {
        "text_config": text(2560, 9728, 36, 32, 8, **QWEN3),
        "vision_config": {**QWEN3_TOWER, "out_hidden_size": 2560},
        "tie_word_embeddings": True,
    }),
    "qwen3-vl-8b": ("qwen3_vl", {
        "text_config": text(4096, 12288, 36, 32, 8, **QWEN3), "vision_config": {"out_hidden_size": 4096},
    }),
    "internvl3-1b": ("internvl", {
        "text_config": text(896, 4864, 24, 14, 2, model_type="qwen2", vocab_size=151674), "tie_word_embeddings": False,
    }),
    "internvl3-8b": ("internvl", {
        "text_config": text(3584, 18944, 28, 28, 4, model_type="qwen2", vocab_size=151674),
        "tie_word_embeddings": False,
    }),
    "smolvlm-256m": ("smolvlm", {
        "text_config": text(576, 1536, 30, 9, 3, model_type="llama", head_dim=64, vocab_size=49280),
        "vision_config": {**SIGLIP_BASE, "patch_size": 16}, "scale_factor": 4,
    }),
    "smolvlm-500m": ("smolvlm", {
        "text_config": text(960, 2560, 32, 15, 5, model_type="llama", head_dim=64, vocab_size=49280),
        "vision_config": {**SIGLIP_BASE, "patch_size": 16}, "scale_factor": 4,
    }),
    "smolvlm-2b": ("smolvlm", {
        "text_config": text(2048, 8192, 24, 32, 32, model_type="llama", head_dim=64, vocab_size=49155),
        "vision_config": {**SIGLIP_SO400M, "patch_size": 14}, "scale_factor": 3,
    }),
}  # fmt: skip


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


def vision_language(shape: str) -> PreTrainedModel:
    """A vision-language model of a common shape, without memory for weights."""
    model_type, fields = VISION_LANGUAGE[shape]
    config = AutoConfig.for_model(model_type, **fields)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def kept() -> dict[str, dict]:
    """DivPrune on every vision-language shape, at each part of the image tokens; one image of a usual size is counted.

    The config is the same for all shapes; what differs is what it saves.
    """
    presets = {}
    for shape in VISION_LANGUAGE:
        model = vision_language(shape)
        for ratio in KEPT:
            config = DivPruneConfig(keep_ratio=ratio)
            report = cost(model, config)
            provenance = {
                "source": "rule",
                "gmacs": round(report.pruned.macs / 1e9, 1),
                "dense_gmacs": round(report.dense.macs / 1e9, 1),
                "counted_for": f"the prefill of {report.image} and {report.text_tokens} text tokens",
            }
            presets[f"{config.method}/{shape}@keep{ratio:g}"] = {"config": config.to_dict(), "provenance": provenance}
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
    presets = by_rule() | kept()
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
