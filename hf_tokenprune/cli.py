"""``hf-tokenprune``: list, info, apply, eval, bench and demo from a shell."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from .config import CONFIG_NAME, PruneConfig
from .errors import ConfigError, TokenPruneError

app = typer.Typer(
    help="Training-free token pruning for Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelArg = Annotated[str, typer.Argument(help="Folder of a checkpoint, or owner/name on the Hub.")]
MethodOpt = Annotated[
    list[str] | None, typer.Option("--method", "-m", help="Name of a method, its default config; see `list`.")
]
SetOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", help="field=value for every --method; JSON values: -s where=mid_block -s 'layers=[2,5]'."
    ),
]
MacsOpt = Annotated[
    list[float] | None,
    typer.Option("--gmacs", "-g", help="Scale the schedule to at most so many GMACs an image."),
]
ConfigOpt = Annotated[
    list[str] | None, typer.Option("--prune-config", "-c", help="prune_config.json: file, folder or Hub repository.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
DeviceOpt = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]


def readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can act on are one line on stderr and exit code 1, not a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (TokenPruneError, ImportError, OSError) as error:
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error

    return run


def show(as_json: bool, data: Any, text: str) -> None:
    """The result of a command, for a program or for a person."""
    typer.echo(json.dumps(data, indent=2) if as_json else text)


@app.command("list")
@readable_errors
def list_(as_json: JsonOpt = False) -> None:
    """Methods and model families, with the default config of each method."""
    from .registry import get_method, list_adapters, list_methods

    methods = {name: get_method(name)().to_dict() for name in list_methods()}
    lines = ["methods"]
    for name in methods:
        lines.append(f"  {name:<14}{(get_method(name).__doc__ or '').strip().splitlines()[0]}")
    lines += ["model families (model_type)", *(f"  {name}" for name in list_adapters())]
    show(as_json, {"methods": methods, "adapters": list_adapters()}, "\n".join(lines))


@app.command()
@readable_errors
def info(
    model: ModelArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Tokens and MACs of every block, dense and pruned. The weights are not loaded."""
    from .cost import cost

    shell = empty_model(model)
    variants = configs_for(shell, model, method, set_, gmacs, prune_config)
    reports = {name: cost(shell, config) for name, config in variants.items()}
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
    from .evaluation import load_processor
    from .pretrained import save_pretrained

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another one")
    loaded = load_dense(model, "cpu")
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    if len(variants) != 1:
        raise ConfigError(f"apply writes one config, got {len(variants)} ({', '.join(variants)}); choose one")
    ((name, config),) = variants.items()
    from .engine import prune

    save_pretrained(prune(loaded, config), out)
    load_processor(model).save_pretrained(out)
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
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Accuracy of the dense and the pruned model on the same images, with 95 % intervals.

    Runs on the device accelerate chooses; for several: `accelerate launch --multi_gpu -m hf_tokenprune.cli eval ...`.
    """
    from .cost import cost
    from .engine import pruned
    from .evaluation import evaluate_paired, load_images, load_processor
    from .evaluation.optional import require

    accelerate = require("accelerate")
    accelerator = accelerate.Accelerator()
    dataset = load_images(images, limit=limit, split=split)
    loaded = load_dense(model, "cpu")
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    macs = {name: float(cost(loaded, config).pruned.macs) for name, config in variants.items()}
    report = evaluate_paired(
        loaded,
        dataset,
        load_processor(model),
        {name: partial(pruned, loaded, config) for name, config in variants.items()},
        macs={"dense": float(cost(loaded).dense.macs), **macs},
        batch_size=batch_size,
        accelerator=accelerator,
        progress=not as_json,
    )
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
    batch_size: Annotated[list[int] | None, typer.Option("--batch-size", "-b", min=1, help="May be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds for each batch size.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: DeviceOpt = "cpu",
    random_weights: Annotated[bool, typer.Option(help="Only the config is read; speed needs no weights.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Wall-clock time, dense (SDPA) against pruned, interleaved, beside the ideal and the cost of the decision."""
    import torch

    from .benchmark import benchmark

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
    loaded = random_model(model) if random_weights else load_dense(model, "cpu")
    loaded.to(device, getattr(torch, dtype)).eval()
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    reports = {
        name: benchmark(
            loaded, config, batch_size or (1, 8, 32), rounds=rounds, threads=threads, progress=sys.stderr.isatty()
        )
        for name, config in variants.items()
    }
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


# -- what several commands share -------------------------------------------------------------------------------------


def configs_for(
    model: Any,
    path: str,
    methods: list[str] | None,
    fields: list[str] | None,
    gmacs: list[float] | None,
    prune_configs: list[str] | None,
) -> dict[str, PruneConfig]:
    """The configs that the options name, by a label for tables. With none named: the checkpoint's own.

    Every config is combined with every MACs budget.
    """
    from .cost import config_for_macs
    from .pretrained import choose_config

    if fields and not methods:
        raise ConfigError(f"--set {fields[0]} has no effect without --method")
    chosen = {name: PruneConfig.for_method(name, **parse_fields(fields or [])) for name in methods or []}
    for source in prune_configs or []:
        file = Path(source)
        short = file.parent.name if file.name == CONFIG_NAME else file.stem
        chosen[source if not short or short in chosen else short] = PruneConfig.from_pretrained(source)
    if not chosen:
        own = choose_config(path, None, getattr(model.config, "prune_config", None), {})
        if own is None:
            raise ConfigError(f"{path!r} carries no prune config; give --method or --prune-config")
        chosen = {own.method: own}
    if not gmacs:
        return chosen
    return {
        f"{name}@{budget:g}": config_for_macs(model, config, budget * 1e9)
        for budget in gmacs
        for name, config in chosen.items()
    }


def parse_fields(items: list[str]) -> dict[str, Any]:
    """``field=value`` strings; a value that is not JSON is a string."""
    fields = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {item!r}: expected field=value")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def load_dense(path: str, device: str) -> Any:
    """The stock model, whatever config the checkpoint carries."""
    from transformers import AutoConfig

    from .pretrained import class_of

    return class_of(AutoConfig.from_pretrained(path)).from_pretrained(path).to(device)


def random_model(path: str) -> Any:
    """The model with random weights, from its config alone."""
    from transformers import AutoConfig

    from .pretrained import class_of

    config = AutoConfig.from_pretrained(path)
    return class_of(config)._from_config(config)


def empty_model(path: str) -> Any:
    """The model without memory for its weights: enough to know sizes."""
    import torch

    with torch.device("meta"):
        return random_model(path)


if __name__ == "__main__":
    app()
