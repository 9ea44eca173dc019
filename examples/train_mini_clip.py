"""Train the packaged mini-CLIP from scratch: a stock CLIPModel on captioned mosaics of handwritten digits.

    python examples/train_mini_clip.py --output-dir demo_output/mini_clip

Interrupted? Add --resume to go on from the last checkpoint, to the same weights. Photographs, which are harder to tell
apart than digits, need more of them than mosaics hold: --pictures FOLDER --alone 2000
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mosaic_sources import clip_processor, load_pictures, save_half
from PIL import Image
from recipe import DEVICE, Training, add_arguments, sine_positions
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from hf_tokenprune.demo.digits import clutter
from hf_tokenprune.demo.mosaics import EMPTY, GRID, PATCH, SIDE, Mosaic, Mosaics, Pictures
from hf_tokenprune.demo.questions import POSITIONS, caption, most_frequent, number_captions, words

ALONE = 40  # pixels, the side of a photograph's image when it is alone

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---
# mini_clip

A small CLIP that knows handwritten digits: which there are in a mosaic, how many, and where. It comes with
`hf_tokenprune`, so that pruning of a two-tower model can be tried and measured without a download. It is a stock
`CLIPModel`, trained on all of its tokens.

- **Zero-shot accuracy on {test_size} mosaics of one test digit: {digit:.1f} % by digit, {position:.1f} % by position**;
  on {test_size} mosaics of several: {count:.1f} % by the number of a digit that is there (one, two, three, four)
- Chance: 10, 11 and 25 %
- Model: vision tower of 6 layers, width 128, 256 patches of 8 x 8 pixels; text tower of 3 layers, width 96;
  {parameters:,} parameters, float16 on disk
- Data: mosaics of `hf_tokenprune.demo.mosaics`, of scikit-learn's `load_digits`; 1437 digits to train, 360 others to
  test; captions of `hf_tokenprune.demo.questions`, one an image, and for mosaics of several digits every number of the
  most frequent one as alternatives
- Training: from scratch, {steps:,} steps of {batch_size} fresh mosaics, half of them of one digit
- Loss: CLIP's symmetric cross-entropy, where all images count that a caption fits (UniCL); cross-entropy of a mosaic's
  number among the four; and token labelling as for LV-ViT: digit, cell and centre of every patch, read from the last
  layer but one by heads that are not part of the checkpoint
- Optimiser: Muon for the matrices of the blocks, AdamW for the rest, learning rate {lr} (warm-up {warmup:.0%}, then a
  cosine to zero), weight decay {weight_decay}, bfloat16 autocast, seed {seed}
- Time: {minutes:.0f} minutes on {machine}; log: `training.jsonl`

Prompts that it was trained on: "the 7", "two 3s", "a 7 at the top left", "something at the centre".

Made by `examples/train_mini_clip.py`. The digits are UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, CC BY 4.0).
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output/mini_clip"))
    add_arguments(parser, steps=2000, batch_size=32, test_size=400)
    parser.add_argument("--alone", type=int, default=0, help="steps before, of photographs alone")
    args = parser.parse_args()
    if args.alone and args.pictures == "digits":
        parser.error("--alone is for photographs; digits are learned from mosaics")
    return args


def build_model(processor: CLIPProcessor) -> CLIPModel:
    """Vision tower of width 128 and 6 layers, text tower of width 96 and 3 layers."""
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        vision_config={
            **{"image_size": SIDE, "patch_size": PATCH, "hidden_size": 128, "intermediate_size": 384},
            **{"num_hidden_layers": 6, "num_attention_heads": 4, "hidden_act": "quick_gelu"},
        },
        text_config={
            **{"vocab_size": len(tokenizer), "max_position_embeddings": 16, "hidden_size": 96},
            **{"intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3},
            **{"pad_token_id": tokenizer.pad_token_id, **special},
        },
        projection_dim=64,
    )
    # Eager: on CPU the backward pass of SDPA costs more than the whole rest of so narrow a model.
    model = CLIPModel._from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "layers." in name and parameter.ndim == 2:
            # The usual scale is for wide models; at this width it leaves a plateau of many epochs.
            nn.init.normal_(parameter, std=0.06)
    with torch.no_grad():
        positions = sine_positions(SIDE // PATCH, 128)
        model.vision_model.embeddings.position_embedding.weight[1:] = positions
    return model


class PatchLabels(nn.Module):
    """Token labelling (Jiang et al. 2021, LV-ViT): what every patch should know, read by heads that are thrown away.

    CLS alone is too thin a signal to learn to see from 1437 digits.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.picture = nn.Linear(width, num_classes + 1)
        self.cell = nn.Linear(width, GRID**2 + 1)
        self.centre = nn.Linear(width, 2)

    def forward(self, states: Tensor, mosaics: list[Mosaic]) -> Tensor:
        """Mean of three cross-entropies; ``states`` are (B, 256, width)."""
        heads = (self.picture, self.cell, self.centre)
        losses = (self.loss(head, states, targets) for head, targets in zip(heads, patch_targets(mosaics), strict=True))
        return sum(losses, torch.zeros((), device=states.device))

    def loss(self, head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy; ``targets`` (B, N) are classes of the head, or `EMPTY`, which is its last."""
        logits = head(self.norm(states)).flatten(0, 1).float()
        weight = torch.ones(logits.shape[1], device=states.device)
        weight[-1] = 0.1  # most patches are background: with full weight the pictures go under
        target = torch.where(targets == EMPTY, logits.shape[1] - 1, targets).flatten().to(states.device)
        return F.cross_entropy(logits, target, weight)


def patch_targets(mosaics: list[Mosaic]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each patch (B, 256): class of the picture on it, its cell, and 0 if a picture has its centre there."""
    side = SIDE // PATCH
    pixels = (np.arange(side) + 0.5) * PATCH
    picture, cells, centre = (np.full((len(mosaics), side, side), EMPTY) for _ in range(3))
    for i, mosaic in enumerate(mosaics):
        labels = np.array([*mosaic.cells, EMPTY])  # the last is what EMPTY, -1, points at
        picture[i] = labels[mosaic.covered]
        columns, rows = (np.floor((pixels - start) / mosaic.cell_side) for start in mosaic.corner)
        inside = [(lines >= 0) & (lines < GRID) for lines in (rows, columns)]
        grid = rows[:, None] * GRID + columns[None]
        cells[i] = np.where(inside[0][:, None] & inside[1][None], grid, EMPTY)
        for x, y in mosaic.centres.values():
            centre[i, int(y / PATCH), int(x / PATCH)] = 0
    return tuple(torch.from_numpy(part).flatten(1) for part in (picture, cells, centre))  # type: ignore[return-value]


def contrastive(logits: Tensor, fits: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy, where a caption may fit several images and all count (Yang et al. 2022, UniCL).

    Args:
        logits: (B images, C captions), the caption of each image first.
        fits: (B, C) bool, True on the diagonal.
    """
    losses = []
    for scores, targets in ((logits, fits.float()), (logits[:, : len(logits)].T, fits[:, : len(logits)].T.float())):
        targets = targets / targets.sum(1, keepdim=True)
        losses.append(-(targets * scores.log_softmax(1)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def photographs(pictures: Pictures, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Photographs alone: pixels (n, 3, 40, 40), classes (n,), and the class on each patch (n, 25)."""
    backgrounds = [clutter(rng, SIDE)[..., None].repeat(3, axis=-1) for _ in range(8)]
    side = ALONE // PATCH
    pixels, on_patch = np.empty((n, ALONE, ALONE, 3)), np.full((n, side, side), EMPTY)
    chosen = rng.integers(len(pictures.labels), size=n)
    for i, index in enumerate(chosen):
        x, y = rng.integers(SIDE - ALONE, size=2)
        pixels[i] = backgrounds[rng.integers(len(backgrounds))][y : y + ALONE, x : x + ALONE]
        size = int(rng.integers(20, ALONE + 1))  # as in mosaics
        x, y = rng.integers(ALONE - size + 1, size=2)
        photo = Image.fromarray(pictures.pixels[index][:, :: rng.choice((1, -1))])
        pixels[i, y : y + size, x : x + size] = np.asarray(photo.resize((size, size), Image.Resampling.BICUBIC))
        middles = (np.arange(side) + 0.5) * PATCH
        rows, columns = ((start <= middles) & (middles < start + size) for start in (y, x))
        on_patch[i, rows[:, None] & columns[None]] = pictures.labels[index]
    normed = torch.from_numpy(pixels).float().permute(0, 3, 1, 2) / 127.5 - 1
    return normed, torch.from_numpy(pictures.labels[chosen]), torch.from_numpy(on_patch).flatten(1)


@torch.inference_mode()
def zero_shot(model: CLIPModel, processor: CLIPProcessor, pictures: Pictures, n: int) -> dict[str, float]:
    """Accuracy by prompt: which digit is there and where, on mosaics of one; how many, on mosaics of several."""
    model.eval()
    single, several = list(Mosaics(pictures, n, single=True)), list(Mosaics(pictures, n))
    which = [most_frequent(mosaic.cells) for mosaic in several]
    images = [embed_images(model, processor, mosaics) for mosaics in (single, several)]

    def accuracy(images: Tensor, texts: list[str], labels: list[int]) -> float:
        tokens = processor(text=texts, padding=True, return_tensors="pt").to(model.device)
        classes = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
        return float(((images @ classes.T).argmax(1).cpu() == torch.tensor(labels)).float().mean())

    found = {
        "digit": accuracy(images[0], [f"the {name}" for name in pictures.names], [max(m.cells) for m in single]),
        "position": accuracy(
            images[0], [f"something at the {p}" for p in POSITIONS], [int(np.argmax(m.cells)) for m in single]
        ),
    }
    counts = [
        accuracy(image[None], [c.text for c in number_captions(label, pictures)], [mosaic.cells.count(label) - 1])
        for image, mosaic, label in zip(images[1], several, which, strict=True)
    ]
    return {**found, "count": float(np.mean(counts))}


def embed_images(model: CLIPModel, processor: CLIPProcessor, mosaics: list[Mosaic]) -> Tensor:
    """(n, D)."""
    pixels = processor.image_processor([mosaic.image for mosaic in mosaics], return_tensors="pt").pixel_values.to(
        model.device
    )
    return torch.cat([model.get_image_features(pixel_values=part).pooler_output for part in pixels.split(50)])


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    train, test = load_pictures(args.pictures, "train"), load_pictures(args.pictures, "test")
    processor = clip_processor(words(train))
    model = build_model(processor).to(DEVICE)
    heads = PatchLabels(model.config.vision_config.hidden_size, len(train.names)).to(DEVICE)
    path = args.output_dir.with_name(args.output_dir.name + "_training")
    both = nn.ModuleList([model, heads])
    start_training = partial(Training, lr=args.lr, weight_decay=args.weight_decay, warmup=args.warmup)

    def losses_alone(step: int) -> dict[str, Tensor]:
        model.train()
        pixels, labels, on_patch = photographs(train, 8 * args.batch_size, np.random.default_rng((args.seed, step)))
        tokens = processor(text=[f"the {name}" for name in train.names], padding=True, return_tensors="pt").to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            vision = model.vision_model(pixels.to(DEVICE), output_hidden_states=True, interpolate_pos_encoding=True)
            image = model.visual_projection(vision.pooler_output)
            text = model.get_text_features(**tokens).pooler_output
            patches = heads.loss(heads.picture, vision.hidden_states[-2][:, 1:], on_patch)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return {
            "class": F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels.to(DEVICE)),
            "patches": patches,
        }

    def losses(step: int) -> dict[str, Tensor]:
        model.train()
        seed = 1 + step + 1_000_000 * args.seed  # of test mosaics it is 0
        half = args.batch_size // 2
        mosaics = [*Mosaics(train, half, seed), *Mosaics(train, args.batch_size - half, seed + 500_000, single=True)]
        rng = np.random.default_rng(seed)
        captions = [caption(mosaic.cells, train, rng) for mosaic in mosaics]
        # Other images rarely have another number of the same class, so there would be little to tell numbers apart:
        # every number of the most frequent class is a caption too, right or wrong.
        captions += [c for m in mosaics[:half] for c in number_captions(most_frequent(m.cells), train)]
        fits = torch.tensor([[text.fits(mosaic.cells) for text in captions] for mosaic in mosaics], device=DEVICE)
        inputs = processor(
            text=[c.text for c in captions], images=[m.image for m in mosaics], padding=True, return_tensors="pt"
        ).to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            vision = model.vision_model(pixel_values=inputs.pixel_values, output_hidden_states=True)
            image = model.visual_projection(vision.pooler_output)
            text = model.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output
            patches = heads(vision.hidden_states[-2][:, 1:], mosaics)
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        alternatives = logits[:half, len(mosaics) :].unflatten(1, (half, -1)).diagonal(dim1=0, dim2=1).T  # (half, 4)
        times = [mosaic.cells.count(most_frequent(mosaic.cells)) for mosaic in mosaics[:half]]
        numbers = F.cross_entropy(alternatives, torch.tensor(times, device=DEVICE) - 1)
        return {"contrastive": contrastive(logits, fits), "numbers": numbers, "patches": patches}

    def measured() -> dict[str, float]:
        return zero_shot(model, processor, test, args.test_size)

    mosaics_begun = args.resume and path.with_suffix(".pt").exists()
    if args.alone and not mosaics_begun:
        before = path.with_name(path.name + "_alone")
        alone = start_training(both, before, args.alone, resume=args.resume and before.with_suffix(".pt").exists())
        for _ in alone.run(losses_alone, measured, args.every):
            pass
    training = start_training(both, path, args.steps, resume=mosaics_begun)
    *_, last = training.run(losses, measured, args.every)
    save_half(model, args.output_dir)
    processor.save_pretrained(args.output_dir)
    shutil.copy(path.with_suffix(".jsonl"), args.output_dir / "training.jsonl")
    if args.pictures != "digits":
        return  # the card is about digits
    percent = {name: 100 * last[name] for name in ("digit", "position", "count")}
    card = CARD.format(**vars(args), **percent, parameters=model.num_parameters(), minutes=last["minutes"])
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
