"""Caption the images in Parquet files with a pruned model by Ray Data, on as many machines as the cluster has.

    python examples/caption_with_ray.py shards/ --workers 8 --out captions

Each Parquet file becomes one of JSON lines, named when it is whole: killed and started again, it does the others.
"""

import argparse
import io
import json
import os
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import ray
from PIL import Image
from transformers import AutoProcessor

from hf_tokenprune import from_pretrained


class Captioner:  # what an actor holds
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.how = args, {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        self.model = from_pretrained(args.model, args.method, dtype="auto", device_map="auto")
        self.processor = AutoProcessor.from_pretrained(args.model)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
        self.prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)

    def __call__(self, batch: dict) -> dict:
        (path,), rows = batch["path"], []
        for part in pq.ParquetFile(path).iter_batches(self.args.batch_size):
            images, first = {}, len(rows)  # by row
            for i, file in enumerate(part[self.args.image].to_pylist()):
                rows.append({"key": part[self.args.key][i].as_py() if self.args.key else first + i})
                try:
                    images[first + i] = Image.open(io.BytesIO(file["bytes"])).convert("RGB")
                except Exception as error:  # decoders raise all kinds
                    rows[-1]["error"] = f"{type(error).__name__}: {error}"
            if images:
                inputs = self.processor(images=list(images.values()), text=[self.prompt] * len(images), **self.how)
                inputs = inputs.to(self.model.device, self.model.dtype)
                tokens = self.model.generate(**inputs, max_new_tokens=self.args.new_tokens, do_sample=False)
                tokens = tokens[:, inputs.input_ids.shape[1] :]
                for i, text in zip(images, self.processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                    rows[i]["caption"] = text.strip()
        done = self.args.out / f"{Path(path).stem}.jsonl"
        partial = done.with_suffix(f".{os.uname().nodename}.{os.getpid()}")  # one thought dead may run
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        partial.replace(done)
        return {"rows": [len(rows)], "unreadable": [sum("error" in row for row in rows)]}


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
args.out, args.data = args.out.absolute(), args.data.absolute()  # actors stand elsewhere
files = sorted(args.data.glob("*.parquet")) or parser.error(f"{args.data} has no *.parquet")
args.out.mkdir(parents=True, exist_ok=True)
about = json.dumps({**vars(args), "out": None, "batch_size": None, "workers": None, "gpus": None}, default=str)
mine = args.out / f"about-{zlib.crc32(about.encode()):08x}.json"
if other := [path.read_text() for path in args.out.glob("about-*.json") if path != mine]:
    raise SystemExit(f"{args.out} holds captions of {other[0]}, and this is {about}: give another folder")
mine.write_text(about)
if todo := [{"path": str(path)} for path in files if not (args.out / f"{path.stem}.jsonl").exists()]:
    rows = ray.data.from_items(todo, override_num_blocks=len(todo))  # so that no actor has many, and others none
    workers = {"compute": ray.data.ActorPoolStrategy(size=args.workers), "num_gpus": args.gpus, "batch_size": 1}
    done = rows.map_batches(Captioner, fn_constructor_args=(args,), **workers).sum(["rows", "unreadable"])
    print(f"{done['sum(rows)']} rows, {done['sum(unreadable)']} unreadable")
