"""Panels with captions: an image as it came, and what is left of it, by layer or by method; and tokens per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill, shorten
from typing import Any, Literal

from PIL import Image

from .style import CHANGED, COLOURS, QUIET, SAME, new_figure
from .tokens import AVERAGED, KEPT, MERGED, PAPER, REMOVED, STRIPE, draw_importance, draw_tokens, kinds_in
from .tracing import Step, Trace, TracedRun

PANEL = 2.4
"""Width of a panel in inches."""
PIXELS = 448
"""Width of what is drawn for one."""
LINE = 0.19
"""Height of a line of text in inches."""
LETTER = 0.09
"""Width of a letter above a row, and of one of the legend with what belongs to it, in inches."""
LONGEST = 30
"""Letters of an answer, under a panel."""
LEAST, MOST = "least important", "most important"
What = Literal["tokens", "importance"]


@dataclass(frozen=True)
class Panel:
    """A picture with a caption, in a colour that says whether what the model says is right."""

    picture: Image.Image
    caption: str
    title: str = ""
    colour: str = QUIET


@dataclass(frozen=True)
class Row:
    """Panels beside each other (None: an empty place), under what was asked and what a run says."""

    panels: Sequence[Panel | None]
    asked: str = ""
    said: str = ""
    colour: str = QUIET

    def above(self, width: int) -> list[tuple[str, str]]:
        """Texts above it with their colours, the lowest first, of lines of at most ``width`` letters."""
        texts = ((self.said, self.colour), (self.asked, QUIET))
        return [(fill(text, width), colour) for text, colour in texts if text]


def sheet(traces: Trace | Sequence[Trace], columns: int = 5, what: What = "tokens") -> Any:
    """A matplotlib figure: a row a run, the image as it came in front, then what is left behind its pruning points.

    Under each panel stand its tokens, above each row the run, its MACs, what it says of the image and whether that is
    right; where nobody knows, whether the dense model says the same.

    Args:
        traces: one, or several with rows of their own.
        columns: panels of pruning points, evenly spread, the last one always. With 1 the runs of a trace stand beside
            each other in one row, each behind its last pruning point, with all of this under it.
        what: "tokens", or their "importance" to the method; at points where it has none the tokens.

    Raises:
        ImportError: matplotlib is not installed.
    """
    traces = [traces] if isinstance(traces, Trace) else list(traces)
    beside = columns == 1
    rows = [row for trace in traces for row in ([_beside(trace, what)] if beside else _below(trace, columns, what))]
    across = max(len(row.panels) for row in rows)
    width = across * PANEL
    headers = [row.above(int(width / LETTER)) for row in rows]
    drawn = [[panel for panel in row.panels if panel is not None] for row in rows]
    tall = max(panel.picture.height / panel.picture.width for panels in drawn for panel in panels)
    lines = sum(_lines_in(text) for header in headers for text, _ in header)
    lines += sum(max(_lines_in(panel.caption) + bool(panel.title) for panel in panels) + 1 for panels in drawn)
    handles = _legend(traces, columns, what)
    ncols = max(1, int(width / (LETTER * (6 + max(len(handle.get_label()) for handle in handles)))))
    lines += 1 + math.ceil(len(handles) / ncols)
    figure = new_figure(width, len(rows) * PANEL * tall + lines * LINE)
    grid = figure.subplots(len(rows), across, squeeze=False)
    for axes, row, header in zip(grid, rows, headers, strict=True):
        room = "\n" * sum(_lines_in(text) for text, _ in header)
        for each in axes:
            each.set_axis_off()
        titled = False
        for each, panel in zip(axes, row.panels, strict=False):
            each.set_title(room or None, parse_math=False)  # which the layout leaves above the row
            if panel is None:
                each.set_box_aspect(tall)
                continue
            each.set_axis_on()
            each.imshow(panel.picture)
            each.set(xticks=[], yticks=[])
            each.set_xlabel(panel.caption, color=panel.colour, parse_math=False)
            each.set_title(room + panel.title, weight="bold", parse_math=False)
            titled = bool(panel.title)
            for side in each.spines.values():
                side.set(color=panel.colour, linewidth=1)
        # As wide as the row, which the layout must not know: it would widen the first panel.
        height = 6 + 16 * titled
        for text, colour in header:
            style = {"color": colour, "size": "large", "parse_math": False, "in_layout": False}
            axes[0].annotate(text, (0, 1), (0, height), "axes fraction", "offset points", **style)
            height += 15 * _lines_in(text)
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
    return figure


def token_chart(trace: Trace) -> Any:
    """A matplotlib figure: tokens that enter each block, of every run; of a vision tower beside those of the decoder.

    Raises:
        ImportError: matplotlib is not installed.
    """
    noun = "block" if trace.question is None else "decoder layer"
    kinds = {"block of the vision tower": "tower_tokens"} if trace.runs[0].tower_tokens else {}
    kinds[noun] = "tokens"
    figure = new_figure(6 * len(kinds), 4)
    for axes, (name, field) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds.items(), strict=True):
        for i, run in enumerate(trace.runs):
            counts = getattr(run, field)
            style: dict[str, Any] = {"color": COLOURS[(i - 1) % 10], "linewidth": 2} if i else DENSE_LINE
            edges = [i - 0.5 for i in range(len(counts) + 1)]
            axes.stairs(counts, edges, baseline=None, label=_called(run, trace), **style)
        others = trace.runs[0].tokens[0] - trace.num_tokens if field == "tokens" else 0
        entering = f"tokens that enter (image + {others})" if others > 0 else "tokens that enter"
        axes.set(xlabel=name, ylabel=entering, ylim=(0, None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


DENSE_LINE = {"color": "grey", "linestyle": "--", "linewidth": 1.5}


def spread(run: TracedRun, count: int) -> list[Step]:
    """At most ``count`` pruning points of a run, evenly spread, the last one always."""
    if len(run.steps) <= count:
        return list(run.steps)
    return [run.steps[(i + 1) * len(run.steps) // count - 1] for i in range(count)]


def verdict(trace: Trace, run: TracedRun) -> tuple[str, str]:
    """What a run says of the image and whether that is right, in words; and the colour of these."""
    right = trace.is_right(run)
    if right is None or run.answer is None:
        return "", QUIET
    said = shorten(run.answer.split(",")[0] if run.classes else run.answer, LONGEST, placeholder=" ...") or '""'
    if run.classes:
        said += f" {run.classes[0][1]:.0%}"
    judged = trace.expected is not None or run.config is not None
    return f"{'✓' if right else '✗'} {said}" if judged else said, (SAME if right else CHANGED) if judged else QUIET


def work(trace: Trace, run: TracedRun) -> str:
    """MACs of a run, and what part they are of the dense ones."""
    whole = trace.runs[0].macs
    if run.macs is None or whole is None:
        return ""
    part = "" if run.config is None else f" ({run.macs / whole:.0%})"
    billions = run.macs / 1e9
    return f"{billions:.0f} GMACs{part}" if billions >= 100 else f"{billions:#.3g} GMACs{part}"


def kl_of(run: TracedRun) -> str:
    """KL to the dense model."""
    return "" if run.kl is None or run.config is None else f"KL {run.kl:.2g} nats"


def summary(trace: Trace) -> str:
    """A line a run."""
    lines = []
    for run in trace.runs:
        kept = trace.num_tokens if not run.steps else run.steps[-1].num_kept
        parts = (f"{kept} of {trace.num_tokens} tokens", work(trace, run), verdict(trace, run)[0], kl_of(run))
        lines.append(f"{run.name}: {', '.join(filter(None, parts))}")
    return "\n".join(lines)


def _called(run: TracedRun, trace: Trace) -> str:
    return ": ".join(filter(None, (run.name, work(trace, run))))


def _picture(step: Step, what: What) -> Image.Image:
    return (
        draw_importance(step, PIXELS)
        if what == "importance" and step.importance is not None
        else draw_tokens(step, PIXELS)
    )


def _input(trace: Trace, caption: Sequence[str], title: str = "", colour: str = QUIET) -> Panel:
    """The image as the model sees it, with every token."""
    picture = trace.grids[0].picture
    picture = picture.resize((PIXELS, PIXELS * picture.height // picture.width))
    return Panel(picture, _lines((*caption, "cropped by the processor" if trace.is_cropped else "")), title, colour)


def _unranked(step: Step, what: What) -> str:
    return "(not ranked: its tokens)" if what == "importance" and step.importance is None else ""


def _lines(parts: Sequence[str]) -> str:
    return "\n".join(filter(None, parts))


def _lines_in(text: str) -> int:
    return text.count("\n") + 1


def asked(trace: Trace) -> str:
    """The question, and what is known to be right."""
    question = "" if trace.question is None else f'"{shorten(trace.question, 3 * LONGEST, placeholder=" ...")}"'
    return "   ".join(filter(None, (question, trace.expected and f"expected: {trace.expected}")))


def _beside(trace: Trace, what: What) -> Row:
    """The runs of a trace in one row."""
    dense, *runs = trace.runs
    text, colour = verdict(trace, dense)
    first = _input(trace, (f"{trace.num_tokens} tokens, {work(trace, dense)}", text), "dense", colour)
    panels = [first]
    for run in runs:
        text, colour = verdict(trace, run)
        picture, kept, note = first.picture, trace.num_tokens, ""
        if run.steps:
            picture, kept, note = _picture(run.steps[-1], what), run.steps[-1].num_kept, _unranked(run.steps[-1], what)
        caption = _lines((f"{kept} tokens, {work(trace, run)}", text, kl_of(run), note))
        panels.append(Panel(picture, caption, run.name, colour))
    return Row(panels, asked(trace))


def _below(trace: Trace, columns: int, what: What) -> list[Row]:
    """A row for each run of a trace; the first one has what is the same for all: the question and the image."""
    dense, rows = trace.runs[0], list[Row]()
    said, _ = verdict(trace, dense)
    first = _input(trace, (f"input: {trace.num_tokens} tokens", f"dense: {said}" if said else "", work(trace, dense)))
    for run in trace.runs[1:]:
        text, colour = verdict(trace, run)
        steps = []
        for step in spread(run, columns):
            caption = (f"{step.name}: {step.num_kept} of {len(step.owner)}", _unranked(step, what))
            steps.append(Panel(_picture(step, what), _lines(caption)))
        panels = [None if rows else first, *(steps or [Panel(first.picture, "no token leaves\nbefore the last block")])]
        header = "   ".join(filter(None, (run.name, work(trace, run), text, kl_of(run))))
        rows.append(Row(panels, "" if rows else asked(trace), header, colour))
    return rows


def _legend(traces: Sequence[Trace], columns: int, what: What) -> list[Any]:
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    gone = {"facecolor": [c / 255 for c in PAPER], "edgecolor": [c / 255 for c in STRIPE], "hatch": "////"}
    looks: dict[str, dict[str, Any]] = {
        KEPT: {"facecolor": "none", "edgecolor": "grey"},
        MERGED: {"facecolor": "#9b7653", "edgecolor": "black"},
        REMOVED: gone,
        AVERAGED: gone,
        LEAST: {"facecolor": colormaps["inferno"](0.05)},
        MOST: {"facecolor": colormaps["inferno"](0.95)},
    }
    there: set[str] = set()
    for step in (step for trace in traces for run in trace.runs for step in spread(run, columns)):
        if what == "importance" and step.importance is not None:
            there |= {LEAST, MOST, *([REMOVED] if bool(step.importance.isnan().any()) else [])}
        else:
            there |= set(kinds_in(step))
    there -= {REMOVED} if AVERAGED in there else set()  # they look the same
    marks = {verdict(trace, run): trace.expected is not None for trace in traces for run in trace.runs[1:]}
    judged = {(text[:1], colour, known) for (text, colour), known in marks.items() if text}
    words = {
        ("✓", True): "right",
        ("✗", True): "wrong",
        ("✓", False): "as the dense model",
        ("✗", False): "another answer",
    }
    return [
        *(Patch(label=kind, **look) for kind, look in looks.items() if kind in there),
        *(
            Line2D([], [], marker=f"${mark}$", markersize=8, linestyle="", color=colour, label=words[mark, known])
            for mark, colour, known in sorted(judged)
        ),
    ]
