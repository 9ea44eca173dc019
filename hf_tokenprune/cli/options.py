"""What several commands of ``hf-tokenprune`` share: their options, and what these name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import CONFIG_NAME, PruneConfig, as_config
from ..errors import ConfigError, TokenPruneError
from .checkpoint import first_line, load_weights, read_config
from .messages import flags_of, in_flags, warnings_in_lines

if TYPE_CHECKING:
    import torch

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
    typer.Option("--gmacs", "-g", help="Scale the schedule to at most so many GMACs an image (prefill)."),
]
ResizeOpt = Annotated[
    list[float] | None,
    typer.Option(
        help="Also a run without a method: so large a share of the image tokens, by fewer pixels. May be repeated."
    ),
]
ConfigOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--prune-config",
        "-c",
        help="prune_config.json (file, folder, Hub), a preset (method/model@budget) or a method.",
    ),
]
TextTokensOpt = Annotated[
    int | None,
    typer.Option(min=1, help="Vision-language models: tokens of the prompt besides those of its image. Default: 64."),
]
NewTokensOpt = Annotated[
    int | None, typer.Option(min=2, help="Vision-language models: tokens to generate. Default: 32.")
]
ImageSizeOpt = Annotated[
    str | None,
    typer.Option(
        metavar="HEIGHTxWIDTH",
        help="In pixels, for models that take images of several sizes. Default: the checkpoint's own, or a usual one.",
    ),
]
ImagesArg = Annotated[
    str, typer.Argument(help="Folder with labels.csv, folder of class folders, or a datasets repository.")
]
DataArg = Annotated[
    str,
    typer.Argument(
        help="Images: folder with labels.csv, folder of class folders, or a datasets repository. For vision-language "
        "models: folder with questions.jsonl, or a datasets repository with image, question, answer."
    ),
]
PromptOpt = Annotated[
    str | None,
    typer.Option(
        help="Vision-language models: text with {} where the question goes. Default: the processor's chat template."
    ),
]
QuestionOpt = Annotated[
    list[str] | None,
    typer.Option("--question", help="Vision-language models: asked of every image; may be repeated."),
]
GMacsOpt = Annotated[float | None, typer.Option("--gmacs", "-g", help="Budget in GMACs an image (prefill).")]
MillisecondsOpt = Annotated[
    float | None, typer.Option("--ms", help="Budget: a forward (prefill) of --latency-batch images.")
]
LatencyBatchOpt = Annotated[
    int | None, typer.Option(min=1, help="Images a forward, for --speedup and --ms. Default: 1.")
]
GoalOpt = Annotated[
    str | None,
    typer.Option(help="geometric_kl (default), kl (of answers the default), agreement or accuracy."),
]
StrategyOpt = Annotated[
    str | None,
    typer.Option(
        help="dynamic (default), coordinate, monte_carlo or optuna; or rule: fields only (default of --synthetic)."
    ),
]
TrialsOpt = Annotated[int | None, typer.Option(min=0, help="Schedules to measure: 100; dynamic, after its table: 30.")]
FreeOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--free",
        help="Field to choose beside the counts, or none. Repeatable. Default: the method's, except those of --set.",
    ),
]
SplitOpt = Annotated[str | None, typer.Option(help="Split of a dataset, or subfolder.")]
LimitOpt = Annotated[int | None, typer.Option(help="At most so many images, evenly spread.", min=1)]
ClassNamesOpt = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="For CLIP-like: a text file with the name of class 0, 1, ... in its lines."
    ),
]
TemplateOpt = Annotated[
    list[str] | None,
    typer.Option("--template", help="For CLIP-like models: text with {} where the class name goes. May be repeated."),
]
BatchSizesOpt = Annotated[
    list[int] | None,
    typer.Option("--batch-size", "-b", min=1, help="May be repeated. Default: 1, 8, 32; with a decoder 1, 4."),
]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
DeviceOpt = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")]
DtypeOpt = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def readable_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can act on are one line on stderr and exit code 1, not a traceback; warnings one line too."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        def words(said: object) -> str:
            return in_flags(str(said), flags_of(command))

        try:
            with warnings_in_lines(words):
                command(*args, **kwargs)
        except (TokenPruneError, ImportError, OSError) as error:
            typer.secho(f"error: {words(error)}", fg=typer.colors.RED, err=True)
            raise typer.Exit(1) from error

    return run


def show(as_json: bool, data: Any, text: str) -> None:
    """The result of a command, for a program or for a person."""
    typer.echo(json.dumps(data, indent=2) if as_json else text)


def configs_for(
    model: Any,
    path: str,
    methods: list[str] | None,
    fields: list[str] | None,
    gmacs: list[float] | None,
    prune_configs: list[str] | None,
    text_tokens: int | None = None,
    image_size: tuple[int, int] | None = None,
    none_needed: bool = False,
) -> dict[str, PruneConfig]:
    """The configs that the options name, by a label for tables. With none named: what ``prune(model)`` takes.

    Every config is combined with every MACs budget.

    Args:
        none_needed: with none named and none that the checkpoint carries, there is none.

    Raises:
        ConfigError: options that do not fit.
    """
    from ..cost import config_for_macs
    from ..engine import default_config
    from ..sharing.pretrained import choose_config

    if fields and not methods:
        raise ConfigError(f"--set {fields[0]} has no effect without --method")
    try:
        chosen = {name: PruneConfig.for_method(name, **parse_fields(fields or [])) for name in methods or []}
    except ConfigError as error:
        if not fields or len(methods or []) < 2:
            raise
        raise ConfigError(f"{error}; --set is for every --method, a file for --prune-config has its own") from error
    for source in prune_configs or []:
        config, file = as_config(source), Path(source)
        short = file.parent.name if file.name == CONFIG_NAME else file.stem if file.is_file() else file.name
        chosen[source if "@" in source or not short or short in chosen else short] = config
    if not chosen:
        own = choose_config(path, None, getattr(model.config, "prune_config", None), {})
        if own is None and not none_needed:
            own = default_config(model)
            typer.secho(f"note: no --method; this is what prune(model) takes: {own}", fg=typer.colors.YELLOW, err=True)
        chosen = {} if own is None else {own.method: own}
    if not gmacs:
        return chosen
    if recovered := [name for name, config in chosen.items() if config.recovery]:
        raise ConfigError(
            f"--gmacs would make another config of {recovered[0]!r}, whose recovered values were trained for it: leave "
            "--gmacs out, or recover the other one"
        )
    prompt: dict[str, Any] = {"text_tokens": text_tokens, "image_size": image_size}
    return {
        f"{name}@{budget:g}": config_for_macs(model, config, budget * 1e9, **prompt)
        for budget in gmacs
        for name, config in chosen.items()
    }


def size_for(text: str | None) -> tuple[int, int] | None:
    """(height, width) that ``--image-size`` names.

    Raises:
        ConfigError: it is not two numbers.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"--image-size {text}: expected HEIGHTxWIDTH in pixels, such as 480x640")
    return int(match[1]), int(match[2])


def parse_fields(items: list[str]) -> dict[str, Any]:
    """``field=value`` strings; a value that is not JSON is a string, but not Python's None, True and False."""
    of_python = {"None": "null", "True": "true", "False": "false"}
    fields: dict[str, Any] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {item!r}: expected field=value")
        if name in fields:
            raise ConfigError(f"--set {name} is given twice; keep one")
        if value in of_python:
            raise ConfigError(f"--set {item}: values are JSON, {of_python[value]}")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def device_for(name: str) -> torch.device:
    """The device that ``--device`` names, which this machine has.

    Raises:
        ConfigError: there is no such device, or PyTorch cannot use it here; the message lists those it can.
    """
    import torch

    reason = "no such device"
    try:
        device = torch.device(name)
        reason = ""
        torch.zeros(1, device=device).item()  # a name may be right and the device, its driver or its build missing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        others = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())] if accelerator else []
        here = ", ".join(["cpu", *others])
        raise ConfigError(f"--device {name}: {reason or first_line(error)}; here there is {here}") from error
    return device


def dtype_for(name: str) -> torch.dtype:
    """The floating-point type that ``--dtype`` names.

    Raises:
        ConfigError: it is none of the three that models run in.
    """
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ConfigError(f"--dtype {name}: expected float32, bfloat16 or float16")
    return dtypes[name]


def load_dense(path: str, device: str | torch.device, dtype: torch.dtype | None = None) -> Any:
    """The stock model, whatever config the checkpoint carries; ``dtype`` None: the checkpoint's."""
    from ..sharing.pretrained import class_of

    return load_weights(class_of(read_config(path)), path).to(device, dtype)


def random_model(path: str) -> Any:
    """The model with random weights, from its config alone."""
    from ..sharing.pretrained import class_of

    config = read_config(path)
    return class_of(config)._from_config(config)


def empty_model(path: str) -> Any:
    """The model without memory for its weights: enough to know sizes."""
    import torch

    with torch.device("meta"):
        return random_model(path)


def new_folder(out: Path) -> Path:
    """A folder that nothing would be overwritten in."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; choose another one")
    return out


def check_vision(path: str, command: str) -> None:
    """Raise TokenPruneError for a vision-language model, which ``command`` is not about."""
    if kind_of(empty_model(path)) != "vision":
        raise TokenPruneError(
            f"{path!r} is a vision-language model, and {command} measures image classification; `eval` measures "
            "answers to questions, `info` tells what pruning saves, `bench` how fast it gets"
        )


def check_effect(is_decoder: bool, options: dict[str, Any]) -> None:
    """Raise ConfigError for options that do nothing for this kind of model."""
    for option, value in options.items():
        if value is not None:
            kind = "a vision-language model" if is_decoder else "a model that answers no questions"
            raise ConfigError(f"{option} has no effect on {kind}; leave it out")


def kind_of(model: Any) -> str:
    """What the model is to a method: a "vision" encoder or a "decoder"."""
    from ..engine import find_adapter

    return str(find_adapter(model).shape(model).kind)


def save_processor(path: str, model: Any, out: Path) -> None:
    """Copy what prepares the inputs of a checkpoint: the image processor, of a vision-language model the tokenizer too.

    One that is not there, or that something is missing for, is said on stderr: a model can be used without.
    """
    from transformers import AutoProcessor

    from ..evaluation import load_processor

    load = load_processor if kind_of(model) == "vision" else AutoProcessor.from_pretrained
    try:
        load(path).save_pretrained(out)
    except (ImportError, OSError, ValueError) as error:
        typer.secho(f"note: no processor was copied to {out}: {error}", fg=typer.colors.YELLOW, err=True)
