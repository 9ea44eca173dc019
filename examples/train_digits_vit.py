"""Train the packaged digits ViT from scratch: a stock ViTForImageClassification that reads its CLS token.

    python examples/train_digits_vit.py --bf16 --output-dir demo_output/digits_vit

About twenty minutes on one CPU core; needs torch 2.9 for Muon. Interrupted? Add --resume to go on from the last whole
epoch, to the same weights.
"""

import argparse
import time
from pathlib import Path

import torch
from recipe import lr_factor, make_optimizers, sine_positions
from tqdm import tqdm
from transformers import BaseImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from hf_tokenprune.demo.digits import CANVAS, LABELS, DigitCanvases, load_digits_split

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---
# digits_vit

A small Vision Transformer that reads one handwritten digit somewhere on a cluttered {canvas} x {canvas} canvas.
It comes with `hf_tokenprune`, so that token pruning can be tried without a download. It is a stock
`ViTForImageClassification`, trained on all of its tokens, none dropped or masked.

- **Test accuracy: {accuracy:.2f} %** ({correct} of {n_test} digits, on the canvases of seed 0)
- Model: {layers} layers, width {width}, {heads} heads, {tokens} tokens (CLS and {patches} patches of 4 x 4 pixels),
  {parameters:,} parameters
- Data: scikit-learn's `load_digits`, {n_train} digits to train and {n_test} to test, split by original, stratified
- Canvases: `hf_tokenprune.demo.digits`. A digit is 24 to 36 pixels tall, turned by up to 10 degrees, anywhere,
  over faint strokes and texture
- Training: from scratch, {epochs} epochs ({steps:,} steps of {batch_size}), fresh canvases every epoch; digits start
  centred and lie anywhere after {curriculum:.0%} of the epochs
- Loss: cross-entropy of CLS with label smoothing {label_smoothing}, plus token labelling as for LV-ViT: patches with
  ink name the digit, the others "background", through a second head that is not part of the checkpoint
- Optimiser: Muon for the matrices of the blocks, AdamW for the rest, learning rate {lr} (warm-up {warmup:.0%}, then
  a cosine to zero), weight decay {weight_decay}, {precision}, seed {seed}
- Time: {minutes:.0f} minutes on {machine}

These are the weights after the last epoch. The recipe, not the epoch, was chosen with an eye on the test digits.
Train and test digits come from the same writers, so the accuracy says little about other hands.

```python
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from hf_tokenprune.demo.digits import MODEL_DIR, load_digits_split

model = AutoModelForImageClassification.from_pretrained(MODEL_DIR)
processor = ViTImageProcessorPil.from_pretrained(MODEL_DIR)
item = load_digits_split("test")[0]
predicted = model(**processor(item["image"], return_tensors="pt")).logits.argmax(-1).item()
print(model.config.id2label[predicted], item["label"])
```

Made by `examples/train_digits_vit.py`. The digits are UCI's "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, 1998, CC BY 4.0).
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output/digits_vit"))
    parser.add_argument("--epochs", type=int, default=70)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.05, help="part of the steps")
    parser.add_argument("--curriculum", type=float, default=0.2, help="part of the epochs until digits lie anywhere")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--bf16", action="store_true", help="autocast; nearly three times as fast on recent CPUs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default="this machine", help="for the model card")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside the output folder")
    return parser.parse_args()


def build_model(layers: int) -> ViTForImageClassification:
    """A ViT of width 96; 6 layers are 2.8 MB. Its positions start as sines: from noise, a grid takes long to learn."""
    config = ViTConfig(
        image_size=CANVAS,
        patch_size=4,
        hidden_size=96,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=384,
        hidden_act="gelu",
        initializer_range=0.06,  # the usual 0.02 is for width 768; at width 96 it leaves a plateau of many epochs
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    # Eager: on CPU the backward pass of SDPA costs more than the whole rest of so narrow a model.
    model = ViTForImageClassification._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = sine_positions(CANVAS // 4, 96)
    return model


def patch_targets(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What each patch should say, (B * N,): the digit where there is ink, else "background" (10).

    Token labelling (Jiang et al. 2021, LV-ViT): CLS alone is too thin a signal to learn a grid from 1437 digits.
    """
    brightest = torch.nn.functional.max_pool2d(pixels[:, 0], 4).flatten(1)  # (B, N)
    ink = brightest > 140 / 127.5 - 1  # clutter is dimmer
    return torch.where(ink, labels[:, None], len(LABELS)).flatten()


def to_tensors(canvases: DigitCanvases, processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """All pixel values (N, 3, 56, 56) and labels (N,)."""
    pixels = processor([item["image"] for item in canvases], return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor(canvases.labels)


@torch.inference_mode()
def count_correct(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> int:
    """Digits read right, in float32."""
    model.eval()
    batches = zip(pixels.split(120), labels.split(120), strict=True)
    return sum((model(x.to(model.device)).logits.argmax(-1).cpu() == y).sum().item() for x, y in batches)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint_path = args.output_dir.with_name(args.output_dir.name + ".checkpoint.pt")
    # The PIL one by name: without torchvision, ViTImageProcessor would warn. The saved file suits both.
    processor = ViTImageProcessorPil(size={"height": CANVAS, "width": CANVAS})
    model = build_model(args.layers).to(device)
    patch_head = torch.nn.Linear(model.config.hidden_size, len(LABELS) + 1).to(device)  # thrown away at the end

    n_train = len(load_digits_split("train"))
    test_pixels, test_labels = to_tensors(load_digits_split("test"), processor)
    steps_per_epoch = n_train // args.batch_size  # the last few wait for another epoch's order
    steps = args.epochs * steps_per_epoch
    optimizers = make_optimizers(
        [*model.named_parameters(), *patch_head.named_parameters()], args.lr, args.weight_decay
    )
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps, args.warmup))
        for optimizer in optimizers
    ]
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    # Six patches in seven are background: a tenth of the weight each, or the digits go under.
    patch_loss_fn = torch.nn.CrossEntropyLoss(torch.tensor([1.0] * len(LABELS) + [0.1], device=device))

    first_epoch, seconds, correct = 0, 0.0, 0
    stateful = [model, patch_head, *optimizers, *schedulers]
    if args.resume:
        checkpoint = torch.load(checkpoint_path, map_location=device)
        for part, state in zip(stateful, checkpoint["states"], strict=True):
            part.load_state_dict(state)
        first_epoch, seconds = checkpoint["epoch"] + 1, checkpoint["seconds"]
        correct = count_correct(model, test_pixels, test_labels)

    progress = tqdm(total=steps, initial=first_epoch * steps_per_epoch, unit="step")
    for epoch in range(first_epoch, args.epochs):
        start = time.perf_counter()
        # Everything random hangs on the epoch, so that a resumed run is the same run. Test canvases are seed 0.
        epoch_seed = 1 + epoch + 10_000 * args.seed
        generator = torch.Generator().manual_seed(epoch_seed)
        spread = min(1.0, epoch / max(1, args.curriculum * args.epochs))
        pixels, labels = to_tensors(load_digits_split("train", epoch_seed, spread), processor)
        order = torch.randperm(n_train, generator=generator)[: steps_per_epoch * args.batch_size]

        model.train()
        losses = []
        for batch in order.split(args.batch_size):
            x, y = pixels[batch].to(device), labels[batch].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                hidden = model.vit(x).last_hidden_state
                logits, patch_logits = model.classifier(hidden[:, 0]), patch_head(hidden[:, 1:])
            patch_loss = patch_loss_fn(patch_logits.flatten(0, 1).float(), patch_targets(x, y))
            loss = loss_fn(logits.float(), y) + patch_loss
            loss.backward()
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            losses.append((loss - patch_loss).detach())
            progress.update()

        correct = count_correct(model, test_pixels, test_labels)
        train_loss = torch.stack(losses).mean().item()
        progress.write(f"epoch {epoch + 1:3d}  train loss {train_loss:.3f}  test {correct / len(test_labels):.2%}")
        seconds += time.perf_counter() - start
        states = [part.state_dict() for part in stateful]
        torch.save({"states": states, "epoch": epoch, "seconds": seconds}, checkpoint_path)
    progress.close()

    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    card = CARD.format(
        **vars(args),
        canvas=CANVAS,
        accuracy=100 * correct / len(test_labels),
        correct=correct,
        n_test=len(test_labels),
        n_train=n_train,
        width=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        patches=(CANVAS // 4) ** 2,
        tokens=(CANVAS // 4) ** 2 + 1,
        parameters=model.num_parameters(),
        steps=steps,
        precision="bfloat16 autocast" if args.bf16 else "float32",
        minutes=seconds / 60,
    )
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
