"""Where tokens lie in an image, as adapters say: a painted spot changes the features of the token that lies there."""

from typing import Any

import pytest
import torch
from PIL import Image

from hf_tokenprune.adapters._views import arrangement
from hf_tokenprune.adapters.decoder._tower import tower_blocks
from hf_tokenprune.registry import get_adapter

from .decoder_families import adapter_of
from .decoder_visuals import image_features
from .families import images, inputs_for, supported_classes, tiny_model
from .real_processors import model_of
from .test_real_processors import every_family, inputs_of, prompt

SIZES = [(120, 100), (100, 240), (300, 150)]
"""(height, width) in pixels."""


def painted(size: tuple[int, int], row: float, column: float) -> Image.Image:
    """A grey image with a white and black spot, as large as a twelfth of its sides, around a place in fractions."""
    height, width = size
    image = Image.new("RGB", (width, height), (120, 120, 120))
    half = (height / 24, width / 24)
    top, left = row * height - half[0], column * width - half[1]
    spot = Image.linear_gradient("L").resize((round(2 * half[1]), round(2 * half[0]))).point(lambda v: 255 * (v > 127))
    image.paste(spot.convert("RGB"), (round(left), round(top)))
    return image


def without_attention(model: Any) -> Any:
    """The model, in whose vision tower tokens do not hear of each other."""
    tower = adapter_of(model).tower(model.base_model)
    outputs = ("attn.proj", "attn.out_proj", "attention.o_proj", "attn.o_proj", "attention.projection_layer")
    found = [module for name, module in tower.named_modules() if name.endswith(outputs)]
    assert len(found) == len(tower_blocks(tower))
    for module in found:
        torch.nn.init.zeros_(module.weight)
    return model


def features(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(N, D) of the image, as the model makes them."""
    texts = ("input_ids", "attention_mask", "mm_token_type_ids")
    return image_features(model, **{name: value for name, value in inputs.items() if name not in texts})


@every_family
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_token_where_something_is_painted_changes_most(family: str, size: tuple[int, int]) -> None:
    model = without_attention(model_of(family))
    row, column = 0.29, 0.71
    if family == "llava":  # the shorter side of a square in the middle
        row, column = (0.5 + (part - 0.5) * min(size) / side for part, side in zip((row, column), size, strict=True))
    blank, spot = (
        inputs_of(family, prompt(image, "what is this ?"))
        for image in (Image.new("RGB", size[::-1], (120, 120, 120)), painted(size, row, column))
    )
    change = (features(model, spot) - features(model, blank)).norm(dim=-1)
    views = adapter_of(model).views(model, spot, size)
    numbers = torch.cat([view.tokens.flatten() for view in views])
    placeholders = int((spot["input_ids"] == model.config.image_token_id).sum())
    assert len(change) == placeholders
    assert numbers.unique().numel() == numbers.numel() and -1 <= numbers.min() <= numbers.max() < placeholders
    for view in views:
        rows, columns = view.grid
        most = change[view.tokens].argmax().item()
        assert abs((most // columns + 0.5) / rows - 0.29) <= 1 / rows, (view.grid, most)
        assert abs((most % columns + 0.5) / columns - 0.71) <= 1 / columns, (view.grid, most)


@every_family
def test_every_token_of_an_image_lies_somewhere_but_newlines(family: str) -> None:
    model = model_of(family)
    inputs = inputs_of(family, prompt(painted((90, 160), 0.5, 0.5), "what is this ?"))
    views = adapter_of(model).views(model, inputs, (90, 160))
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    lying = set(torch.cat([view.tokens.flatten() for view in views]).tolist()) - {-1}
    newlines = views[-1].grid[0] if family.startswith("llava_") else 0
    assert len(lying) == placeholders - newlines


@pytest.mark.parametrize("family", supported_classes(), ids=lambda pair: pair[1].__name__)
def test_patches_of_an_encoder_lie_row_by_row(family: tuple[str, type]) -> None:
    model = tiny_model(*family)
    inputs = {name: value[:1] for name, value in inputs_for(model, images(1).expand(2, -1, -1, -1)).items()}
    (view,) = get_adapter(family[0]).views(model, inputs, (32, 32))
    assert view.grid == (8, 8) and view.tokens.flatten().tolist() == list(range(64))


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (4, (90, 400), (1, 4)),
        (8, (100, 390), (2, 4)),
        (8, (390, 100), (4, 2)),
        (16, (100, 110), (4, 4)),
        (1, (9, 5), (1, 1)),
    ],
)
def test_tiles_are_arranged_as_the_image_is_long(count: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert arrangement(count, size) == expected
