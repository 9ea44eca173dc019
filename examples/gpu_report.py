"""What pruning gains on one GPU, in one command below eight minutes: a Markdown table and JSON.

    python examples/gpu_report.py [--minutes 6] [--out gpu_report]     # --dry-run: tiny shapes, on the CPU

Random weights of the shapes of DeiT-S, ViT-B, ViT-L, LLaVA-1.5-7B and LLaVA-NeXT-7B; nothing is downloaded. What there
is no time for, or no memory, is a line that says so. Then the tests that need a GPU, where a checkout is there.
"""

import argparse
import subprocess
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers as stock

from hf_tokenprune.benchmark import benchmark
from hf_tokenprune.benchmark.cases import Case, run_cases, write_report

PAPERS = """theirs, of other batches and prompts. DeiT-S, images/s, A100 (page of Zero-TPrune): dense 1506, Zero-TPrune
2188, ToMe 2264. LLaVA-NeXT-Video-7B (DivPrune, Table 2): prefill 0.330 → 0.161 s, end to end 4.37 → 3.39 s, weights and
all 14.06 → 13.51 GB. LLaVA-1.5-7B, MME, A100 (TransPrune, Table 8): 111.4 ms, 14.82 GB; FastV 125.2 ms, 14.99 GB."""
VIT, BATCHES = {"DeiT-S": (12, 384), "ViT-B": (12, 768), "ViT-L": (24, 1024)}, (1, 8, 64, 256)  # by blocks, width
MODES: dict[str, Any] = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--minutes", type=float, default=6, help="after these no case begins; the tests come behind them")
parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="NAME of NAME.md and NAME.json")
parser.add_argument("--dry-run", action="store_true", help="each kind of case, tiny, on the CPU, without the tests")
tiny = (args := parser.parse_args()).dry_run


def sizes(depth: int, width: int) -> dict[str, Any]:
    depth, width, n = (min(depth, 13), 32, 2) if tiny else (depth, width, width // 64)
    return {"num_hidden_layers": depth, "hidden_size": width, "num_attention_heads": n, "intermediate_size": 4 * width}


@cache
def loaded(shape: str, dtype: str, attention: str) -> Any:
    loaded.cache_clear()  # one model at a time
    auto: Any = stock.AutoModelForImageClassification
    if shape in VIT:
        config: Any = stock.ViTConfig(**sizes(*VIT[shape]))
    else:  # what is not said here is as in the 7B models
        auto, few = stock.AutoModelForImageTextToText, sizes(24, 1024)
        tower = stock.CLIPVisionConfig(**few, image_size=28 if tiny else 336, patch_size=14)
        text = stock.LlamaConfig(vocab_size=32064, **(few if tiny else {}))
        more = {"image_grid_pinpoints": [[28, 56], [56, 28]]} if tiny and "NeXT" in shape else {}
        kind = stock.LlavaNextConfig if "NeXT" in shape else stock.LlavaConfig
        config = kind(vision_config=tower, text_config=text, image_token_id=32000, **more)
    with torch.device("cpu" if tiny else "cuda"):
        return auto.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention).eval()


def case(shape: str, method: str, how: str, *batches: int, dtype: str = "bfloat16", attention: str = "sdpa") -> Case:
    def measure() -> Any:
        few: dict[str, Any] = {"text_tokens": 4, "new_tokens": 3} if tiny and shape not in VIT else {}
        few |= {"batch_sizes": (1,) if tiny else batches, "rounds": 3 if tiny else 9}
        return benchmark(loaded(shape, dtype, attention), method, compile_mode=MODES[how], **few)

    return Case(f"{shape}, {method}, {how}, {dtype}, {attention}, {batches}", measure)


methods, dropping = ("tome", "salience_merge", "zero_tprune"), ("divprune", "transprune")
cases = [case(f"LLaVA-{kind}-7B", method, "eager", 1, 4) for kind in ("1.5", "NeXT") for method in dropping]
cases += [case(shape, method, "eager", *BATCHES) for shape in VIT for method in methods]
cases += [case("DeiT-S", "zero_tprune", "eager", *BATCHES, dtype="float16")]
cases += [case("ViT-L", "zero_tprune", "eager", *BATCHES, attention="flash_attention_2")]
cases += [case(shape, method, "CUDA graphs", n) for shape in VIT for n in BATCHES for method in methods]
cases += [case("DeiT-S", method, "compiled", n) for n in BATCHES for method in methods]
if tiny:  # one of each kind; that code is generated is tested elsewhere
    torch.compiler.set_stance("force_eager")
    cases = [*cases[1:3], cases[4], *cases[13:16], cases[-1]]
lines, tests = list(run_cases(cases, args.minutes * 60, partial(print, flush=True))), "not run"
if not tiny and (checkout := Path(__file__).parents[1] / "tests").is_dir():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--all", str(checkout)]
    tests = subprocess.run(command, capture_output=True, text=True).stdout.strip().split("\n")[-1]
write_report(args.out, lines, {"Tests that need a GPU": tests, "Figures of the papers": PAPERS.replace("\n", " ")})
