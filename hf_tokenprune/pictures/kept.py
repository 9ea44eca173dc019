"""Pictures of which patches stayed: the image once for each pruned layer, with dropped patches dimmed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ..engine import find_adapter
from ..errors import TokenPruneError, UnsupportedModelError
from ..recording import Record, record

CAPTION_HEIGHT = 14


def draw_kept(image: Image.Image, kept: Tensor, grid: tuple[int, int], size: int = 224) -> Image.Image:
    """One image with the patches that are not in ``kept`` dimmed.

    Args:
        image: as the model saw it, so resized and cropped like its input.
        kept: (n,) int64 positions among ``grid[0] * grid[1]`` patches in raster order; negative ones are filling.
        grid: rows and columns of patches; of tokens, where a vision-language model merges patches into tokens.
        size: width of the result in pixels; the height follows the grid.
    """
    rows, columns = grid
    mask = torch.zeros(rows * columns, dtype=torch.uint8)
    mask[kept[kept >= 0].cpu()] = 255
    shape = (size, size * rows // columns)
    stencil = Image.frombytes("L", (columns, rows), bytes(mask.tolist())).resize(shape, Image.Resampling.NEAREST)
    picture = image.convert("RGB").resize(shape, Image.Resampling.BICUBIC)
    dimmed = Image.blend(picture, Image.new("RGB", shape, (235, 235, 245)), 0.85)
    return Image.composite(picture, dimmed, stencil)


def kept_sheet(images: Sequence[Image.Image], rec: Record, grid: tuple[int, int], size: int = 224) -> Image.Image:
    """A row an image: the image, then what each pruned layer kept, with block and count above.

    Args:
        images: the batch that was recorded, as the model saw it.
        rec: from ``hf_tokenprune.record``, after a forward of these images.
        grid: rows and columns of patches.
        size: width of a picture in pixels.

    Raises:
        TokenPruneError: nothing was recorded, or another number of images.
    """
    kept = rec.kept
    if not kept or next(iter(kept.values())).shape[0] != len(images):
        recorded = next(iter(kept.values())).shape[0] if kept else 0
        raise TokenPruneError(
            f"{len(images)} images but {recorded} recorded; call the model on them inside record(), pruned by a method "
            "that lets tokens leave"
        )
    patches = grid[0] * grid[1]
    captions = [f"input: {patches}", *(f"{_place(name)}: {keep.shape[1]}" for name, keep in kept.items())]
    everything = torch.arange(patches)
    height, gap = size * grid[0] // grid[1], 6
    sheet = Image.new(
        "RGB",
        (len(captions) * (size + gap) + gap, CAPTION_HEIGHT + gap + len(images) * (height + gap)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        left = gap + column * (size + gap)
        draw.text((left, 3), caption, fill="black")
        keeps = [everything] * len(images) if column == 0 else list(list(kept.values())[column - 1])
        for row, (image, keep) in enumerate(zip(images, keeps, strict=True)):
            sheet.paste(draw_kept(image, keep, grid, size), (left, CAPTION_HEIGHT + gap + row * (height + gap)))
    return sheet


def _place(stage: str) -> str:
    return f"block {stage}" if stage.isdigit() else stage.replace("_", " ")


def visualize(model: nn.Module, pixel_values: Tensor, processor: object | None = None, size: int = 224) -> Image.Image:
    """Run a pruned model on a batch and draw what each layer kept.

    Args:
        model: a pruned vision model; one with a text tower runs without it.
        pixel_values: (B, C, H, W) as the image processor makes them (of SigLIP 2: before it cuts them); a few images.
        processor: its ``image_mean`` and ``image_std`` turn pixels back into colours; None: contrast is stretched.
        size: width of a picture in pixels.

    Raises:
        PruneStateError: the model is not pruned.
        UnsupportedModelError: it is a vision-language model, whose image tokens are no grid of patches everywhere.
    """
    adapter = find_adapter(model)
    shape = adapter.shape(model)
    if shape.kind != "vision":
        raise UnsupportedModelError(
            f"visualize draws the patches of a vision encoder, and {type(model).__name__} is a vision-language model; "
            "record(model) says which of its image tokens stay, and kept_sheet(images, record, grid) draws those of "
            "images that are one grid of tokens: where there is image_grid_thw, its rows and columns divided by "
            "spatial_merge_size"
        )
    with record(model) as rec, torch.no_grad():
        adapter.encoder(model)(**adapter.image_inputs(model, pixel_values))
    rows, columns = (n // p for n, p in zip(pixel_values.shape[-2:], shape.patch_size, strict=True))
    return kept_sheet([to_image(pixels, processor) for pixels in pixel_values], rec, (rows, columns), size)


def to_image(pixels: Tensor, processor: object | None = None) -> Image.Image:
    """(C, H, W) model input as a picture."""
    pixels = pixels.detach().float().cpu()
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    else:
        pixels = pixels * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
