"""The two examples that caption more than one machine can: what comes out is what one model says of every image alone,
and a run that is killed in the middle and started again neither loses a row nor has one twice."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hf_tokenprune import from_pretrained

from .llava_checkpoint import save_tiny_llava
from .two_processes import LAUNCH

datasets = pytest.importorskip("datasets")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUESTION = "what is in the image?"
SHARDS, ROWS = 5, 3
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


def pictures() -> dict[str, bytes]:
    """PNG files by name."""
    found = {}
    for i in range(SHARDS * ROWS):
        file = io.BytesIO()
        Image.merge("RGB", [Image.linear_gradient("L").rotate(24 * i), *[Image.radial_gradient("L")] * 2]).save(
            file, "PNG"
        )
        found[f"{i // ROWS}-{i % ROWS}"] = file.getvalue()
    return found


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    rows = [{"id": name, "image": {"bytes": data, "path": None}} for name, data in pictures().items()]
    features = datasets.Features(id=datasets.Value("string"), image=datasets.Image())
    for i in range(SHARDS):
        shard = datasets.Dataset.from_list(rows[i * ROWS :][:ROWS], features=features)
        shard.to_parquet(folder / f"{i:05d}.parquet")
    return folder


@pytest.fixture(scope="module")
def expected(llava: Path) -> dict[str, str]:
    """What the pruned model says of each image, alone."""
    model, processor = from_pretrained(llava, "divprune"), AutoProcessor.from_pretrained(llava)
    said = {}
    for name, data in pictures().items():
        inputs = processor(Image.open(io.BytesIO(data)), f"USER: <image>\n{QUESTION} ASSISTANT:", return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        said[name] = processor.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(set(said.values())) > 2, "images are told apart"
    return said


def arguments(llava: Path, out: Path) -> list[str]:
    given = {"--model": llava, "--question": QUESTION, "--new-tokens": 4, "--batch-size": 2, "--out": out}
    return [str(part) for pair in given.items() for part in pair]


def environment(**more: str) -> dict[str, str]:
    ours = {"PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, "ACCELERATE_USE_CPU": "true", **more}


def whole(command: list[str], **more: str) -> str:
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def killed(command: list[str], out: Path, **more: str) -> None:
    """Kill a command and all that it has started, without a warning, when the first files are there."""
    log = subprocess.DEVNULL
    process = subprocess.Popen(command, env=environment(**more), stdout=log, stderr=log)
    started: list[psutil.Process] = []
    try:
        end = time.monotonic() + 300
        while not list(out.glob("*.jsonl")):
            assert process.poll() is None and time.monotonic() < end, "it comes to write something"
            time.sleep(0.01)
    finally:
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for child in started:  # launched processes have sessions of their own
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(started, timeout=60)


def captions(out: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(out.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            yield row["key"], row["caption"]


def shards_in_two(*given: object) -> list[str]:
    return [sys.executable, *LAUNCH, str(EXAMPLES / "caption_shards.py"), *map(str, given)]


def test_processes_that_are_killed_and_started_again(
    llava: Path, parquet: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    command = shards_in_two(parquet, "--key", "id", *arguments(llava, tmp_path))
    killed(command, tmp_path)
    left = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    assert 0 < len(left) < SHARDS, "killed in the middle"
    printed = whole(command)
    assert sorted(captions(tmp_path)) == sorted(expected.items())
    done = [f"{i:05d}-of-{SHARDS:05d}.jsonl" for i in range(SHARDS)]
    again = [line.split(":")[0] for line in printed.splitlines()]
    assert sorted([*left, *again]) == done, "the two share what was left, and do nothing twice"
    assert all((tmp_path / name).stat().st_mtime_ns == time for name, time in left.items())


def test_shards_of_web_datasets_and_a_folder_of_images(llava: Path, expected: dict[str, str], tmp_path: Path) -> None:
    for name in ("tar", "folder"):
        (tmp_path / name).mkdir()
    for name, data in pictures().items():
        (tmp_path / "folder" / f"{name}.png").write_bytes(data)
        with tarfile.open(tmp_path / "tar" / f"{name[0]}.tar", "a") as shard:
            shard.add(tmp_path / "folder" / f"{name}.png", f"{name}.png")
    alone = [sys.executable, str(EXAMPLES / "caption_shards.py")]
    columns = ("--image", "png", "--key", "__key__")
    whole([*alone, str(tmp_path / "tar"), *columns, *arguments(llava, tmp_path / "of tar")])
    assert dict(captions(tmp_path / "of tar")) == expected
    out = tmp_path / "of folder"
    whole([*alone, str(tmp_path / "folder"), "--shards", "4", *arguments(llava, out)])
    assert [caption for _, caption in captions(out)] == list(expected.values())
    with pytest.raises(AssertionError, match="of data in other shards: give another folder"):
        whole([*alone, str(tmp_path / "folder"), "--shards", "3", *arguments(llava, out)])
    with pytest.raises(AssertionError, match="1 shards for 2 processes: give --shards"):
        whole(shards_in_two(tmp_path / "folder", *arguments(llava, tmp_path / "none")))


WITH_RAY = """
import runpy, sys, ray

ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ray_that_is_killed_and_started_again(
    llava: Path, parquet: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as short:  # it holds sockets
        example = (str(EXAMPLES / "caption_with_ray.py"), str(parquet), "--key", "id", "--gpus", "0")
        command = [sys.executable, "-c", WITH_RAY, short, *example, *arguments(llava, tmp_path)]
        killed(command, tmp_path, RAY_USAGE_STATS_ENABLED="0")
        left = list(tmp_path.glob("*.jsonl"))
        assert 0 < len(left) < SHARDS, "killed in the middle"
        printed = whole(command, RAY_USAGE_STATS_ENABLED="0")
    assert f"{ROWS * (SHARDS - len(left))} rows" in printed, "the others are left alone"
    assert sorted(captions(tmp_path)) == sorted(expected.items())
