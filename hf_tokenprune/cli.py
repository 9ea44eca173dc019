"""``hf-tokenprune``: list, info, apply, eval, bench and demo from a shell."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    ConfigOpt,
    DeviceOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    NewTokensOpt,
    SetOpt,
    TextTokensOpt,
    configs_for,
    empty_model,
    kind_of,
    load_dense,
    random_model,
    readable_errors,
    save_processor,
    show,
)
from .errors import ConfigError, TokenPruneError

app = typer.Typer(
    help="Training-free token pruning for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("list")
@readable_errors
def list_(as_json: JsonOpt = False) -> None:
    """Methods, what they prune and their default configs; and model families."""
    from .registry import get_method, list_adapters, list_methods

    methods = {name: get_method(name) for name in list_methods()}
    prunes = {name: sorted(method.prunes) for name, method in methods.items()}
    lines = ["methods, and what they prune"]
    for name, method in methods.items():
        first_line = (method.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<14}{', '.join(prunes[name]):<17}{first_line}")
    lines += ["model families (model_type)", *(f"  {name}" for name in list_adapters())]
    data = {"methods": {name: method().to_dict() for name, method in methods.items()}, "prunes": prunes}
    show(as_json, {**data, "adapters": list_adapters()}, "\n".join(lines))


@app.command()
@readable_errors
def info(
    model: ModelArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    text_tokens: TextTokensOpt = None,
    new_tokens: NewTokensOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Tokens and MACs of every block, dense and pruned; of a vision-language model prefill, decode and cache.

    The weights are not loaded.
    """
    from .cost import cost

    shell = empty_model(model)
    variants = configs_for(shell, model, method, set_, gmacs, prune_config, text_tokens)
    reports = {
        name: cost(shell, config, text_tokens=text_tokens, new_tokens=new_tokens) for name, config in variants.items()
    }
    data = {name: {"config": variants[name].to_dict(), **report.to_dict()} for name, report in reports.items()}
    show(as_json, data, "\n\n".join(f"{name}\n{report.summary()}" for name, report in reports.items()))


@app.command()
@readable_errors
def apply(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="Folder to write to; must be new or empty.")],
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a copy of a checkpoint that carries its prune config (weights unchanged)."""
    from .cost import cost
    from .engine import prune
    from .pretrained import save_pretrained

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another one")
    loaded = load_dense(model, "cpu")
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    if len(variants) != 1:
        raise ConfigError(f"apply writes one config, got {len(variants)} ({', '.join(variants)}); choose one")
    ((name, config),) = variants.items()
    save_pretrained(prune(loaded, config), out)
    save_processor(model, loaded, out)
    report = cost(loaded)
    text = f"{out}: {name}, {report.dense.macs / 1e9:.3f} -> {report.pruned.macs / 1e9:.3f} GMACs an image"
    show(as_json, {"path": str(out), "config": config.to_dict(), **report.to_dict()}, text)


@app.command("eval")
@readable_errors
def evaluate(
    model: ModelArg,
    images: Annotated[
        str, typer.Argument(help="Folder with labels.csv, folder of class folders, or a datasets repository.")
    ],
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    split: Annotated[str | None, typer.Option(help="Split of a dataset, or subfolder.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images, evenly spread.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    class_names: Annotated[
        Path | None,
        typer.Option(help="For CLIP-like models: a text file with the name of class 0, 1, ... in its lines."),
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Accuracy of the dense and the pruned model on the same images, with 95 % intervals; zero-shot for CLIP.

    Runs on the device accelerate chooses; for several: `accelerate launch --multi_gpu -m hf_tokenprune.cli eval ...`.
    """
    from .cost import cost
    from .engine import pruned
    from .evaluation import evaluate_paired, evaluate_zero_shot, load_images, load_processor
    from .evaluation.optional import require

    if kind_of(empty_model(model)) != "vision":
        raise TokenPruneError(
            f"{model!r} is a vision-language model, and eval measures image classification; `info` tells what pruning "
            "it saves, `bench` how fast it gets"
        )
    accelerate = require("accelerate")
    accelerator = accelerate.Accelerator()
    dataset = load_images(images, limit=limit, split=split)
    loaded = load_dense(model, "cpu")
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    macs = {name: float(cost(loaded, config).pruned.macs) for name, config in variants.items()}
    arms = {name: partial(pruned, loaded, config) for name, config in variants.items()}
    settings: dict[str, Any] = {
        "macs": {"dense": float(cost(loaded).dense.macs), **macs},
        "batch_size": batch_size,
        "accelerator": accelerator,
        "progress": not as_json,
    }
    if hasattr(loaded, "get_text_features"):
        from transformers import AutoProcessor

        names = class_names.read_text(encoding="utf-8").splitlines() if class_names else dataset.classes
        if names is None:
            raise ConfigError(f"{images!r} has labels without names: give --class-names FILE, a line a class")
        report = evaluate_zero_shot(loaded, dataset, AutoProcessor.from_pretrained(model), names, arms, **settings)
    elif class_names:
        raise ConfigError("--class-names has no effect: this model has a classifier of its own")
    else:
        report = evaluate_paired(loaded, dataset, load_processor(model), arms, **settings)
    if accelerator.is_main_process:
        data = {**report.to_dict(), "configs": {name: config.to_dict() for name, config in variants.items()}}
        show(as_json, data, report.to_markdown() if markdown else report.summary())


@app.command()
@readable_errors
def bench(
    model: ModelArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    text_tokens: TextTokensOpt = None,
    new_tokens: NewTokensOpt = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", "-b", min=1, help="May be repeated. Default: 1, 8, 32; with a decoder 1, 4."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds for each batch size.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: DeviceOpt = "cpu",
    random_weights: Annotated[bool, typer.Option(help="Only the config is read; speed needs no weights.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Wall-clock time, dense (SDPA) against pruned, interleaved, beside the ideal and the cost of the decision.

    Of a vision-language model prefill, decode and end to end, with one image a prompt.
    """
    import torch

    from .benchmark import benchmark

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
    loaded = random_model(model) if random_weights else load_dense(model, "cpu")
    loaded.to(device, getattr(torch, dtype)).eval()
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config, text_tokens)
    measure = partial(
        benchmark,
        batch_sizes=batch_size,
        rounds=rounds,
        threads=threads,
        progress=sys.stderr.isatty(),
        text_tokens=text_tokens,
        new_tokens=new_tokens,
    )
    reports = {name: measure(loaded, config) for name, config in variants.items()}
    data = {name: {"config": variants[name].to_dict(), **report.to_dict()} for name, report in reports.items()}
    show(as_json, data, "\n\n".join(f"{name}\n{report.summary()}" for name, report in reports.items()))


@app.command()
@readable_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where the picture and the pruned checkpoint go.")] = Path("demo_output"),
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many of the 360 test digits.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """The packaged digits model, dense and pruned by every method: accuracy, speed, a picture. Needs no download."""
    from .demo.run import run_demo

    result = run_demo(out, limit=limit, progress=not as_json)
    show(as_json, result.to_dict(), result.summary())


if __name__ == "__main__":
    app()
