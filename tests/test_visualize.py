"""Pictures of kept patches: the right patches are bright, the others are dimmed."""

import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification

from hf_tokenprune import DivPruneConfig, RandomConfig, TokenPruneError, prune, record
from hf_tokenprune.pictures.kept import draw_kept, kept_sheet, to_image, visualize

from .decoder_families import FAMILIES, built, run, tiny_vlm
from .decoder_prompts import collate, sample
from .decoder_visuals import family_of
from .families import images, inputs_for, supported_classes, tiny_model


def test_dropped_patches_are_dimmed_and_kept_ones_are_not() -> None:
    black = Image.new("RGB", (8, 8), "black")
    picture = draw_kept(black, torch.tensor([0, 3]), grid=(2, 2), size=8)
    assert picture.getpixel((1, 1)) == (0, 0, 0) and picture.getpixel((6, 6)) == (0, 0, 0)
    assert min(picture.getpixel((6, 1))) > 150 and min(picture.getpixel((1, 6))) > 150


def test_grids_that_are_not_square_keep_their_shape() -> None:
    picture = draw_kept(Image.new("RGB", (30, 20), "black"), torch.tensor([5]), grid=(2, 3), size=30)
    assert picture.size == (30, 20)
    assert picture.getpixel((29, 19)) == (0, 0, 0) and min(picture.getpixel((0, 0))) > 150


@pytest.mark.parametrize("family", supported_classes(), ids=lambda pair: pair[1].__name__)
def test_sheet_shows_what_was_recorded(family) -> None:
    model = prune(tiny_model(*family), RandomConfig(layers=(1, 4), keep_ratios=0.5))
    pixels = torch.zeros_like(images(2))
    sheet = visualize(model, pixels, processor=Normalised(), size=64)
    assert sheet.width == 3 * (64 + 6) + 6, "input and two layers"
    with record(model) as rec, torch.no_grad():
        model(**inputs_for(model, pixels))
    grey = sheet.convert("L").load()
    for column, layer in ((1, "1"), (2, "4")):
        for row in range(2):
            kept = set(rec.kept[layer][row].tolist())
            for patch in range(64):
                x = 6 + column * 70 + patch % 8 * 8 + 4
                y = 20 + row * 70 + patch // 8 * 8 + 4
                assert (grey[x, y] < 150) == (patch in kept), (layer, row, patch)


@pytest.mark.parametrize("family", [name for name in FAMILIES if family_of(built(name)).typed])
def test_tokens_of_a_vision_language_model_are_drawn_on_images_of_several_sizes(family: str) -> None:
    model = prune(tiny_vlm(family), DivPruneConfig(keep_ratio=0.4))
    batch = collate([sample(model, "..I."), sample(model, ".i")])
    grids = (batch["image_grid_thw"][:, 1:] // model.config.vision_config.spatial_merge_size).tolist()
    with record(model) as rec:
        run(model, batch)
    assert grids == [[4, 6], [3, 2]] and (rec.kept["entrance"][1] < 0).any(), "the smaller one's row is filled up"
    for (rows, columns), kept in zip(grids, rec.kept["entrance"], strict=True):
        picture = draw_kept(Image.new("RGB", (60, 60), "black"), kept, (rows, columns), size=10 * columns).convert("L")
        tokens = [(row, column) for row in range(rows) for column in range(columns)]
        bright = [picture.getpixel((10 * column + 5, 10 * row + 5)) > 150 for row, column in tokens]
        assert [token for token, dimmed in enumerate(bright) if not dimmed] == kept[kept >= 0].tolist()


class Normalised:
    """An image processor whose black is (0 - 0.5) / 0.5."""

    image_mean = (0.4, 0.4, 0.4)
    image_std = (0.5, 0.5, 0.5)


def test_pixels_become_the_colours_they_came_from() -> None:
    colours = torch.rand(3, 4, 4)
    mean, std = torch.tensor(Normalised.image_mean), torch.tensor(Normalised.image_std)
    image = to_image((colours - mean[:, None, None]) / std[:, None, None], Normalised())
    expected = (colours[:, 2, 1] * 255).round().int().tolist()
    assert list(image.getpixel((1, 2))) == expected


def test_images_that_were_not_recorded_are_refused() -> None:
    model = prune(tiny_model("vit", ViTForImageClassification), RandomConfig())
    with record(model) as rec:
        pass
    with pytest.raises(TokenPruneError, match="1 images but 0 recorded"):
        kept_sheet([Image.new("RGB", (4, 4))], rec, (8, 8))
