"""What an image or a video is to each family of vision-language models: how its tiny model is configured, its tokens in
a prompt, and the tensors that go with them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

Inputs = dict[str, Tensor]
Draw = Callable[..., Tensor]

VOCABULARY = 64
VIDEO_START, START, END, IMAGE, VIDEO = range(VOCABULARY - 5, VOCABULARY)
"""Placeholders, and what stands around them: of an image, of a frame, of a video, of a row of patches."""

SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": END,
}
"""By field of a model's config."""


@dataclass(frozen=True)
class Visual:
    """An image or a video: its piece of a prompt, and the tensors it brings."""

    ids: list[int]
    tensors: Inputs
    kind: int = 1
    """1 an image, 2 a video: what processors write into ``mm_token_type_ids``."""


def image_features(
    model: PreTrainedModel, pixel_values: Tensor, image_sizes: Tensor | None = None, **more: Tensor
) -> Tensor:
    """(N, D): features of images one behind the other, as the model itself makes them."""
    given = more if image_sizes is None else {**more, "image_sizes": image_sizes}
    return _flat(encoded_images(model, pixel_values=pixel_values, **given).pooler_output)


def video_features(model: PreTrainedModel, pixel_values_videos: Tensor, **more: Tensor) -> Tensor:
    """(N, D): features of videos one behind the other, as the model itself makes them."""
    made = encoded_videos(model, pixel_values_videos, **more).pooler_output
    if hasattr(model.model, "apply_pooling") and not torch.equal(made[0, -1], model.model.image_newline):
        # LLaVA-OneVision ends a video with a newline, which old versions add later, in the forward.
        made = torch.cat([made, model.model.image_newline.expand(len(made), 1, -1)], dim=1)
    return _flat(made)


@torch.no_grad()
def encoded_images(model: PreTrainedModel, **tensors: Tensor) -> Any:
    """The stock encoder's output for images."""
    return model.get_image_features(**tensors, return_dict=True)


@torch.no_grad()
def encoded_videos(model: PreTrainedModel, pixel_values_videos: Tensor, **tensors: Tensor) -> Any:
    """The stock encoder's output for videos."""
    # By position: the name of the argument differs between versions.
    return model.model.get_video_features(pixel_values_videos, **tensors, return_dict=True)


def _flat(features: Any) -> Tensor:
    return torch.cat([part.flatten(0, -2) for part in features])


# -- families --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """LLaVA 1.5: an image has one size, and as many tokens as its tower has patches.

    Attributes:
        text, vision, fields: of a tiny model's config, beside what all tiny models have.
    """

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)

    kinds: ClassVar[str] = "Ii"
    """What one call may hold beside each other: images "I", images of another size "i", videos "V"."""
    videos: ClassVar[str] = ""
    """Which videos one call may hold, perhaps without images: "V", and "v" of other frames."""
    frames: ClassVar[dict[str, int]] = {}
    """Of how many frames a video is."""
    typed: ClassVar[bool] = False
    """Whether the model wants ``mm_token_type_ids``."""
    axis: ClassVar[int] = 0
    """Along which the tensors of several images of one prompt are joined; those of several prompts are along 0."""

    def size(self, model: PreTrainedModel, part: str) -> tuple[int, int]:
        """(height, width) in pixels of the image that ``part`` means."""
        side = model.config.vision_config.image_size
        return side, side

    def image(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        pixels = draw(1, 3, *self.size(model, part))
        return Visual([IMAGE] * len(image_features(model, pixels)), {"pixel_values": pixels})

    def video(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        raise NotImplementedError


class Crops(Family):
    """LLaVA-NeXT: a whole and crops of it, unpadded, with a newline token behind every row of patches."""

    def size(self, model: PreTrainedModel, part: str) -> tuple[int, int]:
        side = model.config.vision_config.image_size
        return (2 * side, 2 * side) if part == "I" else (side, 2 * side - 2)

    def image(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        side = model.config.vision_config.image_size
        size = torch.tensor([self.size(model, part)])
        pixels = draw(1, 5 if part == "I" else 3, 3, side, side)
        ids = [IMAGE] * len(image_features(model, pixels, size))
        return Visual(ids, {"pixel_values": pixels, "image_sizes": size})


class CropsAndVideo(Crops):
    """LLaVA-NeXT-Video and LLaVA-OneVision: frames are pooled."""

    kinds = "IiV"
    videos = "V"
    frames: ClassVar = {"V": 4, "v": 2}

    def video(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        side = model.config.vision_config.image_size
        pixels = draw(1, self.frames[part], 3, side, side)
        return Visual([VIDEO] * len(video_features(model, pixels)), {"pixel_values_videos": pixels}, kind=2)


class Tiles(Family):
    """InternVL: tiles of one size that touch, the last one of several the whole image."""

    def size(self, model: PreTrainedModel, part: str) -> tuple[int, int]:
        height, width = model.config.vision_config.image_size
        return (height, 2 * width) if part == "I" else (height, width)

    def image(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        pixels = draw(3 if part == "I" else 1, 3, *model.config.vision_config.image_size)
        return Visual([START, *[IMAGE] * len(image_features(model, pixels)), END], {"pixel_values": pixels})


class TilesInText(Family):
    """Idefics3 and SmolVLM: tiles with text between them, the last one the whole image; one row of them a prompt.

    Processors scale the longer side to four tiles, or leave the whole alone.
    """

    axis = 1

    def size(self, model: PreTrainedModel, part: str) -> tuple[int, int]:
        side = model.config.vision_config.image_size
        return (side, 4 * side) if part == "I" else (side, side)

    def image(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        config = model.config.vision_config
        number, side = 5 if part == "I" else 1, config.image_size
        seen = torch.ones(1, number, side, side, dtype=torch.long)
        if part == "i":  # narrower than a tile: processors pad it
            seen[..., side - config.patch_size :] = 0
        pixels = draw(1, number, 3, side, side) * seen[:, :, None]
        of_tile = len(image_features(model, pixels, pixel_attention_mask=seen)) // number
        names = [*range(1, number), VIDEO_START]  # of the tiles; the last one's is that of every whole image
        ids = [token for name in names for token in (START, name, *[IMAGE] * of_tile)]
        return Visual([*ids, END], {"pixel_values": pixels, "pixel_attention_mask": seen})


class Rows(Family):
    """Mistral3, and a LLaVA with a Pixtral tower: images of any size, with a break token between rows of patches."""

    def unit(self, model: PreTrainedModel) -> int:
        """Pixels of the side of a token."""
        return int(model.config.vision_config.patch_size * getattr(model.config, "spatial_merge_size", 1))

    def size(self, model: PreTrainedModel, part: str) -> tuple[int, int]:
        rows, columns = grid_of(part)
        return rows * self.unit(model), columns * self.unit(model)

    def image(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        size, (rows, columns) = self.size(model, part), grid_of(part)
        ids = [token for _ in range(rows) for token in (*[IMAGE] * columns, START)]
        return Visual([*ids[:-1], END], {"pixel_values": draw(1, 3, *size), "image_sizes": torch.tensor([size])})


class Patches(Family):
    """Qwen2-VL and Qwen2.5-VL: patches of images of any size one behind the other, their grids beside them."""

    kinds = "IiV"
    videos = "Vv"
    frames: ClassVar = {"V": 3, "v": 2}
    typed = True

    def size(self, model: PreTrainedModel, part: str) -> tuple[int, int]:
        config = model.config.vision_config
        rows, columns = grid_of(part)
        unit = config.patch_size * config.spatial_merge_size
        return rows * unit, columns * unit

    def image(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        pixels, grid, length = self.patches(model, 1, grid_of(part), draw)
        return Visual([START, *[IMAGE] * length, END], {"pixel_values": pixels, "image_grid_thw": grid})

    def video(self, model: PreTrainedModel, part: str, draw: Draw) -> Visual:
        frames = self.frames[part]
        pixels, grid, length = self.patches(model, frames, grid_of(part), draw)
        return Visual(self.video_ids(length, frames), self.video_tensors(pixels, grid), kind=2)

    def video_ids(self, length: int, frames: int) -> list[int]:
        return [START, *[VIDEO] * length, END]

    def video_tensors(self, pixels: Tensor, grid: Tensor) -> Inputs:
        return {"pixel_values_videos": pixels, "video_grid_thw": grid}

    def patches(self, model: PreTrainedModel, frames: int, grid: tuple[int, int], draw: Draw) -> tuple[Any, Any, int]:
        """((patches, values) pixels, (1, 3) their grid, how many tokens they become)."""
        config, (rows, columns) = model.config.vision_config, grid
        merge = config.spatial_merge_size
        patches = frames * rows * columns * merge**2
        pixels = draw(patches, 3 * config.temporal_patch_size * config.patch_size**2)
        return pixels, torch.tensor([[frames, merge * rows, merge * columns]]), frames * rows * columns


class TimedPatches(Patches):
    """Qwen2.5-VL: positions of frames tell the time."""

    def video_tensors(self, pixels: Tensor, grid: Tensor) -> Inputs:
        return {**super().video_tensors(pixels, grid), "second_per_grid_ts": torch.tensor([0.5])}


class Frames(Patches):
    """Qwen3-VL and Qwen3.5: text between the frames of a video."""

    def video_ids(self, length: int, frames: int) -> list[int]:
        of_frame = length // frames
        return [token for frame in range(frames) for token in (1 + frame, START, *[VIDEO] * of_frame, END)]


class FramesAsImages(Patches):
    """GLM-4V: frames of a video stand in the prompt as images do, so stock code takes no images beside them."""

    kinds = "Ii"

    def video_ids(self, length: int, frames: int) -> list[int]:
        of_frame = length // frames
        told = [token for frame in range(frames) for token in (START, *[IMAGE] * of_frame, END, 1 + frame)]
        return [VIDEO_START, *told, END]


def grid_of(part: str) -> tuple[int, int]:
    """Rows and columns of tokens, of an image of any size or a frame: of "V" and "v" as many in all."""
    return {"I": (4, 6), "v": (3, 3)}.get(part, (3, 2))


CROPS = {"image_size": 9, "patch_size": 3}
TILES = {"image_size": 24, "patch_size": 4}
PIXTRAL = {"model_type": "pixtral", "image_size": 64, "patch_size": 4, "head_dim": 8}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
PARTIAL_ROPE = {"rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 0.5}, "head_dim": 16}
TOWER = {"patch_size": 2, "out_hidden_size": 32}
LEARNED = {**TOWER, "num_position_embeddings": 16}
WHOLE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}

GLM = (
    {**PARTIAL_ROPE, "num_attention_heads": 2, "num_key_value_heads": 1},
    {**TOWER, "image_size": 8},
)

FAMILIES: dict[str, Family] = {
    "llava": Family(),
    "llava+pixtral": Rows(vision=PIXTRAL, fields=WHOLE),
    "llava_next": Crops(vision=CROPS),
    "llava_next_video": CropsAndVideo(vision=CROPS, fields={"spatial_pool_stride": 1}),
    "llava_onevision": CropsAndVideo(vision=CROPS),
    "internvl": Tiles(vision=TILES),
    "idefics3": TilesInText(vision=TILES),
    "smolvlm": TilesInText(vision=TILES),
    "mistral3": Rows(vision=PIXTRAL),
    "qwen2_vl": Patches(ROPE, {"hidden_size": 32, "embed_dim": 16, "mlp_ratio": 2, "patch_size": 2}),
    "qwen2_5_vl": TimedPatches(ROPE, {**TOWER, "window_size": 8, "fullatt_block_indexes": [0, 1]}),
    "qwen3_vl": Frames(ROPE, {**LEARNED, "deepstack_visual_indexes": [0, 1, 2]}),
    "qwen3_vl_moe": Frames(
        {**ROPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        {**LEARNED, "deepstack_visual_indexes": [0, 1, 2]},
    ),
    "qwen3_5": Frames(
        {
            **PARTIAL_ROPE,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        LEARNED,
    ),
    "glm4v": FramesAsImages(*GLM),
    "glm46v": FramesAsImages(*GLM),
}
"""By ``model_type``, with the tower's behind a + where a family's images depend on it."""


def family_of(model: PreTrainedModel) -> Family:
    name = model.config.model_type
    return FAMILIES.get(f"{name}+{model.config.vision_config.model_type}") or FAMILIES[name]
