"""``hf-tokenprune bench``: wall-clock time."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from .options import (
    BatchSizesOpt,
    ConfigOpt,
    DeviceOpt,
    DtypeOpt,
    ImageSizeOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    NewTokensOpt,
    SetOpt,
    TextTokensOpt,
    ThreadsOpt,
    configs_for,
    device_for,
    dtype_for,
    load_dense,
    random_model,
    readable_errors,
    show,
    size_for,
)


@readable_errors
def bench(
    model: ModelArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    text_tokens: TextTokensOpt = None,
    new_tokens: NewTokensOpt = None,
    image_size: ImageSizeOpt = None,
    batch_size: BatchSizesOpt = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds for each batch size.")] = 15,
    threads: ThreadsOpt = None,
    dtype: DtypeOpt = "float32",
    device: DeviceOpt = "cpu",
    engine: Annotated[
        str, typer.Option(help="pytorch; or onnxruntime or openvino, for exports of the dense and the pruned model.")
    ] = "pytorch",
    random_weights: Annotated[bool, typer.Option(help="Only the config is read; speed needs no weights.")] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Both through torch.compile; CUDA graphs where --device is cuda.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Wall-clock time, dense (SDPA) against pruned, interleaved, beside the ideal and the cost of the decision.

    Of a vision-language model prefill, decode and end to end, with one image a prompt; with --compile the prefill.
    """
    from ..benchmark import benchmark
    from ..benchmark.compiled import CompileMode

    placement, size = (device_for(device), dtype_for(dtype)), size_for(image_size)
    loaded = random_model(model) if random_weights else load_dense(model, "cpu")
    loaded.to(*placement).eval()
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config, text_tokens, size)
    mode: CompileMode | None = None if not compile_ else "reduce-overhead" if placement[0].type == "cuda" else "default"
    measure = partial(
        benchmark, batch_sizes=batch_size, rounds=rounds, threads=threads, progress=sys.stderr.isatty(),
        image_size=size, text_tokens=text_tokens, new_tokens=new_tokens, compile_mode=mode, engine=engine,
    )  # fmt: skip
    reports = {name: measure(loaded, config) for name, config in variants.items()}
    data = {name: {"config": variants[name].to_dict(), **report.to_dict()} for name, report in reports.items()}
    show(as_json, data, "\n\n".join(f"{name}\n{report.summary()}" for name, report in reports.items()))
