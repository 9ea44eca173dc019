"""Qwen2.5-VL: like Qwen2-VL, with window attention in most blocks of its tower."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.vision_utils import get_vision_window_index

from ...errors import UnsupportedModelError
from ...registry import register_adapter
from ...signals import ModelShape, Stage
from ._grids import GridAdapter
from ._layer import PrunedDecoderLayer
from ._tower import Choice, ChooseMerged


class PrunedQwen25VLDecoderLayer(PrunedDecoderLayer, Qwen2_5_VLDecoderLayer, text="qwen2_5_vl_text"):
    pass


@dataclass(frozen=True)
class FromWindows:
    """Blocks see tokens window by window, the output has them row by row: for each of it, its place in the blocks."""

    spatial_merge_size: int
    window_size: int
    patch_size: int

    def __call__(self, call: dict[str, Any]) -> Tensor:
        sizes = self.spatial_merge_size, self.window_size, self.patch_size
        order, _ = get_vision_window_index(call["grid_thw"], *sizes, kwargs=dict(call))
        return order.argsort()


@register_adapter("qwen2_5_vl")
class Qwen25VLAdapter(GridAdapter):
    def scoring_block(self, model: PreTrainedModel) -> int:
        whole = self.tower(self.inner(model)).config.fullatt_block_indexes
        if not whole:
            raise UnsupportedModelError(
                "the blocks of the vision tower all attend within windows (fullatt_block_indexes is empty), so that "
                "tokens of an image cannot be compared. Use a method that works in the decoder, such as divprune"
            )
        return int(max(whole))

    def choice(self, model: PreTrainedModel, stage: Stage) -> Choice:
        tower = self.tower(self.inner(model))
        windows = FromWindows(tower.spatial_merge_size, tower.window_size, tower.patch_size)
        return ChooseMerged(stage, self.squares(model), windows)

    def tower_shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        config = self.tower(self.inner(model)).config
        token = config.spatial_merge_size
        side = config.window_size // config.patch_size // token * token  # whole tokens
        windows = tuple(0 if block in config.fullatt_block_indexes else side for block in range(config.depth))
        return replace(super().tower_shape(model, image_size), windows=windows)
