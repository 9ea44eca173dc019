"""Pictures of numbers. Needs matplotlib (``pip install "hf-tokenprune[plot]"``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.optional import require

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888", "#9467BD", "#7B4F24")
"""Okabe and Ito's, which readers with colour blindness can tell apart, and two more."""
MARKERS = "os^Dv<>Pxh"
AXES = {"gmacs": "GMACs an image", "images_per_second": "images/s, measured"}


def draw_comparison(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KL and accuracy over work and over measured speed, a line a method, as PNG.

    A run whose speed could not be told from noise (None) stands over its work only; where that is all, it is said.

    Args:
        rows: of ``hf_tokenprune.evaluation.compare.Comparison.rows``, the dense run first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense, *runs = rows
    labelled = dense["top1"] is not None
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for column, (x, label) in enumerate(AXES.items()):
        for i, method in enumerate(dict.fromkeys(row["method"] for row in runs)):
            own = [row for row in runs if row["method"] == method and row[x] is not None]
            points = sorted(own, key=lambda row: float(row[x]))
            style = {"color": COLOURS[i % 10], "marker": MARKERS[i % 10], "label": method, "alpha": 0.85}
            where = [row[x] for row in points]
            panels[0, column].plot(where, [max(row["kl_nats"], 1e-6) for row in points], **style)
            if labelled:
                differences = [row["top1_difference_points"] for row in points]
                ends = [(row["top1_difference_low"], row["top1_difference_high"]) for row in points]
                bars = [
                    [max(d - low, 0) for d, (low, _) in zip(differences, ends, strict=True)],
                    [max(high - d, 0) for d, (_, high) in zip(differences, ends, strict=True)],
                ]
                panels[1, column].errorbar(where, differences, yerr=bars, capsize=2, elinewidth=0.6, **style)
            else:
                panels[1, column].plot(where, [100 * row["agreement"] for row in points], **style)
        for panel in panels[:, column]:
            panel.axvline(dense[x], color="grey", linestyle="--", linewidth=1)
            panel.grid(alpha=0.3)
            if all(row[x] is None for row in runs):
                nothing = "no speed to be told from noise, or too few rounds"
                panel.text(0.5, 0.5, nothing, ha="center", va="center", transform=panel.transAxes)
        panels[1, column].set_xlabel(f"{label} (dashed: dense)")
    panels[0, 0].set_yscale("log")
    panels[0, 0].set_ylabel("KL(dense || pruned), nats")
    panels[1, 0].set_ylabel("top-1 against dense, points" if labelled else "agreement with dense, %")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.suptitle(f"{dense['n']} images, every run on the same ones")
    figure.savefig(path, dpi=110)
