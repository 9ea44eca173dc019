"""Serve a vision-language model twice, dense and pruned, and ask both about an image: answers, time to the first token.

    python examples/serve_and_ask.py --image photo.jpg --question "What is on the table?"
    python examples/serve_and_ask.py --image photo.jpg --method visionzip -- --device cuda --dtype bfloat16

What follows -- goes to both servers. Needs pip install "transformers[serving]"; both models are in memory at once.
"""

import argparse
import base64
import json
import mimetypes
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path


def start(stack: ExitStack, module: str, *arguments: str) -> str:
    """The address of a server that is ready; it ends with the stack, whatever happens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", module, "serve", *arguments, "--port", str(port)])
    stack.callback(server.kill)
    address = f"http://localhost:{port}"
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return address
        except OSError:  # not yet
            time.sleep(0.2)
    raise SystemExit("the server did not start")


def ask(address: str, body: dict) -> tuple[str, float]:
    """The streamed answer, and seconds until its first word came."""
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), head)
    words, first, begin = [], float("nan"), time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                choices = json.loads(line.removeprefix(b"data: "))["choices"]
                if word := choices[0]["delta"].get("content"):
                    first = first if words else time.perf_counter() - begin
                    words.append(word)
    return "".join(words).strip(), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="folder, or owner/name on the Hub")
    parser.add_argument("--image", required=True, type=Path, help="image file")
    parser.add_argument("--question", default="What is in this image?")
    parser.add_argument("--method", default="divprune", help="see hf-tokenprune list")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is asked; the median counts")
    parser.add_argument("server", nargs="*", help="options of transformers serve")
    args = parser.parse_args()
    url = f"data:{mimetypes.guess_type(args.image)[0]};base64,{base64.b64encode(args.image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": args.question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": args.model, "messages": messages, "stream": True, "temperature": 0, "max_tokens": 32}
    with ExitStack() as stack:
        servers = {
            "dense": start(stack, "transformers.cli.transformers", args.model, *args.server),
            args.method: start(stack, "hf_tokenprune.cli", args.model, "--method", args.method, *args.server),
        }
        asked = [{name: ask(address, body) for name, address in servers.items()} for _ in range(args.rounds + 1)]
    for name in servers:
        seconds = statistics.median(answers[name][1] for answers in asked[1:])  # the first warms up
        print(f"{name}: {asked[-1][name][0]}\n  first token after {seconds:.3f} s (median of {args.rounds})")


if __name__ == "__main__":
    main()
