"""Pictures: the patches that stay, and curves of comparisons."""

from .kept import draw_kept, kept_sheet, to_image, visualize

__all__ = ["draw_kept", "kept_sheet", "to_image", "visualize"]
