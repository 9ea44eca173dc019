"""What methods lose over what they save, drawn from the reports that commands write as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import DataError
from .style import COLOURS, MARKERS, new_figure

Report = Mapping[str, Any]
LOWEST = 1e-6  # of a KL on a logarithmic axis
AXES = {"gmacs": "GMACs an image", "milliseconds": "ms an image, measured"}


@dataclass(frozen=True)
class Point:
    """One run; None: a report does not say it.

    Attributes:
        run: its name; the part in front of "@" is the method.
        gmacs, milliseconds: of an image; of a question, whose prefill it is.
        kl: KL(dense || this) in nats.
        difference: of the accuracy to the dense one, in percentage points, and the ends of its interval.
        agreement: with the dense model, a fraction.
    """

    run: str
    gmacs: float | None = None
    milliseconds: float | None = None
    kl: float | None = None
    difference: tuple[float, float, float] | None = None
    agreement: float | None = None

    @property
    def method(self) -> str:
        """Points of one are a line."""
        return self.run.partition("@")[0]


def curves(*reports: Report | str | PathLike[str]) -> Any:
    """A matplotlib figure: KL, and accuracy or agreement, over MACs and over measured time, a line a method.

    A run whose time could not be told from noise stands over its MACs only; what no report says has no panel.

    Args:
        reports: what ``eval --json``, ``compare --json`` and ``bench --json`` print and ``search`` writes as
            ``search.json``: paths, or what was read from them. Runs that are called alike are one: ``bench`` adds the
            time to those of ``eval``.

    Raises:
        DataError: it is none of these, or there is no run besides the dense one.
        ImportError: matplotlib is not installed.
    """
    points = read_points(reports)
    dense, runs = points.pop("dense", Point("dense")), list(points.values())
    if not runs:
        raise DataError("there is no pruned run in these reports; give -m METHOD to the command that makes them")
    labelled = any(point.difference for point in runs)
    axes = {field: label for field, label in AXES.items() if any(getattr(point, field) for point in runs)}
    if not axes:
        raise DataError("these reports say neither MACs nor times of a pruned run")
    figure = new_figure(6 * len(axes), 9)
    panels = figure.subplots(2, len(axes), sharex="col", sharey="row", squeeze=False)
    for column, (field, label) in enumerate(axes.items()):
        kl_panel, panel = panels[:, column]
        for i, method in enumerate(dict.fromkeys(point.method for point in runs)):
            style = {"color": COLOURS[i % 10], "marker": MARKERS[i % 10], "label": method, "alpha": 0.85}
            own = sorted(
                (getattr(point, field), point) for point in runs if point.method == method and getattr(point, field)
            )
            _line(kl_panel, [(x, max(point.kl, LOWEST)) for x, point in own if point.kl is not None], style)
            if labelled:
                found = [(x, *point.difference) for x, point in own if point.difference]
                bars = [[max(y - low, 0) for _, y, low, _ in found], [max(high - y, 0) for _, y, _, high in found]]
                panel.errorbar(*_columns(found, 2), yerr=bars, capsize=2, elinewidth=0.6, **style)
            else:
                _line(panel, [(x, 100 * point.agreement) for x, point in own if point.agreement is not None], style)
        for each in (kl_panel, panel):
            if (x := getattr(dense, field)) is not None:
                each.axvline(x, color="grey", linestyle="--", linewidth=1)
            each.grid(alpha=0.3)
        panel.set_xlabel(f"{label} (dashed: dense)")
    panels[0, 0].set_yscale("log")
    panels[0, 0].yaxis.set_major_formatter("{x:g}")
    low, high = panels[0, 0].get_ylim()
    named = "25" if high > 10 * low else "23456789"
    panels[0, 0].yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in named else "")
    panels[0, 0].set_ylabel("KL(dense || pruned), nats")
    panels[1, 0].set_ylabel("accuracy against dense, points" if labelled else "agreement with dense, %")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def read_points(reports: Sequence[Report | str | PathLike[str]]) -> dict[str, Point]:
    """The runs of all reports by name.

    Raises:
        DataError: a report of another kind.
    """
    found: dict[str, Point] = {}
    for each in reports:
        report = json.loads(Path(each).read_text(encoding="utf-8")) if isinstance(each, (str, PathLike)) else each
        if not isinstance(report, Mapping):
            raise DataError(
                f"a report of type {type(report).__name__}: expected a path or a dict; several as curves(a, b)"
            )
        for point in _points(report):
            told = {name: value for name, value in vars(point).items() if value is not None}
            found[point.run] = replace(found.get(point.run, Point(point.run)), **told)
    return found


def _points(report: Report) -> list[Point]:
    if "trials" in report:
        return [_of_search(report)]
    rows = report.get("rows")
    if rows and "kl_nats" in rows[0]:
        return [_of_compare(row) for row in rows]
    if rows and "kl" in rows[0]:
        return [_of_eval(row) for row in rows]
    if report and all(isinstance(each, Mapping) and {"rows", "macs"} <= each.keys() for each in report.values()):
        return [point for name, each in report.items() for point in _of_bench(name, each)]
    raise DataError(
        f"a report with {', '.join(map(repr, report)) or 'nothing'}: expected what eval, compare or bench print with "
        "--json, or the search.json of a search"
    )


def _of_eval(row: Report) -> Point:
    scores = row.get("overall") or {name.removeprefix("accuracy_"): value for name, value in row.items()}
    rate = row.get("images_per_second") or row.get("questions_per_second")
    difference = None if scores.get("difference") is None else (scores["difference"], *scores["interval"])
    macs = row.get("macs")
    return Point(row["name"], macs and macs / 1e9, rate and 1000 / rate, row["kl"], difference, row.get("agreement"))


def _of_compare(row: Report) -> Point:
    rate, ends = row["images_per_second"], [row[f"top1_difference_{end}"] for end in ("points", "low", "high")]
    low_high = None if None in ends else (ends[0], ends[1], ends[2])
    return Point(row["run"], row["gmacs"], rate and 1000 / rate, row["kl_nats"], low_high, row["agreement"])


def _of_bench(name: str, report: Report) -> list[Point]:
    """Dense and pruned, in the largest batch that was timed."""
    row = report["rows"][-1]
    timing = row.get("prefill", row)
    macs, scale = report["macs"], 1000 / row["batch_size"]
    pruned = None if timing["speedup"] is None else scale * timing["dense_seconds"] / timing["speedup"]
    dense = Point("dense", macs["dense_macs"] / 1e9, scale * timing["dense_seconds"])
    return [dense, Point(name, macs["pruned_macs"] / 1e9, pruned)]


def _of_search(report: Report) -> Point:
    """What a search found, as far as its goal was a KL or agreement; of its inputs, so not beside those of others."""
    asked, goal = report["asked"], report["settings"]["goal"]
    name = f"{report['config']['method']} ({goal} of a search)@{report['budget']:g}"
    cost = {"gmacs": report["cost"] / 1e9}
    if asked["macs"] is None:
        cost = {"milliseconds": 1000 * report["cost"] / (asked["latency_batch_size"] or 1)}
    if goal == "agreement":
        return Point(name, **cost, agreement=1 - report["distortion"])
    return Point(name, **cost, kl=report["distortion"] if goal.endswith("kl") else None)


def _columns(rows: Sequence[Sequence[float]], count: int) -> list[list[float]]:
    return [[row[i] for row in rows] for i in range(count)]


def _line(panel: Any, points: Sequence[tuple[float, float]], style: Mapping[str, Any]) -> None:
    panel.plot(*_columns(points, 2), **style)
