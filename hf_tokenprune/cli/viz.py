"""``hf-tokenprune viz``: what methods leave of an image, and what the model then says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .options import (
    ClassNamesOpt,
    ConfigOpt,
    DeviceOpt,
    DtypeOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    NewTokensOpt,
    PromptOpt,
    SetOpt,
    TemplateOpt,
    check_effect,
    configs_for,
    device_for,
    dtype_for,
    empty_model,
    kind_of,
    load_dense,
    readable_errors,
    show,
)
from .output import writable_folder

SUFFIXES = (".png", ".jpg", ".svg", ".pdf", ".html")
SHOWN = ("tokens", "importance", "chart")


@readable_errors
def viz(
    model: ModelArg,
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="File of one image.")],
    out: Annotated[Path, typer.Option(help=f"Picture to write: {', '.join(SUFFIXES[:-1])}; or a page: .html.")],
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    question: Annotated[str | None, typer.Option(help="Vision-language models: what to ask about the image.")] = None,
    prompt: PromptOpt = None,
    new_tokens: NewTokensOpt = None,
    class_names: ClassNamesOpt = None,
    template: TemplateOpt = None,
    expected: Annotated[
        str | None, typer.Option(help="The right class or answer. Default: what the dense model says.")
    ] = None,
    columns: Annotated[
        int, typer.Option(min=1, help="Layers to show, evenly spread; 1: methods beside each other.")
    ] = 5,
    shown: Annotated[
        str, typer.Option("--show", help="tokens, importance (a heat map) or chart (tokens a layer).")
    ] = "tokens",
    html: Annotated[bool, typer.Option("--html", help="Also one HTML file with a slider, beside the picture.")] = False,
    device: DeviceOpt = "cpu",
    dtype: DtypeOpt = "float32",
    as_json: JsonOpt = False,
) -> None:
    """Draw which tokens of an image stay, merge or leave, layer by layer, and whether the model still says the same.

    Several methods come below each other; with --columns 1 beside each other.
    """
    from ..evaluation import load_images
    from ..evaluation.run import processor_of, read_class_names
    from ..pictures import sheet, token_chart, trace, write_page
    from ..pictures.sheets import summary
    from ..pictures.tracing import NEW_TOKENS

    placement = (device_for(device), dtype_for(dtype))
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: expected a name that ends in {', '.join(SUFFIXES)}")
    if shown not in SHOWN:
        raise ConfigError(f"--show {shown}: expected one of {', '.join(SHOWN)}")
    decoder = kind_of(empty_model(model)) != "vision"
    of_questions = {"--question": question, "--prompt": prompt, "--new-tokens": new_tokens}
    of_names = {"--class-names": class_names, "--template": template}
    check_effect(decoder, of_names if decoder else of_questions)
    if template and class_names is None:
        raise ConfigError("--template has no effect without --class-names; give both, or none")
    if decoder and question is None:
        raise ConfigError(
            f"{model!r} is a vision-language model, which has to be asked something: give --question TEXT"
        )
    writable_folder(out.parent)
    sample = load_images([{"image": image}], label_column=None)[0]
    loaded = load_dense(model, *placement).eval()
    processor = processor_of(model, loaded)
    names = None if class_names is None else read_class_names(class_names)
    texts: dict[str, Any] = {"templates": template} if template else {}
    found = trace(
        loaded, sample["image"], configs_for(loaded, model, method, set_, gmacs, prune_config), processor,
        question=question, prompt=prompt, class_names=names, expected=expected, max_new_tokens=new_tokens or NEW_TOKENS,
        **texts,
    )  # fmt: skip
    if hasattr(loaded, "get_text_features") and names is None:
        note = "note: nothing is said of the image: give --class-names FILE, with what it may show, one a line"
        typer.secho(note, fg=typer.colors.YELLOW, err=True)
    files = [out]
    if out.suffix != ".html":
        what: Any = shown  # checked above
        figure = token_chart(found) if what == "chart" else sheet(found, columns, what)
        figure.savefig(out)
        files += [out.with_suffix(".html")] if html else []
    if files[-1].suffix == ".html":
        write_page(found, files[-1])
    data: dict[str, Any] = {"files": [str(file) for file in files], "runs": found.to_dict()["runs"]}
    show(as_json, data, "\n".join([summary(found), *map(str, files)]))
