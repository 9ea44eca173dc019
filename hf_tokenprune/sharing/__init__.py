"""How a prune config travels with its checkpoint: loading, saving, and stock loading that knows of it."""

from .auto import disable_auto, enable_auto
from .pretrained import from_pretrained
from .saving import save_pretrained

__all__ = ["disable_auto", "enable_auto", "from_pretrained", "save_pretrained"]
