"""What ``hf-tokenprune demo`` and ``make demo`` do: three small packaged models, dense and pruned by every method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import PruneConfig
from ..cost import config_for_macs, cost
from ..engine import find_adapter, prune, unprune
from ..errors import TokenPruneError
from ..evaluation import (
    AnswersReport,
    PairedReport,
    evaluate_answers,
    evaluate_paired,
    evaluate_zero_shot,
    load_images,
    load_questions,
    mean_text_tokens,
)
from ..evaluation.run import arms, macs_of
from ..methods.decoderwise import Positions
from ..methods.stack import StackConfig
from ..methods.visionzip import VisionZipConfig
from ..pictures import sheet, trace
from ..registry import get_method, list_methods
from ..sharing import from_pretrained, save_pretrained
from .digits import MODEL_DIR, load_digits_split
from .mosaics import CLIP_DIR, LLAVA_DIR, Mosaics, digit_pictures
from .questions import KINDS, MosaicQuestions

BUDGET = 0.7
"""MACs of every pruned run, as a fraction of the dense ones, so that methods compare at equal work; of the
vision-language model those of the prefill, with the vision tower's, which no method lowers."""
FOR_EIGHT_LAYERS = {"transprune": {"accumulate_layers": (1, 2, 3, 4), "layers": (1, 2, 4)}}
"""Fields of methods that name layers, for the mini-LLaVA's decoder of 8."""
MOSAICS = 20  # five questions each
SINGLES = 200


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and wrote.

    Attributes:
        digits: of a ViT that reads one digit.
        clip: of a CLIP that is asked which digit it sees.
        llava: of a LLaVA that is asked about mosaics of digits.
        checkpoint: pruned ViT, saved and loaded again.
        pictures: what was kept.
    """

    digits: PairedReport
    clip: PairedReport
    llava: AnswersReport
    checkpoint: Path
    pictures: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "digits": self.digits.to_dict(),
            "clip": self.clip.to_dict(),
            "llava": self.llava.to_dict(),
            "checkpoint": str(self.checkpoint),
            "pictures": list(map(str, self.pictures)),
        }

    def summary(self) -> str:
        """The tables, and where the files are."""
        return "\n\n".join(
            [
                f"1. ViT: a handwritten digit on a cluttered canvas. {BUDGET:.0%} of the dense MACs.",
                self.digits.summary(),
                f"2. CLIP: which digit is in the mosaic, by prompt. {BUDGET:.0%} of the dense MACs.",
                self.clip.summary(),
                f"3. LLaVA: questions about mosaics of digits. {BUDGET:.0%} of the dense MACs of the prefill.",
                self.llava.summary(),
                f"saved and reloaded with its prune_config.json, same logits: {self.checkpoint}\n"
                f"what was kept: {', '.join(map(str, self.pictures))}",
            ]
        )


def run_demo(out: Path, limit: int | None = None, progress: bool = True) -> DemoResult:
    """Evaluate, save, reload and draw.

    Args:
        out: folder to write to, made if need be.
        limit: at most so many images or questions for each model, evenly spread.
        progress: show progress bars.
    """
    out.mkdir(parents=True, exist_ok=True)
    digits, checkpoint, patches = _digits(out, limit, progress)
    clip = _clip(limit, progress)
    llava, answers = _llava(out, limit, progress)
    return DemoResult(digits, clip, llava, checkpoint, (patches, answers))


def encoder_configs(model: Any) -> dict[str, PruneConfig]:
    """Every method that has a schedule, at `BUDGET`."""
    macs = BUDGET * cost(model).dense.macs
    return {
        name: config_for_macs(model, get_method(name)(), macs)
        for name in list_methods("vision")
        if get_method(name).scaled is not PruneConfig.scaled  # else it has no schedule that could meet a budget
    }


def decoder_configs(model: Any, keep: float, positions: Positions = "original") -> dict[str, PruneConfig]:
    """Every method that prunes images in front of or in the mini-LLaVA's decoder, by `on_mini_llava`."""
    shape = find_adapter(model).shape(model)
    configs = {name: on_mini_llava(get_method(name)(), positions) for name in list_methods("decoder")}
    return {
        name: config.for_budget(model, keep=keep)
        for name, config in configs.items()
        if not all(stage.videos_only for stage in config.stages_for(shape))
    }


def on_mini_llava(config: PruneConfig, positions: Positions = "original") -> PruneConfig:
    """The config with layers that a decoder of 8 has, and counts of 256 tokens for those of LLaVA-1.5's 576.

    Args:
        positions: of the tokens that stay. The model never saw an image of another number of tokens and finds cells by
            the distance between tokens: with "contiguous" it is lost.
    """
    if isinstance(config, StackConfig):
        return replace(config, stages=tuple(on_mini_llava(part, positions) for part in config.stages))
    if isinstance(config, VisionZipConfig):
        config = config.with_total(round((config.dominant + config.contextual) * 256 / 576))
    fields: dict[str, Any] = dict(FOR_EIGHT_LAYERS.get(config.method, {}))
    if hasattr(config, "positions"):
        fields["positions"] = positions
    return replace(config, **fields)


def _digits(out: Path, limit: int | None, progress: bool) -> tuple[PairedReport, Path, Path]:
    from transformers import ViTForImageClassification, ViTImageProcessorPil

    model = ViTForImageClassification.from_pretrained(MODEL_DIR).eval()
    processor = ViTImageProcessorPil.from_pretrained(MODEL_DIR)
    images = load_images(list(load_digits_split("test")), limit=limit)
    configs = encoder_configs(model)
    report = evaluate_paired(
        model, images, processor, arms(model, configs), macs=macs_of(model, configs), progress=progress
    )
    checkpoint, picture = out / "digits_vit_zero_tprune", out / "kept_patches.png"
    # Not the first image, a 7 like a question mark.
    few = [images[i] for i in range(len(images) // 32, len(images), max(1, len(images) // 4))][:4]
    pixels = processor(images=[each["image"] for each in few], return_tensors="pt").pixel_values
    shown = {name: configs[name] for name in ("salience_merge", "zero_tprune")}
    traces = [trace(model, each["image"], shown, processor, expected=str(each["label"])) for each in few]
    sheet(traces, columns=1).savefig(picture)
    save_pretrained(prune(model, configs["zero_tprune"]), checkpoint)
    processor.save_pretrained(checkpoint)
    with torch.no_grad():
        if not torch.equal(from_pretrained(checkpoint)(pixels).logits, model(pixels).logits):
            raise TokenPruneError(f"the checkpoint in {checkpoint} does not give the logits it was saved with")
    unprune(model)
    return report, checkpoint, picture


def _clip(limit: int | None, progress: bool) -> PairedReport:
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(CLIP_DIR).eval()
    processor = CLIPProcessor.from_pretrained(CLIP_DIR)
    pictures = digit_pictures("test")
    mosaics = Mosaics(pictures, SINGLES, single=True)
    images = load_images([{"image": m.image, "label": max(m.cells)} for m in mosaics], limit=limit)
    configs = encoder_configs(model)
    return evaluate_zero_shot(
        model,
        images,
        processor,
        pictures.names,
        arms(model, configs),
        templates=("the {}",),
        macs=macs_of(model, configs),
        progress=progress,
    )


def _llava(out: Path, limit: int | None, progress: bool) -> tuple[AnswersReport, Path]:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model = LlavaForConditionalGeneration.from_pretrained(LLAVA_DIR).eval()
    processor = LlavaProcessor.from_pretrained(LLAVA_DIR)
    questions = load_questions(list(MosaicQuestions(Mosaics(digit_pictures("test"), MOSAICS))), limit=limit)
    text_tokens = mean_text_tokens(model, questions, processor)
    budget = BUDGET * cost(model, text_tokens=text_tokens).dense.macs
    configs = {
        name: config.for_budget(model, macs=budget, text_tokens=text_tokens)
        for name, config in decoder_configs(model, 0.33).items()
    }
    report = evaluate_answers(
        model,
        questions,
        processor,
        arms(model, configs),
        macs=macs_of(model, configs, text_tokens),
        batch_size=20,
        max_new_tokens=8,
        progress=progress,
    )
    picture = out / "kept_for_questions.png"
    chosen = [KINDS.index("what"), len(KINDS) + KINDS.index("compare")]  # about one mosaic and the next
    shown = {name: configs[name] for name in ("transprune", "divprune")}
    traces = [
        trace(model, one["image"], shown, processor, question=one["question"], expected=one["answers"][0])
        for one in (questions[i] for i in chosen if i < len(questions))
    ]
    sheet(traces, columns=4).savefig(picture)
    return report, picture
