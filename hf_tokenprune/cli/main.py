"""``hf-tokenprune``: list, info, apply, eval, compare, search, bench and demo from a shell."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    BatchSizesOpt,
    ClassNamesOpt,
    ConfigOpt,
    DataArg,
    DeviceOpt,
    FreeOpt,
    GMacsOpt,
    GoalOpt,
    ImagesArg,
    JsonOpt,
    LatencyBatchOpt,
    LimitOpt,
    MacsOpt,
    MethodOpt,
    MillisecondsOpt,
    ModelArg,
    NewTokensOpt,
    PromptOpt,
    QuestionOpt,
    SetOpt,
    SplitOpt,
    StrategyOpt,
    TemplateOpt,
    TextTokensOpt,
    ThreadsOpt,
    TrialsOpt,
    check_effect,
    check_vision,
    configs_for,
    empty_model,
    kind_of,
    load_dense,
    new_folder,
    parse_fields,
    random_model,
    readable_errors,
    save_processor,
    show,
)
from ..config import PruneConfig
from ..errors import ConfigError

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
    from ..registry import get_method, list_adapters, list_methods

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
    from ..cost.model import cost

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
    from ..cost.model import cost
    from ..engine import prune
    from ..sharing.pretrained import save_pretrained

    new_folder(out)
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
    data: DataArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    split: SplitOpt = None,
    limit: LimitOpt = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 32; with a decoder 8.")] = None,
    class_names: ClassNamesOpt = None,
    template: TemplateOpt = None,
    prompt: PromptOpt = None,
    new_tokens: NewTokensOpt = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Accuracy of the dense and the pruned model on the same images, with 95 % intervals; zero-shot for CLIP.

    Of a vision-language model: exact match of its answers. Runs on the device accelerate chooses; for several:
    `accelerate launch --multi_gpu -m hf_tokenprune.cli eval ...`.
    """
    from ..evaluation.run import evaluate_model
    from ..evaluation import load_images, load_questions
    from ..evaluation.optional import require

    decoder = kind_of(empty_model(model)) != "vision"
    no_effect = {"--prompt": prompt, "--new-tokens": new_tokens}
    check_effect(decoder, {"--class-names": class_names, "--template": template} if decoder else no_effect)
    accelerator = require("accelerate").Accelerator()
    dataset = (load_questions if decoder else load_images)(data, limit=limit, split=split)
    loaded = load_dense(model, "cpu")
    choose = partial(configs_for, loaded, model, method, set_, gmacs, prune_config)
    report, variants = evaluate_model(
        model, loaded, dataset, choose, class_names=class_names, templates=template, prompt=prompt,
        new_tokens=new_tokens, batch_size=batch_size or (8 if decoder else 32), accelerator=accelerator,
        progress=not as_json,
    )  # fmt: skip
    if accelerator.is_main_process:
        configs = {name: config.to_dict() for name, config in variants.items()}
        show(as_json, {**report.to_dict(), "configs": configs}, report.to_markdown() if markdown else report.summary())


@app.command()
@readable_errors
def compare(
    model: ModelArg,
    images: ImagesArg,
    out: Annotated[Path, typer.Option(help="Folder for table, picture and configs; must be new or empty.")],
    gmacs: MacsOpt = None,
    method: MethodOpt = None,
    set_: SetOpt = None,
    prune_config: ConfigOpt = None,
    split: SplitOpt = None,
    limit: LimitOpt = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Of both, accuracy and timing.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of the timing.")] = 5,
    threads: ThreadsOpt = None,
    class_names: ClassNamesOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Methods side by side at equal work (-g): accuracy, KL and measured speed, as table (CSV, Markdown) and picture.

    Without --method and --prune-config: every method that fits the model. Configs that are given without budgets
    compare as they are: `search` writes such.
    """
    from ..benchmark.vision import benchmark
    from ..evaluation.compare import Comparison, every_method
    from ..evaluation.run import paired_report
    from ..evaluation import load_images
    from ..evaluation.optional import require

    check_vision(model, "compare")
    new_folder(out)
    require("matplotlib", "plot")
    if not gmacs and (method or not prune_config):
        raise ConfigError("methods compare at equal work: give budgets with --gmacs, such as -g 1.0 -g 0.85")
    accelerator = require("accelerate").Accelerator()
    dataset = load_images(images, limit=limit, split=split)
    loaded = load_dense(model, "cpu")
    if method or prune_config:
        variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    else:
        variants = every_method(loaded, gmacs or [])
    accuracy = paired_report(
        model, loaded, dataset, variants, class_names=class_names, batch_size=batch_size, accelerator=accelerator,
        progress=not as_json,
    )  # fmt: skip
    loaded.to(accelerator.device).eval()
    timing: dict[str, Any] = {}
    for number, (name, config) in enumerate(variants.items(), 1):
        if not as_json:
            typer.echo(f"timing {number} of {len(variants)}: {name}", err=True)
        timing[name] = benchmark(loaded, config, (batch_size,), rounds, threads=threads)
    comparison = Comparison(accuracy, timing, variants)
    if accelerator.is_main_process:
        files = comparison.save(out, shlex.join(["hf-tokenprune", *sys.argv[1:]]))
        show(as_json, comparison.to_dict(), "\n".join([f"{comparison.to_markdown()}\n", *map(str, files)]))


@app.command()
@readable_errors
def search(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="Folder for prune_config.json, search.json and the journal.")],
    method: Annotated[str, typer.Option("--method", "-m", help="Whose schedule to search; see `list`.")],
    images: Annotated[str | None, typer.Argument(help="Data as for `eval`; labels are not needed.")] = None,
    synthetic: Annotated[bool, typer.Option("--synthetic", help="No images: make them from the classifier.")] = False,
    set_: SetOpt = None,
    gmacs: GMacsOpt = None,
    speedup: Annotated[float | None, typer.Option(help="Budget: so many times faster, measured here.")] = None,
    milliseconds: MillisecondsOpt = None,
    latency_batch: LatencyBatchOpt = None,
    strategy: StrategyOpt = None,
    goal: GoalOpt = None,
    free: FreeOpt = None,
    trials: TrialsOpt = None,
    seed: int = 0,
    split: SplitOpt = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Images, evenly spread: 300; or made: 64.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 50; with a decoder 4.")] = None,
    class_names: ClassNamesOpt = None,
    question: QuestionOpt = None,
    prompt: PromptOpt = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer, at most. Default: 16.")] = None,
    device: DeviceOpt = "cpu",
    as_json: JsonOpt = False,
) -> None:
    """The schedule that changes a model's answers least within a budget, found on images without labels.

    Started again with the same arguments after an interruption, it goes on where it was.
    """
    from ..search.run import search_images

    decoder = kind_of(empty_model(model)) != "vision"
    no_effect = {"--question": question, "--prompt": prompt, "--new-tokens": new_tokens}
    check_effect(decoder, {"--class-names": class_names, "--synthetic": synthetic or None} if decoder else no_effect)
    if (images is None) != synthetic:
        raise ConfigError("give IMAGES to search on, or --synthetic for images made from the model, one of the two")
    given = parse_fields(set_ or [])
    config = PruneConfig.for_method(method, **given)
    budget = {"macs": gmacs and gmacs * 1e9, "seconds": milliseconds and milliseconds / 1000, "speedup": speedup}
    loaded = load_dense(model, device).eval()
    result, text = search_images(
        model, loaded, images, config, out, budget, free=free, fixed=given,
        split=split, limit=limit or (64 if synthetic else 300), batch_size=batch_size or (4 if decoder else 50),
        class_names=class_names, questions=question, prompt=prompt, new_tokens=new_tokens, progress=not as_json,
        strategy=strategy, goal=goal, trials=trials, seed=seed, latency_batch_size=latency_batch,
    )  # fmt: skip
    show(as_json, result.to_dict(), text)


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
    batch_size: BatchSizesOpt = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds for each batch size.")] = 15,
    threads: ThreadsOpt = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: DeviceOpt = "cpu",
    random_weights: Annotated[bool, typer.Option(help="Only the config is read; speed needs no weights.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Wall-clock time, dense (SDPA) against pruned, interleaved, beside the ideal and the cost of the decision.

    Of a vision-language model prefill, decode and end to end, with one image a prompt.
    """
    import torch

    from ..benchmark.vision import benchmark

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
    loaded = random_model(model) if random_weights else load_dense(model, "cpu")
    loaded.to(device, getattr(torch, dtype)).eval()
    variants = configs_for(loaded, model, method, set_, gmacs, prune_config, text_tokens)
    measure = partial(
        benchmark, batch_sizes=batch_size, rounds=rounds, threads=threads, progress=sys.stderr.isatty(),
        text_tokens=text_tokens, new_tokens=new_tokens,
    )  # fmt: skip
    reports = {name: measure(loaded, config) for name, config in variants.items()}
    data = {name: {"config": variants[name].to_dict(), **report.to_dict()} for name, report in reports.items()}
    show(as_json, data, "\n\n".join(f"{name}\n{report.summary()}" for name, report in reports.items()))


@app.command()
@readable_errors
def demo(
    out: Annotated[Path, typer.Option(help="Where the pictures and the pruned checkpoint go.")] = Path("demo_output"),
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many images of each model.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Three packaged models (ViT, CLIP, LLaVA), dense and pruned by every method: accuracy, speed, pictures."""
    from ..demo.run import run_demo

    result = run_demo(out, limit=limit, progress=not as_json)
    show(as_json, result.to_dict(), result.summary())


if __name__ == "__main__":
    app()
