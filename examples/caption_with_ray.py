"""Caption the images in Parquet files with a pruned model by Ray Data, on as many machines as the cluster has.

    python examples/caption_with_ray.py shards/ --workers 8 --out captions

Each actor loads and prunes its model once. Of each Parquet file it writes one of JSON lines, which has its name only
when it is whole: killed and started again, the script does the files that have none. No row is lost or there twice.
"""

import argparse
import io
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from transformers import AutoProcessor

from hf_tokenprune import from_pretrained


class Captioner:
    """What an actor holds: a pruned model and its processor."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = from_pretrained(args.model, args.method, dtype="auto", device_map="auto")
        self.processor = AutoProcessor.from_pretrained(args.model)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
        self.prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)

    def __call__(self, batch: dict) -> dict:
        (path,), rows = batch["path"], []
        for part in pq.ParquetFile(path).iter_batches(self.args.batch_size):
            images = [Image.open(io.BytesIO(image["bytes"])) for image in part[self.args.image].to_pylist()]
            keys = part[self.args.key].to_pylist() if self.args.key else range(len(rows), len(rows) + len(images))
            rows += [{"key": key, "caption": text} for key, text in zip(keys, self.caption(images), strict=True)]
        done = self.args.out / f"{Path(path).stem}.jsonl"
        partial = done.with_suffix(f".{os.uname().nodename}.{os.getpid()}")  # one thought dead may run
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        partial.replace(done)
        return {"file": [done.name], "rows": [len(rows)]}

    @torch.inference_mode()
    def caption(self, images: list[Image.Image]) -> list[str]:
        images, texts = [image.convert("RGB") for image in images], [self.prompt] * len(images)
        inputs = self.processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=self.args.new_tokens, do_sample=False)
        answers = self.processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of Parquet files")
    parser.add_argument("--image", default="image", help="column of the images, as `datasets` writes them")
    parser.add_argument("--key", help="column that tells rows apart; by default their number within the file")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder, or owner/name on the Hub")
    parser.add_argument("--method", default="divprune", help="or a preset, or a folder with a prune_config.json")
    parser.add_argument("--question", default="Describe this image in one sentence.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1, help="actors, each with a model of its own")
    parser.add_argument("--gpus", type=float, default=1, help="of each actor; 0 for CPUs")
    parser.add_argument("--out", type=Path, default=Path("captions"), help="folder that all machines see, as data")
    args = parser.parse_args()
    args.out = args.out.absolute()  # actors stand elsewhere
    args.out.mkdir(parents=True, exist_ok=True)
    files = sorted(args.data.absolute().glob("*.parquet"))
    if todo := [{"path": str(path)} for path in files if not (args.out / f"{path.stem}.jsonl").exists()]:
        rows = ray.data.from_items(todo, override_num_blocks=len(todo))  # so that no actor has many, and others none
        workers = {"compute": ray.data.ActorPoolStrategy(size=args.workers), "num_gpus": args.gpus}
        print(rows.map_batches(Captioner, fn_constructor_args=(args,), batch_size=1, **workers).sum("rows"), "rows")


if __name__ == "__main__":
    main()
