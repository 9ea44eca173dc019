"""``hf-tokenprune eval``: accuracy of the dense and the pruned model."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from .options import (
    ClassNamesOpt,
    ConfigOpt,
    DataArg,
    JsonOpt,
    LimitOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    NewTokensOpt,
    PromptOpt,
    SetOpt,
    SplitOpt,
    TemplateOpt,
    check_effect,
    configs_for,
    empty_model,
    kind_of,
    load_dense,
    readable_errors,
    show,
)


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
    from ..evaluation import load_images, load_questions
    from ..evaluation.optional import require
    from ..evaluation.run import evaluate_model

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
