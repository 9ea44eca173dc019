"""``hf-tokenprune info``: tokens and MACs, dense and pruned."""

from __future__ import annotations

from functools import partial

from .options import (
    ConfigOpt,
    ImageSizeOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    NewTokensOpt,
    SetOpt,
    TextTokensOpt,
    configs_for,
    empty_model,
    readable_errors,
    show,
    size_for,
)


@readable_errors
def info(
    model: ModelArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    text_tokens: TextTokensOpt = None,
    new_tokens: NewTokensOpt = None,
    image_size: ImageSizeOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Tokens and MACs of every block, dense and pruned; of a vision-language model prefill, decode and cache.

    The weights are not loaded.
    """
    from ..cost import cost

    shell = empty_model(model)
    size = size_for(image_size)
    variants = configs_for(shell, model, method, set_, gmacs, prune_config, text_tokens, size)
    count = partial(cost, shell, image_size=size, text_tokens=text_tokens, new_tokens=new_tokens)
    reports = {name: count(config=config) for name, config in variants.items()}
    data = {name: {"config": variants[name].to_dict(), **report.to_dict()} for name, report in reports.items()}
    show(as_json, data, "\n\n".join(f"{name}\n{report.summary()}" for name, report in reports.items()))
