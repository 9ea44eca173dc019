"""``hf-tokenprune eval``: accuracy of the dense and the pruned model."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from .data_options import EvalDeviceOpt, EvalDtypeOpt, ImageColumnOpt, LabelColumnOpt, NoLabelsOpt, columns, placement
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
    ResizeOpt,
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
from .output import telling_on_interrupt


@readable_errors
def evaluate(
    model: ModelArg,
    data: DataArg,
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    resize: ResizeOpt = None,
    split: SplitOpt = None,
    limit: LimitOpt = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: 32; with a decoder 8.")] = None,
    class_names: ClassNamesOpt = None,
    template: TemplateOpt = None,
    prompt: PromptOpt = None,
    new_tokens: NewTokensOpt = None,
    image_column: ImageColumnOpt = None,
    label_column: LabelColumnOpt = None,
    no_labels: NoLabelsOpt = False,
    device: EvalDeviceOpt = None,
    dtype: EvalDtypeOpt = None,
    markdown: Annotated[bool, typer.Option(help="Print the table as Markdown.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Accuracy of the dense and the pruned model on the same images, with 95 % intervals; zero-shot for CLIP.

    Of a vision-language model: exact match of its answers. Runs on accelerate's device, or --device; on several by
    `accelerate launch --multi_gpu -m hf_tokenprune.cli eval ...`.
    """
    from ..cost import GenerationCostReport, cost
    from ..evaluation import load_images, load_questions
    from ..evaluation.paired import InterruptedEvaluation
    from ..evaluation.run import evaluate_model

    accelerator, of_dtype = placement(device, dtype)
    images = columns(image_column, label_column, no_labels)
    decoder = kind_of(empty_model(model)) != "vision"
    no_effect = {"--prompt": prompt, "--new-tokens": new_tokens}
    of_images = {
        "--class-names": class_names, "--template": template, "--image-column": image_column,
        "--label-column": label_column, "--no-labels": no_labels or None,
    }  # fmt: skip
    check_effect(decoder, of_images if decoder else no_effect)
    load: Any = load_questions if decoder else partial(load_images, **images)
    dataset = load(data, limit=limit, split=split)
    loaded = load_dense(model, "cpu", of_dtype)
    choose = partial(configs_for, loaded, model, method, set_, gmacs, prune_config, none_needed=bool(resize))
    scored = 0
    with telling_on_interrupt(lambda: _left_by(scored, len(dataset))):
        try:
            report, variants, small = evaluate_model(
                model, loaded, dataset, choose, resize=resize or (), class_names=class_names, templates=template,
                prompt=prompt, new_tokens=new_tokens, batch_size=batch_size or (8 if decoder else 32),
                accelerator=accelerator, progress=not as_json,
            )  # fmt: skip
        except InterruptedEvaluation as interrupt:
            report, scored = interrupt.report, interrupt.report.rows[0].n
            if accelerator.is_main_process:
                show(as_json, report.to_dict(), report.to_markdown() if markdown else report.summary())
            raise
    if accelerator.is_main_process:
        configs = {name: config.to_dict() for name, config in variants.items()}
        text = report.to_markdown() if markdown else report.summary()
        macs = cost(loaded)
        # Whatever the sizes of those in the data.
        counted = f"\nGMACs: of {macs.image}" if isinstance(macs, GenerationCostReport) else ""
        data_of, text = {**report.to_dict(), "configs": configs}, text + counted
        for name, processor in small.items():
            usual, kept = processor.mean_tokens()
            data_of.setdefault("image_tokens", {})[name] = {"usual": usual, "kept": kept}
            text += f"\n{name}: {kept:.4g} of {usual:.4g} tokens an image"
        show(as_json, data_of, text)


def _left_by(scored: int, images: int) -> str:
    """What an interrupted evaluation leaves."""
    return f"the table is of the first {scored} of {images} images" if scored else "there is no table yet"
