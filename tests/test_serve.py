"""``transformers serve`` with a pruned vision-language model, asked over HTTP as its users do."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from typer.testing import CliRunner

from hf_tokenprune import ConfigError, DivPruneConfig, RandomConfig, disable_auto, enable_auto, prune
from hf_tokenprune.cli import app
from hf_tokenprune.demo.digits import MODEL_DIR
from hf_tokenprune.demo.mosaics import LLAVA_DIR, Mosaics, digit_pictures
from hf_tokenprune.demo.questions import MosaicQuestions
from hf_tokenprune.engine import current_config

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install hf-tokenprune[demo]")
pytest.importorskip("uvicorn", reason="pip install transformers[serving]")

RATIO = 0.03
CONFIG = DivPruneConfig(keep_ratio=RATIO)
NUMBER, NEW_TOKENS = 10, 6
Question = tuple[Image.Image, str]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a server with the packaged LLaVA, pruned; it is killed whatever happens."""
    options = ("-m", "divprune", "-s", f"keep_ratio={RATIO}", "--device", "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_tokenprune.cli", "serve", str(LLAVA_DIR), *options, "--port", str(port)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    address = f"http://localhost:{port}"
    process = subprocess.Popen(command, env=env)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, "the server ended; what it said is above"
            assert time.monotonic() < deadline, "the server did not start in five minutes"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    rows = MosaicQuestions(Mosaics(digit_pictures("test"), NUMBER))
    return [(row["image"], row["question"]) for row in (rows[5 * i + i % 5] for i in range(NUMBER))]


@pytest.fixture(scope="module")
def by_hand(questions: list[Question]) -> list[str]:
    """The answers of the pruned model called without a server, of which some are not those of the dense one."""
    model = AutoModelForImageTextToText.from_pretrained(LLAVA_DIR)
    processor = AutoProcessor.from_pretrained(LLAVA_DIR)
    dense = [generated(model, processor, *question) for question in questions]
    prune(model, CONFIG)
    answers = [generated(model, processor, *question) for question in questions]
    assert answers != dense
    return answers


def generated(model: PreTrainedModel, processor: Any, image: Image.Image, question: str) -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **how)
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(tokens, skip_special_tokens=True))


def post(address: str, question: Question, **options: Any) -> Any:
    image, text = question
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    body = {"model": str(LLAVA_DIR), "messages": [{"role": "user", "content": content}], "temperature": 0, **options}
    body["max_tokens"] = NEW_TOKENS
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", data, headers), timeout=60)


def ask(address: str, question: Question) -> str:
    with post(address, question) as response:
        return str(json.load(response)["choices"][0]["message"]["content"])


@pytest.mark.slow
def test_answers_are_those_of_the_model(address: str, questions: list[Question], by_hand: list[str]) -> None:
    assert [ask(address, question) for question in questions] == by_hand


@pytest.mark.slow
def test_requests_at_once_do_not_disturb_each_other(
    address: str, questions: list[Question], by_hand: list[str]
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda question: ask(address, question), 2 * questions, timeout=300))
    assert answers == 2 * by_hand


@pytest.mark.slow
def test_answers_are_streamed(address: str, questions: list[Question], by_hand: list[str]) -> None:
    for question, expected in zip(questions[:3], by_hand, strict=False):
        with post(address, question, stream=True) as stream:
            chunks = [json.loads(line.removeprefix(b"data: ")) for line in stream if line.startswith(b"data: {")]
        words = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
        assert "".join(words).split() == expected.split()


def said(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return result.stderr


def test_what_cannot_be_served_is_said_before_weights_are_read() -> None:
    assert "is no vision-language model" in said(MODEL_DIR)
    assert "static cache" in said(LLAVA_DIR, "-m", "divprune", "--compile")
    assert "works on vision encoders" in said(LLAVA_DIR, "-m", "tome")
    assert "serve takes one config, got 2" in said(LLAVA_DIR, "-m", "divprune", "-m", "fastv")


# -- what it is made of ----------------------------------------------------------------------------------------------


@pytest.fixture
def _auto() -> Iterator[None]:
    yield
    disable_auto()


@pytest.mark.usefixtures("_auto")
def test_a_config_for_all_that_is_loaded() -> None:
    load = AutoModelForImageTextToText.from_pretrained
    enable_auto({"method": "divprune", "keep_ratio": RATIO})
    assert current_config(load(LLAVA_DIR)) == CONFIG
    other = RandomConfig(keep_ratios=0.5)
    assert current_config(load(LLAVA_DIR, prune_config=other)) == other, "an argument says more"
    with pytest.raises(ConfigError, match="keep_ratio"):
        enable_auto({"method": "divprune", "keep_ratio": 3.0})
    enable_auto()
    assert current_config(load(LLAVA_DIR)) is None, "the last call counts"
    enable_auto(CONFIG)
    disable_auto()
    enable_auto()
    assert torch.is_tensor(load(LLAVA_DIR).lm_head.weight) and current_config(load(LLAVA_DIR)) is None
