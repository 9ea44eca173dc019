"""What pruning does to one image, layer by layer, and to what the model says of it. Nothing is drawn here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..benchmark.timing import dense
from ..config import PruneConfig, as_config
from ..cost import cost
from ..engine import ConfigLike, find_adapter, pruned, unwrapped
from ..errors import TokenPruneError
from ..evaluation.images import to_rgb
from ..evaluation.prompts import prompts
from ..evaluation.questions import is_right
from ..evaluation.tables import plain
from ..evaluation.turns import DENSE, eval_mode
from ..evaluation.zero_shot import TEMPLATES
from ..recording import Record, record
from .pixels import crops, to_image
from .said import Answers, Classes, classifier

NEW_TOKENS = 32


@dataclass(frozen=True, eq=False)
class ImageGrid:
    """A picture, and the tokens that lie on it.

    Attributes:
        picture: RGB, what the model sees.
        tokens: (rows, columns) int64, number of the token there; -1: none.
    """

    picture: Image.Image
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """The N tokens of the image behind one pruning point.

    Attributes:
        name: "block 3", "layer 3", "entrance", "vision tower", or "tower block 3".
        grids: how the tokens lie in the image: one grid, or the whole and its details; of a tower one a crop.
        owner: (N,) int64, of each token who stands for it: itself, or what it was merged into; -1: it was removed.
        importance: (N,) float32 by which the method ranked them, higher = keep, of merged ones that of their owner; NaN
            for those that were removed before. None: it does not rank tokens, or ranked others than these (of crops,
            before their filling is cut off).
        averages: some of those that were removed were averaged into ones that stay; which ones is not recorded.
    """

    name: str
    grids: tuple[ImageGrid, ...]
    owner: Tensor
    importance: Tensor | None = None
    averages: bool = False

    @property
    def num_kept(self) -> int:
        """Tokens that are left."""
        return int(self.owner[self.owner >= 0].unique().numel())


@dataclass(frozen=True)
class TracedRun:
    """The model, dense or pruned by one config, on one image.

    Attributes:
        name: "dense", or what the caller calls the config.
        config: None for the dense model.
        steps: the pruning points at which tokens leave, in order.
        tokens: that enter each block or decoder layer, protected ones and text included.
        tower_tokens: that enter each block of the vision tower, where one of the runs prunes there.
        macs: multiply-adds of the image (the prefill); None: they cannot be counted for an image cut like this.
        answer: to the question, or the likeliest class; None: the model has no head that says one.
        classes: names and probabilities of the five likeliest classes.
        kl: KL(dense || this) of the classes, or of the next token along the dense answer, in nats; None: of no answer.
    """

    name: str
    config: PruneConfig | None
    steps: tuple[Step, ...]
    tokens: tuple[int, ...]
    tower_tokens: tuple[int, ...]
    macs: int | None
    answer: str | None
    classes: tuple[tuple[str, float], ...]
    kl: float | None


@dataclass(frozen=True)
class Trace:
    """One image through a model, dense and pruned.

    Attributes:
        model: its name or class.
        image: RGB.
        grids: how its tokens lie in it; their number is ``num_tokens``.
        runs: the dense one first.
        question: that a vision-language model was asked.
        expected: the right answer or class, where the caller knows it.
        is_cropped: the processor cut off a part of the image, which the model did not see.
    """

    model: str
    image: Image.Image
    grids: tuple[ImageGrid, ...]
    num_tokens: int
    runs: tuple[TracedRun, ...]
    question: str | None = None
    expected: str | None = None
    is_cropped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what is counted and said; not where tokens lie."""
        runs = [
            {
                "name": run.name,
                "config": None if run.config is None else run.config.to_dict(),
                "steps": {step.name: [step.num_kept, len(step.owner)] for step in run.steps},
                **{name: getattr(run, name) for name in ("tokens", "tower_tokens", "macs", "answer", "classes", "kl")},
                "right": self.is_right(run),
            }
            for run in self.runs
        ]
        asked = {"question": self.question, "expected": self.expected}
        return plain({"model": self.model, "num_tokens": self.num_tokens, **asked, "runs": tuple(runs)})

    def is_right(self, run: TracedRun) -> bool | None:
        """Whether a run says what is expected; if that is not known, what the dense model says. None: it is silent."""
        wanted = self.runs[0].answer if self.expected is None else self.expected
        if wanted is None or run.answer is None:
            return None
        return is_right(run.answer, (wanted, *wanted.split(","))) or is_right(wanted, run.answer.split(","))


def trace(
    model: nn.Module,
    image: Image.Image,
    configs: Mapping[str, ConfigLike],
    processor: Any,
    *,
    question: str | None = None,
    prompt: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    expected: str | None = None,
    max_new_tokens: int = NEW_TOKENS,
) -> Trace:
    """Run a model on one image, dense and pruned by every config, and record what becomes of its tokens.

    Args:
        model: with an adapter, on any device; pruned or not, and so it is left.
        image: of any mode; what is transparent is white.
        configs: by name.
        processor: of the model, as ``AutoProcessor`` or ``load_processor`` gives it.
        question: for a vision-language model, which has to be asked one.
        prompt: text with ``{}`` where the question goes; None: the processor's chat template.
        class_names: for a model with a text tower: what the image may show. None: it says nothing.
        templates: for these, texts with ``{}`` where the name goes.
        expected: the right class or answer, if it is known.
        max_new_tokens: of an answer.

    Raises:
        TokenPruneError: a question to a model that answers none, or none to one that does; what ``prompts`` raises.
        UnsupportedModelError: a config does not fit the model.
        ConfigError: a field of a config does not.
    """
    texts: dict[str, Any] = {"class_names": class_names, "templates": templates, "max_new_tokens": max_new_tokens}
    image = to_rgb(image)
    said = saying(model, image, processor, question=question, prompt=prompt, **texts)
    found = trace_inputs(model, image, configs, said, processor)
    return replace(found, question=question, expected=expected, is_cropped=crops(processor, image.size))


def saying(
    model: nn.Module,
    image: Image.Image,
    processor: Any,
    *,
    question: str | None,
    prompt: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    max_new_tokens: int = NEW_TOKENS,
) -> Classes | Answers:
    """What the model says of an RGB image, to be asked; arguments and errors are those of ``trace``."""
    is_decoder = find_adapter(model).shape(unwrapped(model)).kind == "decoder"
    if is_decoder != (question is not None):
        wanted = "is asked: give a question" if is_decoder else "answers no questions: leave the question out"
        raise TokenPruneError(f"{type(unwrapped(model)).__name__} {wanted}")
    asked = {} if question is None else {"text": [prompts(processor, prompt)(question)]}
    inputs = dict(processor(images=[image], **asked, return_tensors="pt"))
    if is_decoder:
        return Answers(model, inputs, processor, max_new_tokens)
    return Classes(model, inputs, *classifier(model, processor, class_names, templates))


def trace_inputs(
    model: nn.Module, image: Image.Image, configs: Mapping[str, ConfigLike], said: Classes | Answers, processor: Any
) -> Trace:
    """``trace`` where the inputs are made already."""
    stock = unwrapped(model)
    adapter, size = find_adapter(stock), (image.height, image.width)
    grids = _grids(adapter.views(stock, said.inputs, size), image, processor)
    total, entering = said.count(adapter)
    runs = []
    with eval_mode(model), torch.no_grad():
        with dense(model):
            answer = said.dense()
        for name, config in configs.items():
            with pruned(model, config):
                with record(model) as rec:
                    own = said.pruned()
                steps = _steps(rec, grids, total, said.noun)
                tower = ()
                if rec.tower is not None:
                    crops = _grids(adapter.tower_views(stock, said.inputs), image, processor)
                    steps = (*_tower_steps(rec.tower, crops), *steps)
                    tower = tuple(rec.tower.tokens.values())
                lengths, macs = (
                    tuple(rec.tokens.values()),
                    _macs(stock, as_config(config), grids, size, total, entering),
                )
                runs.append(TracedRun(name, as_config(config), steps, lengths, tower, macs, *own))
    depth, towers = len(adapter.blocks(stock)), [run.tower_tokens for run in runs if run.tower_tokens]
    whole = ((towers[0][0],) * len(towers[0])) if towers else ()
    macs = _macs(stock, None, grids, size, total, entering)
    first = TracedRun(DENSE, None, (), (entering,) * depth, whole, macs, *answer)
    runs = [run if run.tower_tokens else replace(run, tower_tokens=whole) for run in runs]
    name = getattr(stock.config, "_name_or_path", "")
    name = Path(name).name if Path(name).is_dir() else name  # whoever gets a picture has no use for folders
    return Trace(name or type(stock).__name__, image, grids, total, (first, *runs))


def _grids(views: Sequence[Any], image: Image.Image, processor: Any) -> tuple[ImageGrid, ...]:
    return tuple(
        ImageGrid(image if view.pixels is None else to_image(view.pixels, processor), view.tokens) for view in views
    )


def _steps(rec: Record, grids: tuple[ImageGrid, ...], total: int, noun: str) -> tuple[Step, ...]:
    """Of the first sample."""
    owners, ranked, steps = rec.owners, rec.importance, list[Step]()
    for name, kept in rec.kept.items():
        if name in owners:
            owner = owners[name][0].cpu()
        else:
            stays = kept[0][kept[0] >= 0].cpu()
            owner = torch.full((total,), -1).scatter(0, stays, stays)
        label = f"{noun} {name}" if name.isdigit() else name.replace("_", " ")
        averages = name in rec.averaging or any(step.averages for step in steps)
        steps.append(Step(label, grids, owner, _importance(ranked.get(name), steps, total), averages))
    return tuple(steps)


def _tower_steps(rec: Record, crops: tuple[ImageGrid, ...]) -> tuple[Step, ...]:
    """Of a tower, whose images are rows: their patches numbered through."""
    ranked, steps = rec.importance, list[Step]()
    for name, owner in rec.owners.items():
        first = torch.arange(len(owner), device=owner.device).unsqueeze(1) * owner.shape[1]
        through = torch.where(owner >= 0, owner + first, -1).flatten().cpu()
        steps.append(Step(f"tower block {name}", crops, through, _importance(ranked.get(name), steps, len(through))))
    return tuple(steps)


def _importance(found: Tensor | None, before: list[Step], total: int) -> Tensor | None:
    """Of each token that of the one that stands for it; None where a record has none, or that of other tokens."""
    if found is None or found.numel() != total:
        return None
    importance = found.flatten().cpu()
    if not before:
        return importance
    owner = before[-1].owner
    return torch.where(owner >= 0, importance[owner.clamp(min=0)], torch.nan)


def _macs(
    stock: Any,
    config: PruneConfig | None,
    grids: tuple[ImageGrid, ...],
    size: tuple[int, int],
    total: int,
    entering: int,
) -> int | None:
    """Of this image; None where no size of an image makes so many tokens."""
    adapter, shape = find_adapter(stock), find_adapter(stock).shape(stock)
    rows, columns = grids[0].tokens.shape
    texts: dict[str, Any] = {}
    if shape.kind == "vision":
        side = shape.patch_size
        image_size = None if (rows, columns) == shape.grid else (rows * side[0], columns * side[1])
    else:
        texts = {"text_tokens": max(entering - total, 1)}
        merged = round((shape.tower.num_patches / shape.tower_tokens) ** 0.5)
        side = tuple(merged * pixels for pixels in shape.tower.patch_size)
        sizes = [None, size, (rows * side[0], columns * side[1])]
        fitting = [each for each in sizes if adapter.shape(stock, each).image_tokens == total]
        if not fitting:
            return None
        image_size = fitting[0]
    report = cost(stock, config, image_size=image_size, **texts)
    return int(report.dense.macs if config is None else report.pruned.macs)
