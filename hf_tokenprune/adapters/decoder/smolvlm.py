"""SmolVLM (1 and 2): built like Idefics3."""

from ...registry import register_adapter
from .idefics3 import Idefics3Adapter


@register_adapter("smolvlm")
class SmolVLMAdapter(Idefics3Adapter):
    no_videos = "this family takes frames of a video as images of their own"
