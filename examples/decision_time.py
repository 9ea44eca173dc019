"""What choosing costs: each method for vision-language models at the sizes of a 7B model, against its dense prefill.

    python examples/decision_time.py [--device cuda] [--dtype bfloat16] [--repeats 5]

Random signals, as an adapter would hand them to the method: what it takes to read them (a row of attention, a block of
the vision tower) is not in it. Counted: multiply-adds of matrix products. Measured: the median of interleaved runs,
beside that of one decoder layer on the same device, times 32.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from hf_tokenprune import ConfigError, PruneConfig, list_methods
from hf_tokenprune.field_types import few_values, field_types
from hf_tokenprune.registry import get_method
from hf_tokenprune.signals import DecoderShape, ModelShape, Signals, Stage

WIDTH, DEPTH, HEADS, TEXT = 4096, 32, 32, 64
CASES = ((576, 64), (2340, 229))
BATCHES = (1, 4)
TOWER = ModelShape(
    depth=24, width=1024, mlp_width=4096, num_heads=16, head_dim=64, image_size=(336, 336), patch_size=(14, 14),
    num_channels=3, num_protected=1, has_cls=True, head_macs=0,
)  # fmt: skip


def decoder_shape(num_tokens: int) -> DecoderShape:
    """LLaVA-1.5-7B's, with ``num_tokens`` image tokens."""
    return DecoderShape(
        depth=DEPTH, width=WIDTH, mlp_width=11008, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=128,
        vocab_size=32064, tower=TOWER, tower_images=1, tower_tokens=num_tokens, image_tokens=num_tokens,
        projector_macs=0, newline_tokens=0,
    )  # fmt: skip


def variants() -> dict[str, PruneConfig]:
    """Each method for decoders, and each choice of a field that has few values, by name."""
    found = {}
    for name in list_methods("decoder"):
        config_class: Any = get_method(name)
        found[name] = config_class()
        for field, hint in field_types(config_class).items():
            for value in few_values(hint) or ():
                try:
                    config = config_class(**{field: value})
                except ConfigError:
                    continue
                if config != found[name] and field not in ("positions", "newlines", "budget"):
                    found[f"{name}({field}={value})"] = config
    return found


def keeping(config: PruneConfig, kept: int, shape: DecoderShape) -> PruneConfig | None:
    """The config with ``kept`` tokens left at its last place; None: it is no single method, or cannot."""
    try:
        places = config.search_places(shape)
        if config.method == "stack" or not places:
            return None
        if len(config.stages_for(shape)) == 1:
            return config.with_counts(shape, {config.stages_for(shape)[0].place: kept})
        places = tuple(stage.place for stage in config.stages_for(shape))
        steps = [
            round(shape.image_tokens - (shape.image_tokens - kept) * (i + 1) / len(places)) for i in range(len(places))
        ]
        return config.with_counts(shape, dict(zip(places, steps, strict=True)))
    except (ConfigError, NotImplementedError):
        return None


def signals(stage: Stage, batch: int, num_tokens: int, device: str, dtype: torch.dtype) -> Signals:
    """Random ones, of what the stage needs."""
    in_tower = stage.where == "vision_tower"
    width, heads, head_dim = (1024, 16, 64) if in_tower else (WIDTH, HEADS, 128)
    protected = int(in_tower)
    entering = protected + num_tokens

    def rand(*size: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(batch, *size, device=device).to(of)

    def shares(*size: int) -> Tensor:
        return rand(*size, of=torch.float32).softmax(-1)

    mask = torch.ones(batch, TEXT, dtype=torch.bool, device=device)
    offered: dict[str, Callable[[], Any]] = {
        "attention": lambda: (shares(heads, entering, entering),),
        "cls_attention": lambda: shares(heads, entering),
        "received_attention": lambda: shares(heads, entering),
        "earlier_attention": lambda: shares(heads, entering),
        "keys": lambda: rand(heads, entering, head_dim),
        "values": lambda: rand(heads, entering, head_dim),
        "queries": lambda: rand(heads, entering, head_dim),
        "tower_features": lambda: rand(num_tokens, 1024),
        "text": lambda: rand(TEXT, WIDTH),
        "text_keys": lambda: rand(heads, TEXT, head_dim),
        "text_attention": lambda: shares(heads, TEXT, num_tokens),
        "text_scores": lambda: rand(TEXT, of=torch.float32),
        "layer_scores": lambda: rand(len(stage.observes), num_tokens, of=torch.float32),
    }
    tokens = rand(entering, width)
    given = {name: offered[name]() for name in stage.needs if name in offered}
    return Signals(tokens, tokens, protected, in_tower, text_mask=mask, columns=int(num_tokens**0.5), **given)


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def macs(function: Callable[[], Any]) -> float:
    """Multiply-adds of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    sizes = LlamaConfig(hidden_size=WIDTH, intermediate_size=11008, num_attention_heads=HEADS)
    sizes._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(sizes, 0).to(args.device, dtype).eval()
    rotary = LlamaRotaryEmbedding(sizes).to(args.device)
    print(f"torch {torch.__version__}, {args.device}, {args.dtype}, median of {args.repeats}")
    for num_tokens, kept in CASES:
        for batch in BATCHES:
            length = num_tokens + TEXT
            states = torch.randn(batch, length, WIDTH, device=args.device, dtype=dtype)
            place = rotary(states, torch.arange(length, device=args.device)[None])

            def dense(states: Tensor = states, place: Any = place) -> Any:
                return layer(states, position_embeddings=place)

            choices: dict[str, list[Callable[[], Any]]] = {}
            for name, config in variants().items():
                fitting = keeping(config, kept, decoder_shape(num_tokens))
                if fitting is None or any(stage.videos_only for stage in fitting.stages_for(decoder_shape(num_tokens))):
                    continue
                calls, entering = [], num_tokens
                for stage in fitting.stages_for(decoder_shape(num_tokens)):
                    of = num_tokens if stage.counts_from == "original" else entering
                    n_keep = min(entering, stage.num_kept(of))
                    given = signals(stage, batch, entering, args.device, dtype)
                    calls.append(lambda stage=stage, given=given, n_keep=n_keep: stage.reduce(given, n_keep))
                    entering = n_keep
                choices[name] = calls
            whole = DEPTH * macs(dense)
            counted = {name: sum(map(macs, calls)) / whole for name, calls in choices.items()}
            seconds: dict[str, list[float]] = {name: [] for name in ["dense", *choices]}
            for repeat in range(args.repeats + 1):  # the first one warms up
                for name, calls in {"dense": [dense], **choices}.items():
                    took = sum(timed(call, args.device) for call in calls)
                    if repeat:
                        seconds[name].append(took)
            prefill = DEPTH * statistics.median(seconds.pop("dense"))
            print(f"\n{kept} of {num_tokens} tokens, batch {batch}: dense prefill of {length} tokens {prefill:.2f} s\n")
            print("| method | ms | % of the prefill | counted, % |\n|---|---:|---:|---:|")
            for name, times in sorted(seconds.items(), key=lambda item: statistics.median(item[1])):
                took = statistics.median(times)
                print(f"| {name} | {1e3 * took:.1f} | {100 * took / prefill:.2f} | {100 * counted[name]:.2f} |")


if __name__ == "__main__":
    main()
