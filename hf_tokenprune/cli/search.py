"""``hf-tokenprune search``: the schedule that changes least."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .data_options import ImageColumnOpt, LabelColumnOpt
from .options import (
    ClassNamesOpt,
    DeviceOpt,
    FreeOpt,
    GMacsOpt,
    GoalOpt,
    JsonOpt,
    LatencyBatchOpt,
    MillisecondsOpt,
    ModelArg,
    PromptOpt,
    QuestionOpt,
    SetOpt,
    SplitOpt,
    StrategyOpt,
    TrialsOpt,
    check_effect,
    device_for,
    empty_model,
    kind_of,
    load_dense,
    parse_fields,
    readable_errors,
    show,
)
from .output import telling_on_interrupt, writable_folder


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
    seed: Annotated[int, typer.Option(min=0, help="Of strategies that draw, and of made images.")] = 0,
    split: SplitOpt = None,
    image_column: ImageColumnOpt = None,
    label_column: LabelColumnOpt = None,
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
    from ..config import PruneConfig
    from ..search.run import search_images

    place = device_for(device)
    decoder = kind_of(empty_model(model)) != "vision"
    no_effect = {"--question": question, "--prompt": prompt, "--new-tokens": new_tokens}
    of_images = {
        "--class-names": class_names, "--synthetic": synthetic or None, "--image-column": image_column,
        "--label-column": label_column,
    }  # fmt: skip
    check_effect(decoder, of_images if decoder else no_effect)
    if (images is None) != synthetic:
        raise ConfigError("give IMAGES to search on, or --synthetic for images made from the model, one of the two")
    given = parse_fields(set_ or [])
    config = PruneConfig.for_method(method, **given)
    budget = {"macs": gmacs and gmacs * 1e9, "seconds": milliseconds and milliseconds / 1000, "speedup": speedup}
    writable_folder(out)
    loaded = load_dense(model, place).eval()
    with telling_on_interrupt(lambda: _left_by(out)):
        report, text = search_images(
            model, loaded, images, config, out, budget, free=free, fixed=given,
            split=split, image_column=image_column, label_column=label_column,
            limit=limit or (64 if synthetic else 300), batch_size=batch_size or (4 if decoder else 50),
            class_names=class_names, questions=question, prompt=prompt, new_tokens=new_tokens, progress=not as_json,
            strategy=strategy, goal=goal, trials=trials, seed=seed, latency_batch_size=latency_batch,
        )  # fmt: skip
    show(as_json, report, text)


def _left_by(out: Path) -> str:
    """What an interrupted search leaves."""
    from ..search.journal import JOURNAL

    if not (out / JOURNAL).exists():
        return "nothing was measured yet"
    return f"what was measured is in {out / JOURNAL}; the same command goes on from there"
