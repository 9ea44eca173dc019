"""Qwen3-VL: features of its tower's earlier blocks are added to image tokens behind the first decoder layers."""

from typing import Any

from torch import nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from ...registry import register_adapter
from ._grids import GridAdapter
from ._layer import PrunedDecoderLayer
from ._side_inputs import SideInputs


class PrunedQwen3VLTextDecoderLayer(PrunedDecoderLayer, Qwen3VLTextDecoderLayer, text="qwen3_vl_text"):
    pass


class DeepstackAdapter(GridAdapter):
    """Qwen3-VL, dense or with experts."""

    def connectors(self, inner: Any) -> list[nn.Module]:
        return [*super().connectors(inner), *self.tower(inner).deepstack_merger_list]

    def take_side_inputs(self, inner: Any, call: dict[str, Any]) -> SideInputs | None:
        places, features = call.pop("visual_pos_masks", None), call.pop("deepstack_visual_embeds", None)
        return SideInputs.at(places, dict(enumerate(features))) if features else None


@register_adapter("qwen3_vl")
class Qwen3VLAdapter(DeepstackAdapter):
    pass
