"""Pictures of what pruning does: to the tokens of an image, to its cost, and to what the model says.

``trace`` runs a model and draws nothing; the others draw what it returns. ``draw_tokens`` and
``draw_importance`` make Pillow images, ``sheet``, ``token_chart`` and ``curves`` matplotlib figures.
"""

from .batches import visualize
from .page import write_page
from .pixels import to_image
from .reports import curves
from .sheets import sheet, token_chart
from .tokens import draw_importance, draw_tokens
from .tracing import ImageGrid, Step, Trace, TracedRun, trace

__all__ = [
    "ImageGrid",
    "Step",
    "Trace",
    "TracedRun",
    "curves",
    "draw_importance",
    "draw_tokens",
    "sheet",
    "to_image",
    "token_chart",
    "trace",
    "visualize",
    "write_page",
]
