"""``hf-tokenprune recover``: a pruned model nearer to its dense self, by a little training without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .apply import one_config
from .data_options import EvalDeviceOpt, ImageColumnOpt, placement
from .options import (
    ClassNamesOpt,
    ConfigOpt,
    DataArg,
    JsonOpt,
    LimitOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    PromptOpt,
    QuestionOpt,
    SetOpt,
    SplitOpt,
    TemplateOpt,
    check_effect,
    empty_model,
    kind_of,
    load_dense,
    readable_errors,
    show,
)
from .output import telling_on_interrupt, writable_folder


@readable_errors
def recover(
    model: ModelArg,
    images: DataArg,
    out: Annotated[Path, typer.Option(help="Folder for prune_config.json, recovered.safetensors and recovery.json.")],
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    passes: Annotated[int, typer.Option(min=1, help="Over the images, at most.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="The highest of AdamW.")] = 1e-3,
    batch_size: Annotated[int | None, typer.Option(min=1, help="A step. Default: 32; with a decoder 4.")] = None,
    held_out: Annotated[float, typer.Option(help="Part of the images that decides what is kept.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the images.")] = 0,
    split: SplitOpt = None,
    limit: LimitOpt = None,
    image_column: ImageColumnOpt = None,
    class_names: ClassNamesOpt = None,
    template: TemplateOpt = None,
    question: QuestionOpt = None,
    prompt: PromptOpt = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer, at most. Default: 16.")] = None,
    device: EvalDeviceOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Train norms and biases of a pruned model until it says what it says dense; labels are not needed.

    What is written is a config that any -c takes, with the values beside it. Started again with the same arguments
    after an interruption, it goes on behind the last pass. On several devices by `accelerate launch --multi_gpu -m
    hf_tokenprune.cli recover ...`.
    """
    from ..recovery.run import CHECKPOINT, recover_checkpoint

    accelerator, _ = placement(device, None)
    empty = empty_model(model)
    decoder = kind_of(empty) != "vision"
    of_texts = {"--question": question, "--prompt": prompt, "--new-tokens": new_tokens}
    check_effect(decoder, {"--class-names": class_names, "--template": template} if decoder else of_texts)
    _, config = one_config("recover trains with", empty, model, method, set_, gmacs, prune_config)
    writable_folder(out)

    def left() -> str:
        state = out / CHECKPOINT
        return f"the same command goes on from {state}" if state.exists() else "no pass was finished"

    settings: dict[str, Any] = {} if new_tokens is None else {"new_tokens": new_tokens}
    with telling_on_interrupt(left):
        report = recover_checkpoint(
            model, load_dense(model, "cpu"), images, config, out, split=split, limit=limit,
            image_column=image_column or "image", class_names=lines_of(class_names), templates=template,
            questions=question, passes=passes, learning_rate=learning_rate,
            batch_size=batch_size or (4 if decoder else 32), held_out=held_out, seed=seed, prompt=prompt,
            accelerator=accelerator, progress=not as_json, **settings,
        )  # fmt: skip
    if accelerator.is_main_process:
        show(as_json, {**report.to_dict(), "config": str(out)}, f"{report.summary()}\n{out}")


def lines_of(path: Path | None) -> list[str] | None:
    """The lines of a text file.

    Raises:
        ConfigError: it is not in UTF-8.
    """
    try:
        return None if path is None else path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"--class-names {path}: not a text file in UTF-8 ({error})") from error
