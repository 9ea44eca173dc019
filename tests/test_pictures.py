"""Pictures show what was recorded: who stays looks as before, who merged is one colour, who left is striped paper."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image, ImageChops
from transformers import CLIPModel, Siglip2Model, ViTForImageClassification, ViTMAEModel

from hf_tokenprune import PruneConfig, StackConfig, TokenPruneError, prune, pruned, record
from hf_tokenprune.cost import cost
from hf_tokenprune.errors import DataError, PruneStateError
from hf_tokenprune.pictures import (
    ImageGrid,
    Step,
    Trace,
    draw_importance,
    draw_tokens,
    sheet,
    to_image,
    token_chart,
    trace,
    visualize,
)
from hf_tokenprune.pictures.pixels import crops
from hf_tokenprune.pictures.reports import curves, read_points
from hf_tokenprune.pictures.style import as_image
from hf_tokenprune.pictures.tokens import EDGE, PAPER, STRIPE

from .families import images, tiny_model
from .real_processors import model_of, processor_of
from .test_real_processors import every_family, inputs_of, picture, prompt

plotting = pytest.mark.skipif(find_spec("matplotlib") is None, reason="needs hf-tokenprune[plot]")
LEFT = {PAPER, STRIPE}
UNLIKE = [("vit_mae", ViTMAEModel), ("clip", CLIPModel), ("siglip2", Siglip2Model)]
"""Encoders with noise of their own, with a text tower, and with patches that are cut beforehand."""
CONFIG = PruneConfig.for_method("divprune", keep_ratio=0.4)


def colours(image: Image.Image, box: tuple[int, int, int, int]) -> set[tuple[int, int, int]]:
    """Of the pixels in (left, upper, right, lower)."""
    return {colour for _, colour in image.crop(box).getcolors(1 << 20)}


def step(owner: list[int], grid: tuple[int, int], base: Image.Image, importance: Any = None) -> Step:
    numbers = torch.arange(len(owner)).view(grid)
    scores = None if importance is None else torch.tensor(importance)
    return Step("block 0", (ImageGrid(base, numbers),), torch.tensor(owner), scores)


def test_who_left_is_striped_and_who_stays_is_as_before() -> None:
    base = picture(60, 40)
    drawn = draw_tokens(step([0, -1, 2, -1, -1, 5], (2, 3), base), width=60)
    assert drawn.size == (60, 40)
    for token, stays in enumerate([True, False, True, False, False, True]):
        left, upper = 20 * (token % 3), 20 * (token // 3)
        box = (left, upper, left + 20, upper + 20)
        if stays:
            assert not ImageChops.difference(drawn.crop(box), base.crop(box)).getbbox()
        else:
            assert colours(drawn, box) == LEFT


def test_merged_tokens_are_a_region_of_their_mean_colour() -> None:
    base = Image.new("RGB", (40, 40))
    for token, level in enumerate((10, 30, 200, 90)):
        left, upper = 20 * (token % 2), 20 * (token // 2)
        base.paste((level, level, 0), (left, upper, left + 20, upper + 20))
    drawn = draw_tokens(step([1, 1, 2, 1], (2, 2), base), width=40)
    mean = round((10 + 30 + 90) / 3)
    for token in (0, 1, 3):
        left, upper = 20 * (token % 2), 20 * (token // 2)
        inside = colours(drawn, (left + 2, upper + 2, left + 20, upper + 20))
        assert all(abs(red - mean) <= 1 and blue == 0 for red, _, blue in inside) and len(inside) == 1, token
    assert drawn.getpixel((10, 30)) == (200, 200, 0), "not merged"
    assert drawn.getpixel((10, 20)) == EDGE and drawn.getpixel((20, 10)) != EDGE, "edges are around the region alone"


@plotting
def test_the_more_important_is_the_brighter() -> None:
    base = Image.new("RGB", (40, 10), (128, 128, 128))
    drawn = draw_importance(step([0, 1, 2, 3], (1, 4), base, [0.3, 5.0, float("nan"), 0.1]), width=40)
    level = [sum(drawn.getpixel((10 * i + 5, 5))) for i in range(4)]
    assert level[3] < level[0] < level[1] and colours(drawn, (20, 0, 30, 10)) <= LEFT
    with pytest.raises(TokenPruneError, match="ranks no tokens there"):
        draw_importance(step([0], (1, 1), base))


def test_images_seen_in_several_ways_lie_beside_each_other() -> None:
    base = Image.new("RGB", (30, 20), "red")
    views = (ImageGrid(base, torch.tensor([[0]])), ImageGrid(base, torch.tensor([[1, 2]])))
    drawn = draw_tokens(Step("entrance", views, torch.tensor([-1, 1, -1])), width=126)
    assert drawn.size == (126, 40)
    assert colours(drawn, (0, 0, 60, 40)) == LEFT and colours(drawn, (96, 0, 126, 40)) == LEFT
    assert colours(drawn, (66, 0, 96, 40)) == {(255, 0, 0)}


# -- traces ----------------------------------------------------------------------------------------------------------


class Scaled:
    """An image processor for tiny models: pixels from -1 to 1."""

    image_mean = image_std = (0.5, 0.5, 0.5)

    def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        small = [torch.tensor(list(image.resize((32, 32)).getdata()), dtype=torch.float32) for image in images]
        return {"pixel_values": torch.stack([each.view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1 for each in small])}


def traced(**fields: Any) -> tuple[Any, Trace, dict[str, PruneConfig]]:
    model = tiny_model("vit", ViTForImageClassification)
    configs = {
        "drops": PruneConfig.for_method("random", layers=(1, 4), keep_ratios=0.5),
        "merges": PruneConfig.for_method("tome", r=5),
    }
    return model, trace(model, picture(50, 40), configs, Scaled(), **fields), configs


def test_a_trace_says_what_records_costs_and_logits_say() -> None:
    model, found, configs = traced()
    assert [run.name for run in found.runs] == ["dense", "drops", "merges"] and found.num_tokens == 64
    pixels = Scaled()([picture(50, 40)], "pt")["pixel_values"]
    with torch.no_grad():
        dense = model(pixels).logits.log_softmax(-1)
    assert found.runs[0].macs == cost(model).dense.macs and found.runs[0].tokens == (65,) * 8
    assert found.runs[0].classes[0][1] == pytest.approx(float(dense.exp().max()), abs=1e-5)
    for run in found.runs[1:]:
        with pruned(model, configs[run.name]), record(model) as rec, torch.no_grad():
            logits = model(pixels).logits.log_softmax(-1)
        assert [step.name for step in run.steps] == [f"block {name}" for name in rec.kept]
        assert [sorted(set(step.owner.tolist()) - {-1}) for step in run.steps] == [
            kept[0].tolist() for kept in rec.kept.values()
        ]
        assert run.tokens == tuple(rec.tokens.values())
        assert run.macs == cost(model, configs[run.name]).pruned.macs
        assert run.kl == pytest.approx(float((dense.exp() * (dense - logits)).sum()), abs=1e-5)
        assert run.answer == f"class {int(logits.argmax())}"
    assert all((step.owner >= 0).all() for step in found.runs[2].steps), "ToMe makes no token leave"
    assert found.to_dict() == json.loads(json.dumps(found.to_dict()))


def test_an_answer_is_right_by_what_is_expected_or_by_the_dense_model() -> None:
    _, found, _ = traced()
    assert [found.is_right(run) for run in found.runs] == [run.answer == found.runs[0].answer for run in found.runs]
    _, found, _ = traced(expected="no such class")
    assert not any(found.is_right(run) for run in found.runs)


def test_a_pruned_model_is_left_pruned_and_what_does_not_fit_is_said() -> None:
    model = prune(tiny_model("vit", ViTForImageClassification), CARRIED)
    found = trace(model, picture(40, 40), {"other": PruneConfig.for_method("tome", r=3)}, Scaled())
    assert found.runs[0].tokens == (65,) * 8 and model.config.prune_config == CARRIED.to_dict()
    with pytest.raises(TokenPruneError, match="answers no questions: leave the question out"):
        trace(model, picture(40, 40), {}, Scaled(), question="what ?")
    with pytest.raises(TokenPruneError, match="no text tower"):
        trace(model, picture(40, 40), {}, Scaled(), class_names=["cat"])
    with pytest.raises(TokenPruneError, match="is asked: give a question"):
        trace(model_of("llava"), picture(40, 40), {}, None)


CARRIED = PruneConfig.for_method("random", layers=(2,), keep_ratios=0.5)


@every_family
def test_images_of_every_vision_language_model_are_traced(family: str) -> None:
    model, image, question = model_of(family), picture(200, 120), "what is this ?"
    found = trace(model, image, {"divprune": CONFIG}, processor_of(family), question=question, max_new_tokens=2)
    inputs = inputs_of(family, prompt(image, question))
    with pruned(model, CONFIG), record(model) as rec, torch.no_grad():
        model(**inputs)
    (step,) = found.runs[1].steps
    assert step.owner[step.owner >= 0].tolist() == rec.kept["entrance"][0].tolist() and step.num_kept < found.num_tokens
    assert found.runs[1].tokens == tuple(rec.tokens.values())
    assert found.num_tokens == int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert found.runs[0].macs is None or found.runs[1].macs < found.runs[0].macs
    assert found.runs[0].kl == 0 and found.runs[1].kl > 0
    assert draw_tokens(step, width=200).width == 200


def test_the_tower_and_the_decoder_of_a_stack() -> None:
    model = model_of("llava_next")
    stack = StackConfig(
        stages=(
            PruneConfig.for_method("evit", layers=(0,), keep_ratios=0.7),
            PruneConfig.for_method("fastv", layer=2),
        )
    )
    image = picture(200, 120)
    found = trace(model, image, {"stack": stack}, processor_of("llava_next"), question="what ?", max_new_tokens=2)
    tower, decoder = found.runs[1].steps
    assert (tower.name, decoder.name) == ("tower block 0", "layer 2")
    crops = len(inputs_of("llava_next", prompt(image, "what ?"))["pixel_values"][0])
    assert len(tower.grids) == crops and len(tower.owner) == crops * tower.grids[0].tokens.numel()
    for i in range(crops):  # nobody stands for a patch of another crop
        own = tower.owner.view(crops, -1)[i]
        assert set((own // own.numel()).tolist()) == {i}
    assert found.runs[0].tower_tokens == (17, 17, 17) and found.runs[1].tower_tokens[1] < 17
    assert len(decoder.grids) == 2 and decoder.importance is not None


# -- sheets, charts, pages ---------------------------------------------------------------------------------------------


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


@plotting
def test_a_sheet_has_a_row_a_run_and_says_what_it_shows() -> None:
    _, found, _ = traced(expected="no such class")
    figure = sheet(found, columns=2)
    said = texts(figure)
    for run in found.runs[1:]:
        (header,) = [text for text in said if run.name in text]
        assert f"✗ {run.answer}" in header and f"({run.macs / found.runs[0].macs:.0%})" in header and "KL" in header
        assert [f"{each.name}: {each.num_kept} of 64" in said for each in run.steps][-1]
    assert {"kept", "removed", "merged: one colour, one token", "wrong"} <= set(said) and "right" not in said
    beside = sheet(found, columns=1)
    assert len([axes for axes in beside.axes if axes.axison]) == 3 and len(figure.axes) == 6
    assert as_image(beside).width > as_image(beside).height > 100


@plotting
def test_what_is_the_same_for_all_runs_is_said_once_and_nothing_is_cut() -> None:
    _, found, _ = traced()
    asked = replace(found, question="what is there, and what else is there, in the lowest row ?", is_cropped=True)
    for columns, runs in ((3, 3), (1, 2)):
        figure = sheet(replace(asked, runs=asked.runs[:runs]), columns=columns)
        (question,) = [text for text in texts(figure) if "what else" in text.replace("\n", " ")]
        assert question.replace("\n", " ") == f'"{asked.question}"'
        assert sum("cropped by the processor" in text for text in texts(figure)) == 1
        width = as_image(figure).width
        above = [text for axes in figure.axes for text in axes.texts if text.get_text()]
        for text in (*above, *figure.legends[0].get_texts()):
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= width, text.get_text()


class Cropping(Scaled):
    do_resize = do_center_crop = True
    crop_size: ClassVar[dict[str, int]] = {"width": 32, "height": 32}

    def __init__(self, **size: int) -> None:
        self.size = size


def test_what_a_processor_crops() -> None:
    shortest, whole = Cropping(shortest_edge=32), Cropping(width=32, height=32)
    assert crops(shortest, (80, 40)) and not crops(shortest, (40, 40)) and crops(Cropping(shortest_edge=36), (40, 40))
    assert not crops(whole, (80, 40)) and not crops(Scaled(), (80, 40))
    model = tiny_model("vit", ViTForImageClassification)
    assert trace(model, picture(80, 40), {}, shortest).is_cropped


@plotting
def test_dollars_in_an_answer_are_no_formula() -> None:
    _, found, _ = traced()
    runs = tuple(replace(run, answer="$5_{ or $6", classes=()) for run in found.runs)
    figure = sheet(replace(found, runs=runs, question="a $ or a $_ ?"), columns=1)
    assert as_image(figure).width > 100 and any("$5_{ or $6" in text for text in texts(figure))


@plotting
def test_a_sheet_of_importance_explains_its_colours() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    configs = {"evit": PruneConfig.for_method("evit", layers=(1, 4), keep_ratios=0.5, fuse=False)}
    found = trace(model, picture(40, 40), configs, Scaled())
    assert {"least important", "most important", "removed"} <= set(texts(sheet(found, what="importance")))


@plotting
def test_a_chart_has_the_tokens_of_every_block() -> None:
    _, found, _ = traced()
    (axes,) = token_chart(found).axes
    steps = [patch.get_data() for patch in axes.patches]
    assert [step.values.tolist() for step in steps] == [list(run.tokens) for run in found.runs]
    assert all(step.edges.tolist() == [i - 0.5 for i in range(9)] for step in steps), "all blocks are equally wide"
    assert axes.get_ylabel() == "tokens that enter (image + 1)"


@plotting
@pytest.mark.parametrize("family", UNLIKE, ids=lambda pair: pair[1].__name__)
def test_visualize_draws_a_batch_through_any_encoder(family: tuple[str, type]) -> None:
    model = prune(tiny_model(*family), CARRIED)
    assert visualize(model, images(2), Scaled()).height > 300
    assert model.config.prune_config == CARRIED.to_dict()


@plotting
def test_a_method_that_lets_no_token_leave_is_drawn_as_such() -> None:
    model = tiny_model("vit", ViTForImageClassification)
    with pytest.raises(PruneStateError, match="nothing leaves it"):
        visualize(model, images(1))
    found = trace(model, picture(40, 40), {"exact": PruneConfig.for_method("exact")}, Scaled())
    assert "no token leaves\nbefore the last block" in texts(sheet(found))


def test_pixels_become_the_colours_they_came_from() -> None:
    wanted = torch.rand(3, 4, 4)
    mean, std = torch.tensor(Scaled.image_mean), torch.tensor(Scaled.image_std)
    image = to_image((wanted - mean[:, None, None]) / std[:, None, None], Scaled())
    assert list(image.getpixel((1, 2))) == (wanted[:, 2, 1] * 255).round().int().tolist()


# -- curves ------------------------------------------------------------------------------------------------------------

EVAL = {"rows": [{"name": "dense", "kl": None, "macs": 4e9, "images_per_second": 40.0}]}
EVAL["rows"] += [
    {"name": f"tome@{g}", "kl": 0.1 / g, "macs": g * 1e9, "images_per_second": None, "agreement": 0.9,
     "accuracy_difference": -1.0, "accuracy_interval": (-2.0, 0.5)}
    for g in (2, 3)
]  # fmt: skip
BENCH = {
    "tome@2": {
        "rows": [{"batch_size": 8, "dense_seconds": 0.4, "pruned_seconds": 0.2, "speedup": 2.0}],
        "macs": {"dense_macs": 4e9, "pruned_macs": 2e9},
    }
}
SEARCH = {
    "config": {"method": "tome"}, "cost": 2e9, "budget": 2e9, "distortion": 0.02, "trials": [],
    "settings": {"goal": "kl"}, "asked": {"macs": 2e9, "latency_batch_size": None},
}  # fmt: skip


def test_reports_of_one_run_are_put_together() -> None:
    points = read_points([EVAL, BENCH, SEARCH])
    assert points["tome@2"].kl == 0.05 and points["tome@2"].difference == (-1.0, -2.0, 0.5)
    assert points["tome@2"].milliseconds == 1000 * 0.4 / 8 / 2 and points["tome@3"].milliseconds is None
    assert (points["dense"].gmacs, points["dense"].milliseconds) == (4.0, 50.0)
    assert points["tome (kl of a search)@2e+09"].kl == 0.02
    with pytest.raises(DataError, match="'something': expected what eval, compare or bench print"):
        read_points([{"something": 1}])


@plotting
def test_curves_stand_over_macs_and_over_time(tmp_path: Path) -> None:
    kl, kl_time, accuracy, _ = curves(EVAL, BENCH).axes
    assert kl.lines[0].get_xdata().tolist() == [2.0, 3.0] and kl.lines[0].get_ydata().tolist() == [0.05, 0.1 / 3]
    assert kl_time.lines[0].get_xdata().tolist() == [25.0]
    assert accuracy.get_ylabel() == "accuracy against dense, points"
    assert len(curves(EVAL).axes) == 2, "no panels over time, which this report does not say"
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(EVAL))
    assert curves(path, str(path)).axes[0].lines[0].get_xdata().tolist() == [2.0, 3.0]
    figure = curves(path)
    as_image(figure)  # ticks have their texts when they are drawn
    shown = texts(figure)
    assert "0.05" in shown and not any("10^" in text for text in shown)
    with pytest.raises(DataError, match="type list: expected a path or a dict"):
        curves([EVAL])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no pruned run"):
        curves({"rows": EVAL["rows"][:1]})
