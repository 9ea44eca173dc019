"""What ``hf-tokenprune demo`` and ``make demo`` do: the packaged digits model, dense and pruned by every method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import PruneConfig
from ..cost import config_for_macs, cost
from ..engine import prune, pruned, unprune
from ..errors import TokenPruneError
from ..evaluation import PairedReport, evaluate_paired, load_images
from ..pretrained import from_pretrained, save_pretrained
from ..registry import get_method, list_methods
from ..visualize import visualize
from .digits import MODEL_DIR, load_digits_split

BUDGET = 0.7
"""MACs of every pruned run, as a fraction of the dense ones, so that methods compare at equal work."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and wrote."""

    report: PairedReport
    checkpoint: Path
    picture: Path

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**self.report.to_dict(), "checkpoint": str(self.checkpoint), "picture": str(self.picture)}

    def summary(self) -> str:
        """The table, and where the files are."""
        return (
            f"handwritten digits on cluttered canvases, {BUDGET:.0%} of the dense MACs\n\n{self.report.summary()}\n\n"
            f"saved and reloaded with its prune_config.json, same logits: {self.checkpoint}\n"
            f"kept patches by layer: {self.picture}"
        )


def run_demo(out: Path, limit: int | None = None, progress: bool = True) -> DemoResult:
    """Evaluate, save, reload and draw.

    Args:
        out: folder to write to, made if need be.
        limit: number of test digits, evenly spread; None: all 360.
        progress: show progress bars.
    """
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    model = ViTForImageClassification.from_pretrained(MODEL_DIR).eval()
    processor = ViTImageProcessorPil.from_pretrained(MODEL_DIR)
    images = load_images(list(load_digits_split("test")), limit=limit)
    dense = cost(model).dense.macs
    configs: dict[str, PruneConfig] = {}
    for name in list_methods("vision"):
        if get_method(name).scaled is not PruneConfig.scaled:  # else it has no schedule that could meet a budget
            configs[name] = config_for_macs(model, get_method(name)(), BUDGET * dense)
    macs = {name: float(cost(model, config).pruned.macs) for name, config in configs.items()}
    report = evaluate_paired(
        model,
        images,
        processor,
        {name: partial(pruned, model, config) for name, config in configs.items()},
        macs={"dense": float(dense), **macs},
        progress=progress,
    )

    checkpoint, picture = out / "digits_vit_zero_tprune", out / "kept_patches.png"
    few = [images[i]["image"] for i in range(0, len(images), max(1, len(images) // 6))][:6]
    pixels = processor(images=few, return_tensors="pt").pixel_values
    save_pretrained(prune(model, configs["zero_tprune"]), checkpoint)
    processor.save_pretrained(checkpoint)
    visualize(model, pixels, processor, size=168).save(picture)
    with torch.no_grad():
        if not torch.equal(from_pretrained(checkpoint)(pixels).logits, model(pixels).logits):
            raise TokenPruneError(f"the checkpoint in {checkpoint} does not give the logits it was saved with")
    unprune(model)
    return DemoResult(report, checkpoint, picture)
