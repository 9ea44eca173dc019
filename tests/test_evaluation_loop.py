"""The evaluation loop on one process and on two, and the paired report."""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_tokenprune.errors import DataError, TokenPruneError, UnsupportedModelError
from hf_tokenprune.evaluation import (
    Logits,
    PairedReport,
    PreprocessedImages,
    collect_logits,
    evaluate_paired,
    load_images,
)

ROOT = Path(__file__).resolve().parents[1]


class Probe(nn.Module):
    """A classifier of 8 classes that writes down how it is called: logits are the grey value, to tell images apart."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout()
        self.offset = 0.0
        self.calls: list[dict] = []

    def forward(self, pixel_values):
        self.calls.append(
            {
                "greys": pixel_values.flatten(1).mean(1).round().int().tolist(),
                "modes": (self.training, self.frozen.training),
                "inference": torch.is_inference_mode_enabled(),
                "dtype": pixel_values.dtype,
            }
        )
        grey = pixel_values.flatten(1).mean(1, keepdim=True) * self.scale + self.offset
        return SimpleNamespace(logits=torch.cat([grey, torch.zeros(len(grey), 7, dtype=grey.dtype)], dim=1))


class Processor:
    """Pixels 0..255 as floats; counts the images it was given."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        self.seen += len(images)
        pixels = [torch.full((3, *image.size), float(image.getpixel((0, 0))[0])) for image in images]
        return {"pixel_values": torch.stack(pixels), "note": "not a tensor"}


def images_of(n: int, labels=None):
    labels = labels or [i % 8 for i in range(n)]
    return load_images([{"image": Image.new("RGB", (4, 4), (i, i, i)), "label": labels[i]} for i in range(n)])


def collect(model, images, **options):
    return collect_logits(model, images, Processor(), **{"batch_size": 4, "progress": False, **options})


@pytest.mark.parametrize("n", [1, 4, 10])
def test_logits_come_in_order(n):
    got = collect(Probe(), images_of(n))
    assert got.n == n
    assert got.logits[:, 0].tolist() == list(range(n))
    assert got.logits.shape == (n, 8)
    assert got.logits.dtype == torch.float32
    assert got.labels.tolist() == [i % 8 for i in range(n)]


def test_images_without_labels():
    assert collect(Probe(), images_of(3, [2, None, 1])).labels.tolist() == [2, -1, 1]
    assert collect(Probe(), images_of(2, [None, None])).labels is None


def test_first_batch_warms_up_and_only_forwards_are_timed(monkeypatch):
    """The clock moves by one in every forward and by 100 whenever an image is processed."""
    now = 0.0

    class Ticking(Probe):
        def forward(self, pixel_values):
            nonlocal now
            now += 1
            return super().forward(pixel_values)

    class Slow(Processor):
        def __call__(self, images, return_tensors):
            nonlocal now
            now += 100
            return super().__call__(images, return_tensors)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    model = Ticking()
    got = collect_logits(model, images_of(10), Slow(), batch_size=4, progress=False)
    assert [call["greys"] for call in model.calls] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert got.seconds == 3
    assert got.images_per_second == 10 / 3


def test_modes_are_put_back():
    model = Probe().train()
    model.frozen.eval()
    collect(model, images_of(5))
    assert {call["modes"] for call in model.calls} == {(False, False)}
    assert {call["inference"] for call in model.calls} == {True}
    assert (model.training, model.frozen.training) == (True, False)
    with pytest.raises(DataError):
        collect(model, images_of(1, [8]))
    assert (model.training, model.frozen.training) == (True, False)


def test_inputs_get_the_dtype_of_the_model():
    model = Probe().to(torch.bfloat16)
    assert collect(model, images_of(5)).logits.dtype == torch.float32
    assert {call["dtype"] for call in model.calls} == {torch.bfloat16}
    assert model.scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "shape_output",
    [lambda logits: logits, lambda logits: (logits, None), lambda logits: SimpleNamespace(logits=logits)],
    ids=["tensor", "tuple", "output"],
)
def test_models_of_other_shapes(shape_output):
    class Model(Probe):
        def forward(self, pixel_values):
            return shape_output(super().forward(pixel_values).logits)

    assert collect(Model(), images_of(3)).logits[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (
            SimpleNamespace(last_hidden_state=torch.zeros(1, 2)),
            "none in SimpleNamespace; load it with AutoModelForImage",
        ),
        (torch.zeros(1, 2, 3), r"found shape \(1, 2, 3\)"),
    ],
)
def test_models_without_logits(output, says):
    class Model(nn.Module):
        def forward(self, pixel_values):
            return output

    with pytest.raises(UnsupportedModelError, match=says):
        collect(Model(), images_of(1))


def test_labels_are_held_against_the_model_before_the_second_batch():
    model = Probe()
    with pytest.raises(DataError, match=r"item 9: label 8 is outside the model's 8 classes \(0\.\.7\)"):
        collect(model, images_of(10, [0] * 9 + [8]))
    assert len(model.calls) == 1


def test_number_of_classes_is_held_against_the_model(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    with pytest.raises(DataError, match=r"the images have 3 classes \(a, b, c, ...\), the model has 8.*labels.csv"):
        collect(Probe(), load_images(tmp_path))
    assert collect(Probe(), load_images(tmp_path, label_column=None)).labels is None


def test_nan_logits_are_an_error():
    model = Probe()
    with torch.no_grad():
        model.scale.fill_(math.nan)
    with pytest.raises(TokenPruneError, match="logits of 'ToMe' of 5 of 5 images are NaN"):
        collect(model, images_of(5), desc="ToMe")


def test_a_broken_image_is_named_and_the_next_run_is_whole(tmp_path):
    model = Probe()
    rows = [{"image": Image.new("RGB", (4, 4), (i, i, i)), "label": 0} for i in range(9)]
    with pytest.raises(DataError, match=r"cannot read item 6 \(.*\); delete or replace it"):
        collect(model, load_images([*rows[:6], {"image": b"damaged", "label": 0}, *rows[6:]]))
    assert collect(model, load_images(rows)).logits[:, 0].tolist() == list(range(9))


def test_processor_is_needed_and_must_make_one_size():
    with pytest.raises(TokenPruneError, match="processor is missing"):
        collect_logits(Probe(), images_of(1))
    images = load_images([{"image": Image.new("RGB", (4, width)), "label": 0} for width in (4, 5)])
    with pytest.raises(DataError, match=r"inputs of different sizes .*batch_size=1"):
        collect(Probe(), images)


def test_progress_can_be_silenced(capsys):
    collect(Probe(), images_of(2), progress=True, desc="my run")
    assert "my run" in capsys.readouterr().err
    collect(Probe(), images_of(2), progress=False, desc="my run")
    assert capsys.readouterr().err == ""


def test_a_real_model_and_processor_match_a_plain_loop():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=8
    )
    model, processor = ViTForImageClassification(config), ViTImageProcessor(size={"height": 32, "width": 32})
    pixels = torch.randint(0, 256, (7, 40, 50, 3), dtype=torch.uint8)
    images = load_images([{"image": picture.numpy(), "label": i} for i, picture in enumerate(pixels)])
    got = collect_logits(model, images, processor, batch_size=3, progress=False)
    model.eval()
    for i in range(7):
        with torch.no_grad():
            want = model(**processor(images=[Image.fromarray(pixels[i].numpy())], return_tensors="pt")).logits[0]
        torch.testing.assert_close(got.logits[i], want, rtol=1e-4, atol=1e-5)  # float32, batch of 1 against 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_model_moves_to_the_accelerator():
    model = Probe()
    got = collect(model, images_of(10))
    assert model.scale.device.type == "cuda"
    assert got.logits.device.type == got.labels.device.type == "cpu"
    assert got.logits[:, 0].tolist() == list(range(10))
    assert got.seconds > 0


# -- paired evaluation


@contextmanager
def shifted(model, offset):
    """A stand-in for ``pruned(model, config)``: the model is another one inside, and itself again after."""
    model.offset = offset
    try:
        yield model
    finally:
        model.offset = 0.0


def test_evaluate_paired_runs_each_variant_on_the_same_images():
    model, processor = Probe(), Processor()
    report = evaluate_paired(
        model,
        images_of(10, [0] * 5 + [1] * 5),
        processor,
        {"same": lambda: shifted(model, 0.0), "low": lambda: shifted(model, -100.0)},
        macs={"dense": 4e9, "low": 1e9},
        batch_size=4,
        progress=False,
    )
    dense, same, low = report.rows
    assert [row.name for row in report.rows] == ["dense", "same", "low"]
    assert (dense.n, report.labelled) == (10, 10)
    assert dense.accuracy == same.accuracy == 0.5  # class 0 for all: 0 ties with the others and is the lowest
    assert (same.accuracy_difference, same.agreement, same.kl) == (0.0, 1.0, 0.0)
    assert low.accuracy == 0.5  # class 1 for all
    assert low.agreement == 0.0
    assert (dense.macs, same.macs, low.macs) == (4e9, None, 1e9)
    assert (dense.ideal_speed_up, same.ideal_speed_up, low.ideal_speed_up) == (None, None, 4.0)
    assert dense.speed_up is None
    assert processor.seen == 10, "images are processed once for all runs"
    assert model.offset == 0.0
    assert len(model.calls) == 3 * 4


def test_evaluate_paired_lets_errors_through_and_restores_the_model():
    model = Probe()
    with pytest.raises(TokenPruneError, match="logits of 'broken' of 2 of 2"):
        evaluate_paired(model, images_of(2), Processor(), {"broken": lambda: shifted(model, math.nan)}, progress=False)
    assert model.offset == 0.0


@pytest.mark.parametrize(
    ("variants", "macs", "says"),
    [
        ({"dense": None}, None, "a run is called 'dense'"),
        ({"a": None}, {"b": 1.0}, r"macs of 'b', but the runs are \['dense', 'a'\]"),
    ],
)
def test_names_are_checked_before_anything_runs(variants, macs, says):
    model = Probe()
    with pytest.raises(TokenPruneError, match=says):
        evaluate_paired(model, images_of(2), Processor(), variants, macs)
    assert model.calls == []


def by_hand(labels=(0, 0, 1, -1)) -> PairedReport:
    """Four images of two classes, three of them labelled. ln 3 in the first logit is 3/4 against 1/4."""
    yes, no = [math.log(3.0), 0.0], [0.0, math.log(3.0)]
    labels = None if labels is None else torch.tensor(labels)
    dense = Logits(torch.tensor([yes, yes, no, no]), labels, seconds=2.0)
    run = Logits(torch.tensor([yes, no, no, no]), labels, seconds=1.0)
    return PairedReport.from_logits(dense, {"a|b": run}, {"dense": 1.5e9, "a|b": 1e9})


def test_report_by_hand():
    dense, run = by_hand().rows
    assert (dense.accuracy, dense.top5_accuracy) == (1.0, 1.0)
    assert run.accuracy == pytest.approx(2 / 3)
    assert run.accuracy_difference == pytest.approx(-100 / 3)
    # one of three lost, none gained: q = 1/5 and 2/5, d = -1/5, se = sqrt((3/5 - 1/25) / 5)
    half = 1.959964 * math.sqrt((3 / 5 - 1 / 25) / 5)
    assert run.accuracy_interval == pytest.approx((100 * (-1 / 5 - half), 100 * (-1 / 5 + half)), abs=1e-4)
    assert run.agreement == 0.75
    kl = 0.75 * math.log(3) - 0.25 * math.log(3)  # of the one image that changed sides
    assert run.kl == pytest.approx(kl / 4, rel=1e-6)
    sd = math.sqrt((3 * (kl / 4) ** 2 + (3 * kl / 4) ** 2) / 3)
    assert run.kl_interval == pytest.approx((0.0, kl / 4 + 1.959964 * sd / 2), rel=1e-6)  # below 0: cut
    assert (run.images_per_second, run.speed_up, run.ideal_speed_up) == (None, None, 1.5), "they took no turns"


def test_report_as_json():
    data = json.loads(json.dumps(by_hand().to_dict(), allow_nan=False))
    assert (data["images"], data["labelled"]) == (4, 3)
    assert data["rows"][0]["name"] == "dense"
    assert data["rows"][0]["kl"] is None
    assert data["rows"][1]["agreement"] == 0.75
    assert len(data["rows"][1]["accuracy_interval"]) == 2
    lost = Logits(torch.tensor([[0.0, -torch.inf]]), None, 1.0)  # KL of infinity, which JSON does not have
    report = PairedReport.from_logits(Logits(torch.zeros(1, 2), None, 1.0), {"lost": lost})
    assert report.rows[1].kl == math.inf
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["rows"][1]["kl"] is None


def test_report_as_text():
    lines = by_hand().summary().splitlines()
    assert lines[0] == "4 images (3 labelled), every run on the same ones."
    table = lines[2:5]
    assert len({len(line) for line in table}) == 1, "columns align"
    assert table[0].split("  ")[0] == "run  ".strip()
    assert table[1].split() == ["dense", "100.00", "-", "100.00", "-", "-", "1.500", "-"]
    assert table[2].split()[:3] == ["a|b", "66.67", "-33.33"]
    for title in ("top-1 %", "vs dense", "top-5 %", "agreement %", "KL", "GMACs", "ideal"):
        column = table[0].index(title) + len(title)
        assert all(len(line) == column or line[column] == " " for line in table), title


def test_report_as_markdown():
    lines = by_hand().to_markdown().splitlines()[2:6]
    rows = [line.replace("\\|", "/").strip("|").split("|") for line in lines if line]
    assert [len(row) for row in rows] == [8, 8, 8, 8]
    assert rows[1][0].strip() == "---"
    assert rows[3][0].strip() == "a/b"
    assert rows[3][1].strip() == "66.67"


def test_report_without_labels_leaves_their_columns_out():
    report = by_hand(labels=None)
    assert report.labelled == 0
    assert (report.rows[1].accuracy, report.rows[1].accuracy_difference, report.rows[1].agreement) == (None, None, 0.75)
    assert "top-1" not in report.summary()
    assert "Bonett" not in report.summary()
    assert "agreement" in report.summary()


def test_report_refuses_runs_of_other_images():
    dense = Logits(torch.zeros(2, 3), torch.tensor([0, 1]), 1.0)
    for other in (
        Logits(torch.zeros(2, 3), torch.tensor([0, 2]), 1.0),
        Logits(torch.zeros(2, 3), None, 1.0),
        Logits(torch.zeros(1, 3), torch.tensor([0]), 1.0),
    ):
        with pytest.raises(TokenPruneError, match=r"run 'a' has logits of shape .* must see the same images"):
            PairedReport.from_logits(dense, {"a": other})


# -- other processes

TWO_PROCESSES = """
import sys, time
import torch
from accelerate import Accelerator
from test_evaluation_loop import Probe, Processor, images_of, shifted
from hf_tokenprune.evaluation import PreprocessedImages, collect_logits, evaluate_paired

accelerator, out, result = Accelerator(), sys.argv[1], {}
assert accelerator.num_processes == 2
rank, now = accelerator.process_index, 0.0


def clock():  # a forward takes one second on the first process and two on the second
    global now
    now += rank + 1
    return now


time.perf_counter = clock
for n in (1, 3, 8, 11):
    model, processor = Probe(), Processor()
    got = collect_logits(model, images_of(n), processor, batch_size=4, progress=n == 11, desc=f"bar of {rank}")
    result[n] = (got.logits, got.labels, got.seconds, processor.seen)
model = Probe()
report = evaluate_paired(
    model, images_of(11), Processor(), {"low": lambda: shifted(model, -4.5)}, batch_size=1, progress=False,
    accelerator=Accelerator(),
)
result["report"] = report.to_dict()
torch.save(result, f"{out}/{rank}.pt")
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    # torchrun, because `accelerate launch --cpu` starts a single process unless it finds MPI.
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2"
    done = run_python(*launch.split(), str(script), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for n in (1, 3, 8, 11):
        alone = collect(Probe(), images_of(n))
        for logits, labels, seconds, _ in (first[n], second[n]):
            assert torch.equal(logits, alone.logits), n
            assert torch.equal(labels, alone.labels), n
            batches_of_each = math.ceil(n / 8)
            assert seconds == 2 * batches_of_each, "the slower process counts"
    assert first[11][3] < 11, "the processes share the images"
    assert "bar of 0" in done.stderr
    assert "bar of 1" not in done.stderr
    model = Probe()
    alone = evaluate_paired(
        model, images_of(11), Processor(), {"low": lambda: shifted(model, -4.5)}, batch_size=4, progress=False
    ).to_dict()
    speeds = {"images_per_second", "speed_up", "speed_up_quartiles"}
    for report in (first["report"], second["report"]):
        for row, want in zip(report["rows"], alone["rows"], strict=True):
            assert {k: v for k, v in row.items() if k not in speeds} == {
                k: v for k, v in want.items() if k not in speeds
            }
        assert report["rows"][1]["images_per_second"] == 2 / 2, "two images in the two seconds of the slower process"
        assert (report["rows"][1]["speed_up"], report["rows"][1]["speed_up_quartiles"]) == (1.0, [1.0, 1.0])
    assert 0 < alone["rows"][1]["agreement"] < 1, "the variant must be able to go wrong"


WITHOUT_EXTRA = """
import sys
for name in ("evaluate", "datasets", "accelerate"):
    sys.modules[name] = None  # what is not installed
from hf_tokenprune import evaluation

images = evaluation.load_images(sys.argv[1])
assert len(images) == 1
for use in (
    lambda: evaluation.TokenPruningMetric,
    lambda: evaluation.collect_logits(None, images, object()),
    lambda: evaluation.load_images("someone/something"),
):
    try:
        use()
    except ImportError as error:
        print(error)
"""


def test_without_the_extra_only_what_needs_it_fails(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    done = run_python("-c", WITHOUT_EXTRA, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line, package in zip(lines, ("datasets", "accelerate", "datasets"), strict=True):
        assert f"needs the package {package!r}" in line
        assert 'pip install "hf-tokenprune[eval]"' in line


@pytest.mark.slow
def test_import_is_light_and_names_are_there():
    code = (
        "import sys, hf_tokenprune; before = set(sys.modules); import hf_tokenprune.evaluation as e; "
        "print(sorted({'evaluate', 'datasets', 'accelerate', 'transformers'} & set(sys.modules) - before)); "
        "print([name for name in e.__all__ if getattr(e, name).__module__.split('.')[0] != 'hf_tokenprune'])"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_preprocessed_images_keep_labels():
    images = PreprocessedImages(images_of(2, [5, None]), Processor())
    assert [images[i]["label"] for i in range(2)] == [5, -1]
    assert set(images[0]["inputs"]) == {"pixel_values"}
