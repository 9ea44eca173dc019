"""Train the packaged mini-LLaVA: a stock LlavaForConditionalGeneration that answers questions about mosaics.

    python examples/train_mini_llava.py --clip demo_output/mini_clip --output-dir demo_output/mini_llava

Its vision tower is the mini-CLIP's, frozen, as in LLaVA. Interrupted? Add --resume to go on from the last
checkpoint, to the same weights.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mosaic_sources import llava_processor, load_pictures, save_half
from recipe import DEVICE, Training, add_arguments
from torch import Tensor, nn
from transformers import CLIPModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from hf_tokenprune.demo.mosaics import Mosaic, Mosaics, Pictures
from hf_tokenprune.demo.questions import KINDS, Question, ask, standard_questions, words

IGNORED = -100
PER_MOSAIC = {"what": 2, "where": 4, "count": 3, "compare": 6, "presence": 3}
"""Questions about a training mosaic. What is in a given cell is learned first; to compare two cells, last."""

CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---
# mini_llava

A small LLaVA that answers questions about mosaics of handwritten digits. It comes with `hf_tokenprune`, so that pruning
of a vision-language model can be tried and measured without a download. It is a stock
`LlavaForConditionalGeneration`, trained on all of its tokens.

- **Exact match on {n_test} questions about {test_size} mosaics of test digits: {all:.1f} %**

| | question | right | chance |
|---|---|---:|---:|
| what | what is at row 2 column 3 ? | {what:.1f} % | 10 % |
| where | where is the 7 ? | {where:.1f} % | 11 % |
| count | how many 3s are there ? | {count:.1f} % | 20 % |
| compare | which is larger : row 1 column 1 or row 3 column 2 ? (4 or 7 : second) | {compare:.1f} % | 1 % |
| presence | is there a 5 ? | {presence:.1f} % | 50 % |

- Model: the vision tower of `mini_clip` (features of the last layer but one, without CLS: 256 tokens), frozen; a
  projector; a Llama of 8 layers, width 128; {parameters:,} parameters in all, float16 on disk
- Data: mosaics of `hf_tokenprune.demo.mosaics`, of scikit-learn's `load_digits`; 1437 digits to train, 360 others to
  test; questions of `hf_tokenprune.demo.questions`
- Training: {steps:,} steps of {batch_size} fresh mosaics with {per_mosaic} questions each, packed behind the image's
  tokens in one sequence in which no question sees another
- Loss: cross-entropy of the answers, by question
- Optimiser: Muon for the matrices of the blocks, AdamW for the rest, learning rate {lr} (warm-up {warmup:.0%}, then a
  cosine to zero), weight decay {weight_decay}, bfloat16 autocast, seed {seed}
- Time: {minutes:.0f} minutes on {machine}; log: `training.jsonl`

Made by `examples/train_mini_llava.py`. The digits are UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin
and C. Kaynak, 1998, CC BY 4.0).
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=Path, default=Path("demo_output/mini_clip"))
    parser.add_argument("--output-dir", type=Path, default=Path("demo_output/mini_llava"))
    add_arguments(parser, steps=3400, batch_size=16, test_size=200)
    return parser.parse_args()


def build_model(clip: CLIPModel, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The tower of a CLIP, frozen; a projector and a Llama of width 128 and 8 layers, to be trained."""
    tokenizer = processor.tokenizer
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 8},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, **special},
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "vision_tower" not in name:
            nn.init.normal_(parameter, std=0.06)  # the usual scale is for wide models
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config.update(**special)
    return model


class Packed(NamedTuple):
    """One sequence an image: the image, then all questions about it with their answers; none sees another.

    Attributes:
        ids, positions, targets: (B, T); a target is the next token of an answer, or `IGNORED`.
        mask: (B, 1, T, T), added to scores.
        question: (B, T) number of the question, 0 in the image's part.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    question: Tensor

    def to(self, device: torch.device) -> "Packed":
        return Packed(*(part.to(device) for part in self))


def pack(processor: LlavaProcessor, questions: Sequence[Sequence[Question]]) -> Packed:
    """Sequences of the questions (one list an image), as the processor would build each from the chat template."""
    tokenizer = processor.tokenizer
    prefix = tokenizer("user : " + "<image>" * 256).input_ids
    rows = []
    for asked in questions:
        ids, positions, targets, number = list(prefix), list(range(len(prefix))), [IGNORED] * len(prefix), []
        number += [0] * len(prefix)
        for i, question in enumerate(asked):
            prompt = tokenizer(f"{question.text} assistant :", add_special_tokens=False).input_ids
            answer = tokenizer(question.answer, add_special_tokens=False).input_ids
            ids += prompt + answer
            targets += [IGNORED] * (len(prompt) - 1) + answer + [tokenizer.eos_token_id]
            positions += range(len(prefix), len(prefix) + len(prompt) + len(answer))
            number += [i + 1] * (len(prompt) + len(answer))
        rows.append((ids, positions, targets, number))

    def tensor(part: int, padding: int) -> Tensor:
        parts = [torch.tensor(row[part]) for row in rows]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)

    ids, positions, targets, number = tensor(0, 0), tensor(1, 0), tensor(2, IGNORED), tensor(3, -1)
    T = ids.shape[1]
    seen = (number[:, None] == 0) | (number[:, None] == number[:, :, None])
    seen = seen & torch.ones(T, T, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return Packed(ids, positions, targets, mask[:, None], number)


def logits_of(model: LlavaForConditionalGeneration, packed: Packed, pixels: Tensor) -> Tensor:
    """(B, T, vocabulary), float32."""
    inner = model.model
    embeddings = inner.get_input_embeddings()(packed.ids)
    features = torch.stack(list(inner.get_image_features(pixel_values=pixels).pooler_output))
    embeddings = embeddings.masked_scatter(
        (packed.ids == model.config.image_token_id)[..., None], features.to(embeddings.dtype)
    )
    states = inner.language_model(
        inputs_embeds=embeddings, attention_mask=packed.mask, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(states).float()


def pixels_of(processor: LlavaProcessor, mosaics: Sequence[Mosaic]) -> Tensor:
    """(B, 3, 128, 128)."""
    return processor.image_processor([mosaic.image for mosaic in mosaics], return_tensors="pt").pixel_values


@torch.inference_mode()
def exact_match(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pictures: Pictures, n: int
) -> dict[str, float]:
    """Part of the answers that are right word for word, by kind; greedy decoding gives the same."""
    model.eval()
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for asked in torch.arange(n).split(20):
        mosaics = [Mosaics(pictures, n)[int(i)] for i in asked]
        questions = [standard_questions(int(i), m.cells, pictures) for i, m in zip(asked, mosaics, strict=True)]
        packed = pack(processor, questions).to(model.device)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = logits_of(model, packed, pixels_of(processor, mosaics).to(model.device))
        hit = (logits.argmax(-1) == packed.targets) | (packed.targets == IGNORED)
        for row, of_mosaic in enumerate(questions):
            for i, question in enumerate(of_mosaic):
                right[question.kind].append(bool(hit[row][packed.question[row] == i + 1].all()))
    found = {kind: float(np.mean(hits)) for kind, hits in right.items()}
    return {"all": float(np.mean(list(found.values()))), **found}


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    train, test = load_pictures(args.pictures, "train"), load_pictures(args.pictures, "test")
    processor = llava_processor(words(train))
    model = build_model(CLIPModel.from_pretrained(args.clip, dtype=torch.float32), processor).to(DEVICE)
    path = args.output_dir.with_name(args.output_dir.name + "_training")
    training = Training(model, path, args.steps, args.lr, args.weight_decay, args.warmup, args.resume)

    def losses(step: int) -> dict[str, Tensor]:
        model.train()
        seed = 1 + step + 1_000_000 * (1 + args.seed)  # of test mosaics it is 0, of the CLIP's it is below
        rng = np.random.default_rng(seed)
        mosaics = list(Mosaics(train, args.batch_size, seed))
        kinds = [kind for kind, times in PER_MOSAIC.items() for _ in range(times)]
        questions = [[ask(kind, m.cells, train, rng) for kind in kinds] for m in mosaics]
        packed = pack(processor, questions).to(model.device)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            logits = logits_of(model, packed, pixels_of(processor, mosaics).to(model.device))
        # By question and not by token: else short answers, which are no easier, would count less.
        loss = F.cross_entropy(logits.flatten(0, 1), packed.targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return {"loss": loss / sum(map(len, questions))}

    *_, last = training.run(losses, lambda: exact_match(model, processor, test, args.test_size), args.every)
    save_half(model, args.output_dir)
    processor.save_pretrained(args.output_dir)
    shutil.copy(path.with_suffix(".jsonl"), args.output_dir / "training.jsonl")
    if args.pictures != "digits":
        return  # the card is about digits
    card = CARD.format(
        **vars(args),
        **{name: 100 * last[name] for name in ("all", *KINDS)},
        n_test=args.test_size * len(KINDS),
        parameters=model.num_parameters(),
        per_mosaic=sum(PER_MOSAIC.values()),
        minutes=last["minutes"],
    )
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
