"""The two examples that caption more than one machine can: what comes out is what one model says of every image alone,
and a run that is killed in the middle and started again neither loses a row nor has one twice."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
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
accelerate = pytest.importorskip("accelerate")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
QUESTION = "what is in the image?"
SHARDS, ROWS = 6, 2
BROKEN = "2-1"
"""One of the images is none."""
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
    found[BROKEN] = found[BROKEN][:100]
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
    said = dict.fromkeys(pictures(), "cannot be read")
    for name, data in pictures().items():
        if name != BROKEN:
            text = f"USER: <image>\n{QUESTION} ASSISTANT:"
            inputs = processor(Image.open(io.BytesIO(data)), text, return_tensors="pt")
            with torch.no_grad():
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            said[name] = processor.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(set(said.values())) > 3, "images are told apart"
    return said


def arguments(llava: Path, data: Path, out: Path, *more: object) -> list[str]:
    given = {"--model": llava, "--question": QUESTION, "--new-tokens": 4, "--batch-size": 2, "--out": out}
    return [str(data), *(str(part) for pair in given.items() for part in pair), *map(str, more)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run an example as a script in this process, where everything is imported already."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(name: str, given: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [name, *given])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    yield run
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def killed(command: list[str], out: Path) -> list[Path]:
    """Kill a command and all that it has started, without a warning, when the first files are there: these."""
    ours = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    log = subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *command], env={**os.environ, **ours}, stdout=log, stderr=log)
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
    left = sorted(out.glob("*.jsonl"))
    assert 0 < len(left) < SHARDS, "killed in the middle"
    return left


def captions(out: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(out.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            assert row.keys() == {"key", "caption" if "caption" in row else "error"}
            yield row["key"], row.get("caption", "cannot be read")


def test_processes_that_are_killed_and_started_again(
    llava: Path,
    parquet: Path,
    expected: dict[str, str],
    tmp_path: Path,
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments(llava, parquet, tmp_path, "--key", "id")
    left = killed([*LAUNCH, str(EXAMPLES / "caption_shards.py"), *given], tmp_path)
    times = [path.stat().st_mtime_ns for path in left]
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    for index in (1, 0):  # as two processes do, one after the other
        monkeypatch.setattr(accelerate.Accelerator, "process_index", index)
        run("caption_shards.py", given)
    assert sorted(captions(tmp_path)) == sorted(expected.items())
    printed = capsys.readouterr().out.splitlines()
    done = [f"{i:05d}-of-{SHARDS:05d}.jsonl" for i in range(SHARDS)]
    again = [line.split(":")[0] for line in printed]
    assert sorted([*(path.name for path in left), *again]) == done, "they share what was left, and do nothing twice"
    assert [path.stat().st_mtime_ns for path in left] == times
    assert done[2] not in again or f"{done[2]}: {ROWS} rows, 1 unreadable" in printed
    run("caption_shards.py", given)
    assert not capsys.readouterr().out, "nothing is left"


def test_shards_of_web_datasets_and_a_folder_of_images(
    llava: Path,
    expected: dict[str, str],
    tmp_path: Path,
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tar, folder, out = tmp_path / "tar", tmp_path / "folder", tmp_path / "out"
    tar.mkdir()
    folder.mkdir()
    for name, data in pictures().items():
        (folder / f"{name}.png").write_bytes(data)
        with tarfile.open(tar / f"{name[0]}.tar", "a") as shard:
            shard.add(folder / f"{name}.png", f"{name}.png")
    run("caption_shards.py", arguments(llava, tar, tmp_path / "of tar", "--image", "png", "--key", "__key__"))
    assert dict(captions(tmp_path / "of tar")) == expected
    given = arguments(llava, folder, out, "--shards", 3)
    run("caption_shards.py", given)
    assert [caption for _, caption in captions(out)] == list(expected.values())
    assert f"00002-of-00003.jsonl: {SHARDS * ROWS // 3} rows, 0 unreadable" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=f"{out} holds captions of .*folder.*, and this is .*tar.*another folder"):
        run("caption_shards.py", arguments(llava, tar, out, "--image", "png"))
    for other in (("--shards", 4), ("--shards", 3, "--question", "where?")):
        with pytest.raises(SystemExit, match="give another folder"):
            run("caption_shards.py", arguments(llava, folder, out, *other))
    monkeypatch.setattr(accelerate.Accelerator, "num_processes", 2)
    with pytest.raises(SystemExit, match="1 shards for 2 processes: give --shards"):
        run("caption_shards.py", arguments(llava, folder, tmp_path / "none"))


WITH_RAY = """
import runpy, sys, ray

ray.init(address=sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a cluster of this machine, which outlives what is killed."""
    ray = pytest.importorskip("ray")
    ours = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as short:
        for name, value in ours.items():
            patch.setenv(name, value)
        try:
            yield ray.init("local", num_cpus=2, include_dashboard=False, _temp_dir=short).address_info["gcs_address"]
        finally:
            ray.shutdown()


@pytest.mark.heavy
def test_ray_that_is_killed_and_started_again(
    llava: Path,
    parquet: Path,
    expected: dict[str, str],
    tmp_path: Path,
    cluster: str,
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = arguments(llava, parquet, tmp_path / "out", "--key", "id", "--gpus", 0)
    left = killed(["-c", WITH_RAY, cluster, str(EXAMPLES / "caption_with_ray.py"), *given], tmp_path / "out")
    run("caption_with_ray.py", given)
    unread = int(f"{BROKEN[0]:0>5}.jsonl" not in [path.name for path in left])
    printed = capsys.readouterr().out
    assert f"{ROWS * (SHARDS - len(left))} rows, {unread} unreadable" in printed, "the others are left alone"
    assert sorted(captions(tmp_path / "out")) == sorted(expected.items())
    with pytest.raises(SystemExit, match="give another folder"):
        run("caption_with_ray.py", [*given, "--question", "where?"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        run("caption_with_ray.py", [str(tmp_path / "empty"), "--out", str(tmp_path / "none")])
    assert "empty has no *.parquet" in capsys.readouterr().err and not (tmp_path / "none").exists()
