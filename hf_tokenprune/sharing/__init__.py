"""How a prune config travels with its checkpoint: loading, saving, and stock loading that knows of it."""

from .auto import disable_auto, enable_auto
from .pretrained import from_pretrained
from .saving import save_pretrained
from .upload import push_config

__all__ = ["disable_auto", "enable_auto", "from_pretrained", "push_config", "save_pretrained"]
