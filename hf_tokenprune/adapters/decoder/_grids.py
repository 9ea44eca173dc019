"""Families that take images of any size and place every token in time, rows and columns: Qwen-VL and its kind.

Their towers merge squares of patches into one token; the processor tells the grid (frames, rows, columns) of patches
of each image or video, and which tokens are of which kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...signals import ModelShape, Stage
from .._sizes import as_pair, mlp_matrices
from .._views import ImageView, raster
from ._adapter import DecoderAdapter
from ._frames import by_positions
from ._images import GivenImages, ImageTokens, given_kinds, is_token, without_pixels
from ._tower import Choice, ChooseMerged, Squares, tower_blocks

USUAL_SIDE = 32
"""Rows and columns of tokens of an image whose size nobody tells: 1024 tokens, in the middle of what papers report."""


class GridAdapter(DecoderAdapter):
    """Base of these families' adapters."""

    tower_name = "visual"
    connector_name = "visual.merger"
    position_axes = 3
    placeholders: ClassVar = {"image": "image_token_id", "video": "video_token_id"}
    no_videos = ""

    def images(self, inner: Any, given: GivenImages) -> list[ImageTokens]:
        if given.call.get("mm_token_type_ids") is None:
            raise UnsupportedModelError(
                f"{given.kind}s without mm_token_type_ids, from which positions in time, rows and columns follow: pass "
                f"all that the processor returns, AutoProcessor.from_pretrained(...)(text=..., {given.kind}s=...)"
            )
        if given.kind not in given_kinds(given.call):
            raise UnsupportedModelError(without_pixels(given.kind))
        grids, of_frames = given.call.get(f"{given.kind}_grid_thw"), given.kind == "video" and given.with_frames
        if grids is None:
            images = given.as_encoded()
            if of_frames:
                return self.in_frames(inner, given, images)
            # Nothing tells the frames of a video: parts of one token, of which none need have left in the tower.
            return [replace(image, parts=image.length) for image in images] if given.kind == "video" else images
        merged = self.tower(inner).spatial_merge_size ** 2
        return [
            ImageTokens(frames * rows * columns // merged, parts=frames, frames=frames if of_frames else 0)
            for frames, rows, columns in grids.tolist()
        ]

    def in_frames(self, inner: Any, given: GivenImages, videos: list[ImageTokens]) -> list[ImageTokens]:
        """The ``videos``, which were encoded before the forward, as ones of frames.

        Raises:
            UnsupportedModelError: nothing tells these.
        """
        ids = given.call.get("input_ids")
        tokens: Tensor = given.call["inputs_embeds"] if ids is None else ids
        name = self.placeholders.get(given.kind, self.placeholders["image"])
        here = is_token(inner, tokens, getattr(inner.config, name))
        return by_positions(videos, here, given.call.get("position_ids"))

    def image_tokens(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> tuple[int, int, int]:
        return 1, self.tower_shape(model, image_size).num_patches // self.squares(model).side ** 2, 0

    def views(self, model: PreTrainedModel, inputs: Mapping[str, Tensor], size: tuple[int, int]) -> list[ImageView]:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        side = self.squares(model).side
        return [ImageView(raster((rows // side, columns // side)))]

    def squares(self, model: PreTrainedModel) -> Squares:
        return Squares(self.tower(self.inner(model)).spatial_merge_size, raster=False)

    def scoring_block(self, model: PreTrainedModel) -> int:
        return len(tower_blocks(self.tower(self.inner(model)))) - 1

    def choice(self, model: PreTrainedModel, stage: Stage) -> Choice:
        return ChooseMerged(stage, self.squares(model))

    def image_inputs(
        self, model: PreTrainedModel, image_size: tuple[int, int] | None, placeholders: Tensor, generator: Generator
    ) -> dict[str, Tensor]:
        tower, batch = self.tower_shape(model, image_size), len(placeholders)
        width = tower.num_channels * tower.patch_size[0] * tower.patch_size[1]
        return {
            "pixel_values": torch.randn(batch * tower.num_patches, width, generator=generator),
            "image_grid_thw": torch.tensor([(1, *tower.grid)] * batch),
            "mm_token_type_ids": placeholders.long(),
        }

    def tower_shape(self, model: PreTrainedModel, image_size: tuple[int, int] | None) -> ModelShape:
        """Sizes of the tower for an image that is scaled to the nearest whole number of tokens.

        The processor scales so too, if the image is neither smaller nor larger than its limits, which a model does not
        know.
        """
        tower = self.tower(self.inner(model))
        config, patch = tower.config, as_pair(tower.config.patch_size)
        width = getattr(config, "embed_dim", config.hidden_size)
        token = [config.spatial_merge_size * side for side in patch]
        size = image_size or (USUAL_SIDE * token[0], USUAL_SIDE * token[1])
        height, across = (max(1, round(pixels / side)) * side for pixels, side in zip(size, token, strict=True))
        return ModelShape(
            depth=config.depth,
            width=width,
            mlp_width=getattr(config, "intermediate_size", None) or int(width * config.mlp_ratio),
            num_heads=config.num_heads,
            head_dim=width // config.num_heads,
            image_size=(height, across),
            patch_size=patch,
            num_channels=config.in_channels * config.temporal_patch_size,  # an image is two frames
            num_protected=0,
            has_cls=False,
            head_macs=0,
            mlp_matrices=mlp_matrices(tower.blocks[0]),
        )
