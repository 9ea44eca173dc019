"""``hf-tokenprune compare``: methods side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .data_options import EvalDeviceOpt, EvalDtypeOpt, ImageColumnOpt, LabelColumnOpt, NoLabelsOpt, columns, placement
from .options import (
    ClassNamesOpt,
    ConfigOpt,
    ImagesArg,
    JsonOpt,
    LimitOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    SetOpt,
    SplitOpt,
    ThreadsOpt,
    check_vision,
    configs_for,
    load_dense,
    new_folder,
    readable_errors,
    show,
)
from .output import telling_on_interrupt, writable_folder


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
    image_column: ImageColumnOpt = None,
    label_column: LabelColumnOpt = None,
    no_labels: NoLabelsOpt = False,
    device: EvalDeviceOpt = None,
    dtype: EvalDtypeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Methods side by side at equal work (-g): accuracy, KL and measured speed, as table (CSV, Markdown) and picture.

    Without --method and --prune-config: every method that fits the model. Configs that are given without budgets
    compare as they are: `search` writes such.
    """
    from ..benchmark import benchmark
    from ..evaluation import load_images
    from ..evaluation.compare import Comparison, every_method
    from ..evaluation.optional import require
    from ..evaluation.paired import InterruptedEvaluation
    from ..evaluation.run import paired_report, processor_of

    accelerator, of_dtype = placement(device, dtype)
    which = columns(image_column, label_column, no_labels)
    check_vision(model, "compare")
    new_folder(out)
    require("matplotlib", "plot")
    if not gmacs and (method or not prune_config):
        raise ConfigError("methods compare at equal work: give budgets with --gmacs, such as -g 1.0 -g 0.85")
    writable_folder(out)
    dataset = load_images(images, limit=limit, split=split, **which)
    loaded = load_dense(model, "cpu", of_dtype)
    if method or prune_config:
        variants = configs_for(loaded, model, method, set_, gmacs, prune_config)
    else:
        variants = every_method(loaded, gmacs or [])
    command, saved = shlex.join(["hf-tokenprune", *sys.argv[1:]]), accelerator.is_main_process
    timing: dict[str, Any] = {}
    scored = 0
    with telling_on_interrupt(lambda: _left_by(out, len(variants), len(timing), scored, len(dataset))):
        try:
            accuracy = paired_report(
                processor_of(model, loaded), loaded, dataset, variants, class_names=class_names, batch_size=batch_size,
                accelerator=accelerator, progress=not as_json,
            )  # fmt: skip
        except InterruptedEvaluation as interrupt:
            scored = interrupt.report.rows[0].n
            if saved:
                Comparison(interrupt.report, timing, variants).save(out, command)
            raise
        scored = len(dataset)
        comparison = Comparison(accuracy, timing, variants)
        if saved:
            comparison.save(out, command)
        loaded.to(accelerator.device).eval()
        for number, (name, config) in enumerate(variants.items(), 1):
            if not as_json:
                typer.echo(f"timing {number} of {len(variants)}: {name}", err=True)
            timing[name] = benchmark(loaded, config, (batch_size,), rounds, threads=threads)
            if saved:
                files = comparison.save(out, command)
    if saved:
        files.append(comparison.draw(out))
        show(as_json, comparison.to_dict(), "\n".join([f"{comparison.to_markdown()}\n", *map(str, files)]))


def _left_by(out: Path, runs: int, timed: int, scored: int, images: int) -> str:
    """What an interrupted comparison leaves."""
    if not scored:
        return "no batch of images was scored, and nothing is saved"
    those = "" if scored == images else f", on the first {scored} of {images} images,"
    table = f", and {timed} with their speed in {out / 'comparison.csv'}" if timed else ""
    return f"the accuracy of {runs} runs{those} is in {out / 'accuracy.md'}{table}; configs beside it"
