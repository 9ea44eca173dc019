"""Panels with captions: an image as it came, and what is left of it, by layer or by method; and tokens per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

from PIL import Image

from .style import CHANGED, COLOURS, QUIET, SAME, new_figure
from .tokens import AVERAGED, KEPT, LEFT, MERGED, PAPER, STRIPE, draw_importance, draw_tokens, kinds_in
from .tracing import Step, Trace, TracedRun

PANEL = 2.4
"""Width of a panel in inches."""
PIXELS = 448
"""Width of what is drawn for one."""
LINE = 0.19
"""Height of a line of text in inches."""
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
    across = max(len(panels) for _, panels in rows)
    tall = max(panel.picture.height / panel.picture.width for _, panels in rows for panel in panels)
    lines = max(panel.caption.count("\n") + bool(panel.title) for _, panels in rows for panel in panels) + 2
    lines += max(header.count("\n") + bool(header) for (header, _), _ in rows)
    figure = new_figure(across * PANEL, len(rows) * (PANEL * tall + lines * LINE) + 2 * LINE)
    grid = figure.subplots(len(rows), across, squeeze=False)
    for axes, ((header, colour), panels) in zip(grid, rows, strict=True):
        room = "\n" * (header.count("\n") + bool(header)) + ("" if panels[0].title else " ")
        for each in axes:
            each.set_axis_off()
        for each, panel in zip(axes, panels, strict=False):
            each.set_axis_on()
            each.imshow(panel.picture)
            each.set(xticks=[], yticks=[])
            each.set_xlabel(panel.caption, color=panel.colour, parse_math=False)
            each.set_title(room + panel.title, weight="bold", parse_math=False)
            for side in each.spines.values():
                side.set(color=panel.colour, linewidth=1)
        # As wide as the row, which the layout must not know: it would widen the first panel.
        above = (0, 6 + 16 * bool(panels[0].title))
        style = {"color": colour, "size": "large", "parse_math": False, "in_layout": False}
        axes[0].annotate(header, (0, 1), above, "axes fraction", "offset points", **style)
    handles = _legend(traces, columns, what)
    figure.legend(handles=handles, loc="outside lower center", ncols=max(3, across + 1), frameon=False)
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
            axes.step(range(len(counts)), counts, where="mid", label=_called(run, trace), **style)
        axes.set(xlabel=name, ylabel="tokens that enter", ylim=(0, None))
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
        left = trace.num_tokens if not run.steps else run.steps[-1].num_kept
        parts = (f"{left} of {trace.num_tokens} tokens", work(trace, run), verdict(trace, run)[0], kl_of(run))
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
    return Panel(picture, _lines(caption), title, colour)


def _lines(parts: Sequence[str]) -> str:
    return "\n".join(filter(None, parts))


def asked(trace: Trace) -> str:
    """The question, and what is known to be right."""
    question = "" if trace.question is None else f'"{shorten(trace.question, 3 * LONGEST, placeholder=" ...")}"'
    return "   ".join(filter(None, (question, trace.expected and f"expected: {trace.expected}")))


def _beside(trace: Trace, what: What) -> tuple[tuple[str, str], list[Panel]]:
    """The runs of a trace in one row."""
    dense, *runs = trace.runs
    text, colour = verdict(trace, dense)
    panels = [_input(trace, (f"{trace.num_tokens} tokens, {work(trace, dense)}", text), "dense", colour)]
    for run in runs:
        text, colour = verdict(trace, run)
        picture = _picture(run.steps[-1], what) if run.steps else panels[0].picture
        left = run.steps[-1].num_kept if run.steps else trace.num_tokens
        caption = _lines((f"{left} tokens, {work(trace, run)}", text, kl_of(run)))
        panels.append(Panel(picture, caption, run.name, colour))
    return (asked(trace), QUIET), panels


def _below(trace: Trace, columns: int, what: What) -> list[tuple[tuple[str, str], list[Panel]]]:
    """A row for each run of a trace."""
    dense, rows = trace.runs[0], []
    said, _ = verdict(trace, dense)
    for run in trace.runs[1:]:
        text, colour = verdict(trace, run)
        header = _lines((asked(trace), "   ".join(filter(None, (run.name, work(trace, run), text, kl_of(run))))))
        first = _input(
            trace, (f"input: {trace.num_tokens} tokens", f"dense: {said}" if said else "", work(trace, dense))
        )
        steps = [
            Panel(_picture(step, what), f"{step.name}: {step.num_kept} of {len(step.owner)}")
            for step in spread(run, columns)
        ]
        rows.append(
            ((header, colour), [first, *(steps or [Panel(first.picture, "no token leaves\nbefore the last block")])])
        )
    return rows


def _legend(traces: Sequence[Trace], columns: int, what: What) -> list[Any]:
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    gone = {"facecolor": [c / 255 for c in PAPER], "edgecolor": [c / 255 for c in STRIPE], "hatch": "////"}
    looks: dict[str, dict[str, Any]] = {
        KEPT: {"facecolor": "none", "edgecolor": "grey"},
        MERGED: {"facecolor": "#9b7653", "edgecolor": "black"},
        LEFT: gone,
        AVERAGED: gone,
        LEAST: {"facecolor": colormaps["inferno"](0.05)},
        MOST: {"facecolor": colormaps["inferno"](0.95)},
    }
    there: set[str] = set()
    for step in (step for trace in traces for run in trace.runs for step in spread(run, columns)):
        if what == "importance" and step.importance is not None:
            there |= {LEAST, MOST, *([LEFT] if bool(step.importance.isnan().any()) else [])}
        else:
            there |= set(kinds_in(step))
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
