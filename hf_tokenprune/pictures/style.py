"""One look for all figures. Needs matplotlib (``pip install "hf-tokenprune[plot]"``), imported when asked for."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from PIL import Image

from ..evaluation.optional import require

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888", "#9467BD", "#7B4F24")
"""Okabe and Ito's, which readers with colour blindness can tell apart, and two more."""
MARKERS = "os^Dv<>Pxh"
SAME, CHANGED, QUIET = "#00705a", "#b3261e", "#444444"
"""Of what is right, of what is wrong, and of what is neither."""
DPI = 110


def new_figure(width: float, height: float) -> Any:
    """An empty figure of inches, which no window shows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", "plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def as_image(figure: Any) -> Image.Image:
    """A figure as a picture."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
