"""Caption the images of a sharded dataset with a pruned model, on as many processes and machines as there are.

    accelerate launch --multi_gpu examples/caption_shards.py owner/dataset --out captions
    accelerate launch --multi_gpu examples/caption_shards.py photos/ --shards 64 --out captions

Parquet and WebDataset shards are streamed, from a folder or from the Hub; a folder of images is cut into --shards. Each
process takes whole shards and writes each as one file of JSON lines, which has its name only when it is whole. Killed
and started again, with as many processes as there are then, it does the shards that have none: no row is lost or twice.
An image that cannot be read has an "error" in its row. about-*.json tells what --out is of: nothing else goes there.
"""

import argparse
import json
import os
import zlib
from pathlib import Path

from accelerate import Accelerator
from datasets import Image, load_dataset
from transformers import AutoProcessor

from hf_tokenprune import from_pretrained

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", help="folder, or owner/name on the Hub")
parser.add_argument("--split", default="train")
parser.add_argument("--revision", help="of a Hub dataset: give it, so that a later start sees the same shards")
parser.add_argument("--image", default="image", help="column of the images")
parser.add_argument("--key", help="column that tells rows apart; by default their number within the shard")
parser.add_argument("--shards", type=int, help="cut data that is not in shards into so many")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder, or owner/name on the Hub")
parser.add_argument("--method", default="divprune", help="or a preset, or a folder with a prune_config.json")
parser.add_argument("--question", default="Describe this image in one sentence.")
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--new-tokens", type=int, default=40)
parser.add_argument("--out", type=Path, default=Path("captions"), help="folder that all machines see")
args = parser.parse_args()
args.data = os.path.realpath(args.data) if os.path.isdir(args.data) else args.data
state = Accelerator()
data = load_dataset(args.data, split=args.split, revision=args.revision, streaming=not args.shards)
data = data.cast_column(args.image, Image(decode=False))  # one that cannot be read would end the iteration
shards = args.shards or data.num_shards
if shards < state.num_processes:
    raise SystemExit(f"{shards} shards for {state.num_processes} processes: give --shards, or start fewer")
args.out.mkdir(parents=True, exist_ok=True)
about = json.dumps({**vars(args), "shards": shards, "out": None, "batch_size": None})
mine = args.out / f"about-{zlib.crc32(about.encode()):08x}.json"
if other := [path.read_text() for path in args.out.glob("about-*.json") if path != mine]:
    raise SystemExit(f"{args.out} holds captions of {other[0]}, and this is {about}: give another folder")
mine.write_text(about)

model = from_pretrained(args.model, args.method, dtype="auto").to(state.device)
processor = AutoProcessor.from_pretrained(args.model)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": args.question}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
# Of all shards, not of those that are left: what is left, each process would see at another moment.
for index in range(state.process_index, shards, state.num_processes):
    path, rows = args.out / f"{index:05d}-of-{shards:05d}.jsonl", []
    if path.exists():
        continue
    for batch in data.shard(shards, index, contiguous=True).iter(args.batch_size):
        images, first = {}, len(rows)  # by row
        for i, file in enumerate(batch[args.image]):
            rows.append({"key": batch[args.key][i] if args.key else first + i})
            try:
                images[first + i] = Image().decode_example(file).convert("RGB")
            except Exception as error:  # decoders raise all kinds
                rows[-1]["error"] = f"{type(error).__name__}: {error}"
        if images:
            inputs = processor(images=list(images.values()), text=[prompt] * len(images), **how)
            inputs = inputs.to(state.device, model.dtype)
            tokens = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False)
            answers = processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            for i, answer in zip(images, answers, strict=True):
                rows[i]["caption"] = answer.strip()
    part = path.with_suffix(f".{os.uname().nodename}.{os.getpid()}")  # one that was thought dead may run
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
    print(f"{path.name}: {len(rows)} rows, {sum('error' in row for row in rows)} unreadable", flush=True)
