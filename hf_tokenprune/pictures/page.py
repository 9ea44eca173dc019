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
from .tokens import AVERAGED, LEFT, draw_tokens
from .tracing import Step, Trace, TracedRun

TEMPLATE = Path(__file__).with_name("page.html")
WIDTH = 336  # pixels of a picture
TOWER, NOTHING = "tower block", "as it came"


def write_page(trace: Trace, path: str | PathLike[str]) -> None:
    """Write a page with a slider through the blocks, which moves the pictures of all runs."""
    places = _places(trace)
    data = {
        "title": trace.model,
        "asked": asked(trace),
        "left": AVERAGED if any(step.averages for run in trace.runs for step in run.steps) else LEFT,
        "places": [NOTHING, *(f"behind {'' if place[-1].isdigit() else 'the '}{place}" for place in places[1:])],
        "runs": [_run(trace, run, places) for run in trace.runs],
    }
    text = json.dumps(data).replace("<", "\\u003c")  # nothing in it ends the script
    write_text(Path(path), TEMPLATE.read_text(encoding="utf-8").replace("DATA", text, 1))


def _places(trace: Trace) -> list[str]:
    """Where the slider can stop: everything in front of the first block, then each block."""
    names = {step.name for run in trace.runs for step in run.steps}
    noun = "block" if trace.question is None else "layer"
    tower = [f"{TOWER} {i}" for i in range(len(trace.runs[0].tower_tokens))]
    front = [name for name in ("vision tower", "entrance") if name in names]
    return [NOTHING, *tower, *front, *(f"{noun} {i}" for i in range(len(trace.runs[0].tokens)))]


def _run(trace: Trace, run: TracedRun, places: list[str]) -> dict[str, Any]:
    text, colour = verdict(trace, run)
    whole = Step(NOTHING, trace.grids, torch.arange(trace.num_tokens))
    steps = {step.name: step for step in (whole, *run.steps)}
    order, at = list(steps), list[int]()
    for place, before in zip(places, ["", *places], strict=False):
        back = before.startswith(TOWER) and not place.startswith(TOWER)  # all tokens are there again
        at.append(order.index(place) if place in steps else 0 if back or not at else at[-1])
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
            for step in steps.values()
        ],
        "at": at,
    }


def _data_uri(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
