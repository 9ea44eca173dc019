"""One HTML file that shows a trace layer by layer, with nothing outside it: it can be sent to somebody."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..atomic import write_text
from .sheets import asked, kl_of, verdict, work
from .style import CHANGED, SAME
from .tokens import AVERAGED, KEPT, MERGED, REMOVED, draw_tokens, kinds_in
from .tracing import Step, Trace, TracedRun

TEMPLATE = Path(__file__).with_name("page.html")
WIDTH = 336  # pixels of a picture
LOOKS = {KEPT: "", MERGED: "merged", REMOVED: "removed", AVERAGED: "removed"}
"""Classes in the template, by what a legend calls them."""
TOWER, NOTHING = "tower block", "as it came"


def write_page(trace: Trace, path: str | PathLike[str]) -> None:
    """Write a page with a slider through the blocks, which moves the pictures of all runs."""
    places = places_of(trace)
    kinds = {KEPT}.union(*(kinds_in(step) for run in trace.runs for step in run.steps))
    data = {
        "title": trace.model,
        "asked": asked(trace),
        "legend": [[look, kind] for kind, look in LOOKS.items() if kind in kinds],
        "places": [NOTHING, *(f"behind {'' if place[-1].isdigit() else 'the '}{place}" for place in places[1:])],
        "runs": [_run(trace, run) for run in trace.runs],
    }
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in it ends the script
    write_text(Path(path), TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1))


def places_of(trace: Trace) -> list[str]:
    """Where the slider can stop: everything in front of the first block, then each block."""
    names = {step.name for run in trace.runs for step in run.steps}
    noun = "block" if trace.question is None else "layer"
    tower = [f"{TOWER} {i}" for i in range(len(trace.runs[0].tower_tokens))]
    front = [name for name in ("vision tower", "entrance") if name in names]
    return [NOTHING, *tower, *front, *(f"{noun} {i}" for i in range(len(trace.runs[0].tokens)))]


def steps_at(trace: Trace, run: TracedRun) -> list[Step]:
    """By place, the last pruning point of a run that the tokens have passed there."""
    whole = Step(NOTHING, trace.grids, torch.arange(trace.num_tokens))
    steps, at = {step.name: step for step in run.steps}, list[Step]()
    places = places_of(trace)
    for place, before in zip(places, ["", *places], strict=False):
        back = before.startswith(TOWER) and not place.startswith(TOWER)  # all tokens are there again
        at.append(steps.get(place, whole if back or not at else at[-1]))
    return at


def _run(trace: Trace, run: TracedRun) -> dict[str, Any]:
    text, colour = verdict(trace, run)
    at = steps_at(trace, run)
    steps = list(dict.fromkeys(at))
    return {
        "name": run.name,
        "verdict": {SAME: "same", CHANGED: "changed"}.get(colour, ""),
        "work": work(trace, run),
        "answer": text,
        "kl": kl_of(run),
        "classes": [[name.split(",")[0], f"{share:.1%}"] for name, share in run.classes],
        "config": "" if run.config is None else json.dumps(run.config.to_dict(), indent=2),
        "pictures": [
            {"source": _data_uri(draw_tokens(step, WIDTH)), "kept": step.num_kept, "total": len(step.owner)}
            for step in steps
        ],
        "at": [steps.index(step) for step in at],
    }


def _data_uri(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
