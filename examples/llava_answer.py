"""Answer a question about an image, dense and pruned: both answers, image tokens, time to the first token, cost.

    python examples/llava_answer.py --image photo.jpg --question "What is on the table?"
    python examples/llava_answer.py --image photo.jpg --method fastv --keep-ratio 0.25 --dtype bfloat16

Takes a vision-language checkpoint of any family that has an adapter, of the Hub or a folder.
"""

import argparse
import time
from functools import partial

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_tokenprune import PruneConfig, list_methods, pruned, record
from hf_tokenprune.cost import cost


def first_token_seconds(model, inputs, rounds: int = 3) -> float:
    """Best of a few: encoding the image, the prefill, and one new token."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, do_sample=False).tolist()  # a list: waits for the device
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder, or owner/name on the Hub")
    parser.add_argument("--image", required=True, help="image file")
    parser.add_argument("--question", default="What is in this image?")
    parser.add_argument("--method", default="divprune", choices=list_methods("decoder"))
    parser.add_argument("--keep-ratio", type=float, help="of the image tokens, for methods with one such number")
    parser.add_argument("--new-tokens", type=int, default=64, help="most tokens of an answer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: the checkpoint's")
    args = parser.parse_args()

    fields = {} if args.keep_ratio is None else {"keep_ratio": args.keep_ratio}
    config = PruneConfig.for_method(args.method, **fields)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype).to(args.device).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    content = [{"type": "image"}, {"type": "text", "text": args.question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(args.image).convert("RGB")
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(args.device, model.dtype)
    length = inputs.input_ids.shape[1]
    image_tokens = int((inputs.input_ids == model.config.image_token_id).sum())
    generate = partial(model.generate, **inputs, max_new_tokens=args.new_tokens, do_sample=False)

    def show(name: str, tokens: torch.Tensor) -> None:
        answer = processor.decode(tokens[0, length:], skip_special_tokens=True).strip()
        print(f"{name}: {answer}\n  first token after {first_token_seconds(model, inputs):.3f} s")

    show("dense", generate())
    with pruned(model, config):
        with record(model) as rec:
            tokens = generate()
        show(args.method, tokens)
    left = [f"{place}: {(kept >= 0).sum()}" for place, kept in rec.kept.items()]
    print(f"  image tokens {image_tokens} -> {', '.join(left)}")
    report = cost(model, config, text_tokens=length - image_tokens, new_tokens=args.new_tokens)
    print(f"counted for {report.image}:")
    print(f"  {report.ratio:.1%} of the prefill's multiply-adds (ideal speed-up {report.ideal_speedup:.2f}x)")
    print(f"  {report.decode_ratio:.1%} of those of a later token, {report.kv_ratio:.1%} of the cache")


if __name__ == "__main__":
    main()
