"""Answer a file of questions about images in left-padded batches, dense and pruned, and compare questions a second.

    python examples/llava_batch.py photos/questions.jsonl --out answers.jsonl --batch-size 8
    python examples/llava_batch.py photos/questions.jsonl --run dense --run transprune --run prune_config.json

Each line of the file is {"image": "a.jpg", "question": "..."}; images are looked for beside it. Each line of the output
has the answer of every run as well.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_tokenprune import PruneConfig, list_methods, pruned


def prepare(processor, rows: list[dict], folder: Path):
    """One batch of model inputs. Padding stands in front, so that every prompt ends where its answer begins."""
    prompts = []
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        chat = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
    images = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
    return processor(images=images, text=prompts, padding=True, padding_side="left", return_tensors="pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path, help="JSON lines")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder, or owner/name on the Hub")
    parser.add_argument("--run", action="append", help="dense, a method, or a file; may be repeated")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: the checkpoint's")
    parser.add_argument("--out", type=Path, default=Path("answers.jsonl"))
    args = parser.parse_args()

    configs = {"dense": None} | {name: PruneConfig.for_method(name) for name in list_methods("decoder")}
    runs = {  # read first: a mistake in the last one shows before the others have run
        name: configs[name] if name in configs else PruneConfig.from_pretrained(name)
        for name in args.run or ["dense", "divprune"]
    }
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    processor = AutoProcessor.from_pretrained(args.model)

    batches = [rows[i : i + args.batch_size] for i in range(0, len(rows), args.batch_size)]

    def answer(batch: list[dict]) -> list[str]:
        inputs = prepare(processor, batch, args.questions.parent).to(args.device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
        return processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    answer(batches[0])  # the first forward of a process is slow, and would count for the first run alone
    for name, config in runs.items():
        answers, start = [], time.perf_counter()
        with nullcontext() if config is None else pruned(model, config), tqdm(total=len(rows), desc=name) as progress:
            for batch in batches:
                answers += answer(batch)
                progress.update(len(batch))
        print(f"{name}: {len(rows) / (time.perf_counter() - start):.2f} questions/s")
        for row, text in zip(rows, answers, strict=True):
            row[name] = text.strip()
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
