"""``hf-tokenprune serve``: ``transformers serve`` with a pruned model."""

from __future__ import annotations

import typer

from ..errors import ConfigError, TokenPruneError
from .options import (
    ConfigOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    SetOpt,
    configs_for,
    empty_model,
    readable_errors,
)


@readable_errors
def serve(
    context: typer.Context,
    model: ModelArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
) -> None:
    """Answer chats over HTTP with a pruned vision-language model, by `transformers serve`.

    What follows MODEL and is none of these options goes there: --port 8001 --device cuda --dtype bfloat16 ...
    """
    from ..engine import find_adapter, plan_on
    from ..sharing import enable_auto

    empty = empty_model(model)
    shape = find_adapter(empty).shape(empty)
    if shape.kind != "decoder":
        raise TokenPruneError(f"{model!r} is no vision-language model, and `transformers serve` answers chats")
    variants = configs_for(empty, model, method, set_, gmacs, prune_config)
    if len(variants) != 1:
        raise ConfigError(f"serve takes one config, got {len(variants)} ({', '.join(variants)}); choose one")
    ((_, config),) = variants.items()
    plan_on(empty, config, shape)  # refuses before the weights are read
    if "--compile" in context.args:
        raise ConfigError("--compile makes a static cache; layers of a pruned model hold different numbers of tokens")
    from transformers.cli.transformers import app as transformers  # as `transformers` in a shell

    enable_auto(config)
    typer.secho(f"{model}: pruned by {config}", err=True)
    transformers(["serve", model, *context.args], prog_name="transformers")
