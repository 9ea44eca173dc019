"""A classifier in the engines that people deploy with, dense and pruned, in float32 and int8: time and accuracy.

    python examples/engines_table.py MODEL IMAGES [-m METHOD] [--limit N] [--threads N] [--rounds N] [-b N ...]

All runs take turns in every round; milliseconds are medians. "faster": the median of the dense run's time over the
pruned one's in the same engine. Agreement and KL are to the dense model in PyTorch.
Needs hf-tokenprune[openvino] and torchao.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import AutoModelForImageClassification

from hf_tokenprune import prune
from hf_tokenprune.benchmark.medians import cell, speed_up
from hf_tokenprune.benchmark.timing import Repeats, interleave, seconds
from hf_tokenprune.cost import cost
from hf_tokenprune.evaluation import agreement, kl_divergence, load_images, load_processor, topk_correct
from hf_tokenprune.export import export, load_exported

ENGINES = ("eager", "compiled", "ONNX Runtime", "OpenVINO", "compiled int8", "ONNX Runtime int8")


def runs_of(model: torch.nn.Module) -> dict[str, Callable[..., Any]]:
    """By engine, what takes pixels and has logits among its outputs."""
    onnx, openvino = (load_exported(export(model, tempfile.mkdtemp(), format)) for format in ("onnx", "openvino"))
    int8 = load_exported(export(model, tempfile.mkdtemp(), int8=True))
    quantize_(quantized := copy.deepcopy(model), Int8DynamicActivationInt8WeightConfig())
    made = model, torch.compile(model), onnx, openvino, torch.compile(quantized), int8
    return dict(zip(ENGINES, made, strict=True))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("-m", "--method", default="salience_merge")
    for name, default in {"--limit": None, "--threads": torch.get_num_threads(), "--rounds": 15}.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("-b", "--batch-size", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForImageClassification.from_pretrained(args.model).eval()
    arms = {"dense": model, "pruned": prune(copy.deepcopy(model), args.method)}
    runs = {(engine, arm): run for arm, each in arms.items() for engine, run in runs_of(each).items()}
    images, processor = load_images(args.images, limit=args.limit), load_processor(args.model)
    said: dict[tuple[str, str], list[Tensor]] = {name: [] for name in runs}
    for i in range(0, len(images), size := max(args.batch_size)):
        batch = (images[j]["image"] for j in range(i, min(i + size, len(images))))
        pixels = processor(images=[*batch], return_tensors="pt")["pixel_values"]
        for name, run in runs.items():
            said[name].append(run(pixel_values=pixels)["logits"])
    times, heads, repeats = [], "", Repeats(args.rounds, 2, True)
    for b in args.batch_size:
        some = pixels[:1].repeat(b, 1, 1, 1)
        times.append(interleave({k: partial(seconds, partial(r, some)) for k, r in runs.items()}, repeats, f"of {b}"))
        heads += f" ms, batch {b} | faster (ideal {cost(arms['pruned']).ideal_speedup:.2f}) |"
    print(f"| engine | {args.method} |{heads} top-1 | agreement | KL |\n|---|---|{'---:|' * (2 * len(times) + 3)}")
    dense, labels = torch.cat(said["eager", "dense"]), torch.tensor(images.labels)
    for engine, arm in sorted(runs, key=lambda name: (ENGINES.index(name[0]), name[1])):
        own, cells = torch.cat(said[engine, arm]), ""
        for measured in times:
            ratio = cell(*speed_up(measured[engine, "dense"], measured[engine, arm]), ".2f") if arm == "pruned" else ""
            cells += f" {1e3 * statistics.median(measured[engine, arm]):.1f} | {ratio} |"
        scores = topk_correct(own, labels) * 100.0, agreement(dense, own) * 100.0, kl_divergence(dense, own)
        print(f"| {engine} | {arm} |{cells} {' | '.join(f'{score.mean():.4g}' for score in scores)} |")


if __name__ == "__main__":
    main()
