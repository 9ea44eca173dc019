"""For engines that serve models: prompts as long as what stays of their images."""

from .short_prompts import short_prompts

__all__ = ["short_prompts"]
