"""The example for lmms-eval: its model class in lmms-eval's own evaluator, on a task made here."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from hf_tokenprune import PruneConfig, prune, pruned

from .llava_checkpoint import save_tiny_llava
from .real_processors import model_of, processor_of
from .test_real_processors import picture

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "lmms_eval"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
with_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="pip install lmms-eval")

PICTURES = [picture(100, 90), picture(300, 200, 30), picture(90, 160, 60)]
QUESTIONS = ["what is this ?", "where is the red in the image ?", "what ?"]
TASK = """
task: photographs
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/test.parquet}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
UTILS = "def doc_to_visual(doc):\n    return [doc['image'].convert('RGB')]\n"


def save_task(folder: Path) -> None:
    """Three pictures with questions, as lmms-eval reads tasks."""
    datasets = pytest.importorskip("datasets")
    rows = {"image": PICTURES, "question": QUESTIONS, "answer": ["red"] * 3}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(str(folder / "test.parquet"))
    (folder / "photographs.yaml").write_text(TASK.format(folder=folder))
    (folder / "utils.py").write_text(UTILS)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """Imported under a name of its own: registering the model is all that importing it does."""
    spec = importlib.util.spec_from_file_location("hf_tokenprune_in_lmms_eval", FOLDER / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def loaded_from_memory(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Qwen2.5-VL and its processor, which cannot be loaded from a folder without torchvision."""

    def pruned_model(_: str, config: PruneConfig, **__: Any) -> torch.nn.Module:
        model = model_of("qwen2_5_vl")
        prune(model, config)
        return model

    monkeypatch.setattr(example, "from_pretrained", pruned_model)
    monkeypatch.setattr(example.AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: model_of("qwen2_5_vl"))
    monkeypatch.setattr(example.AutoProcessor, "from_pretrained", lambda *_: processor_of("qwen2_5_vl"))


def evaluated(model: Any, folder: Path) -> list[str]:
    """Answers in the order of the task, out of lmms-eval's evaluator."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False, model_name="hf_tokenprune")
    results = simple_evaluate(model, tasks=["photographs"], task_manager=tasks, process_docs_parallel=1)
    assert 0 <= results["results"]["photographs"]["exact_match,none"] <= 1
    samples = sorted(results["samples"]["photographs"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0] for sample in samples]


def expected(config: PruneConfig | None) -> list[str]:
    """Stock generate on every prompt alone."""
    model, processor = model_of("qwen2_5_vl").eval(), processor_of("qwen2_5_vl")
    answers = []
    for image, question in zip(PICTURES, QUESTIONS, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        if config is None:
            tokens = model.generate(**inputs, **how)
        else:
            with pruned(model, config):
                tokens = model.generate(**inputs, **how)
        (answer,) = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(answer.strip())
    return answers


@with_lmms_eval
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("method", [None, "divprune"])
def test_answers_are_those_of_each_prompt_alone(
    method: str | None, batch_size: int, example: Any, loaded_from_memory: None, tmp_path: Path, capsys: Any
) -> None:
    save_task(tmp_path)
    fields = {"keep_ratio": 0.3} if method else {}
    model = example.TokenPruned("any", method, batch_size=batch_size, device="cpu", **fields)
    config = PruneConfig.for_method(method, **fields) if method else None
    assert evaluated(model, tmp_path) == expected(config)
    assert ("image tokens of the first prompt" in capsys.readouterr().err) == (method is not None)


@with_lmms_eval
def test_resized(example: Any, loaded_from_memory: None, tmp_path: Path) -> None:
    save_task(tmp_path)
    model = example.TokenPruned("any", resize=0.5, batch_size=2, device="cpu")
    evaluated(model, tmp_path)
    usual, kept = model.processor.mean_tokens()
    assert 0 < kept <= 0.5 * usual


@with_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["prune_config=divprune,keep_ratio=0.22", "resize=0.33", "prune_config=stack"])
def test_its_command_line_with_a_llava(arguments: str, tmp_path: Path) -> None:
    save_task(tmp_path)
    llava = save_tiny_llava(tmp_path / "llava")
    command = [sys.executable, str(FOLDER / "run.py"), "--model", "hf_tokenprune", "--tasks", "photographs"]
    command += ["--include_path", str(tmp_path), "--batch_size", "2", "--device", "cpu", "--log_samples"]
    command += ["--model_args", f"pretrained={llava},{arguments}", "--output_path", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "photographs" in done.stdout and "exact_match" in done.stdout
    (found,) = tmp_path.glob("out/**/*samples*.jsonl")
    answers = [json.loads(line)["filtered_resps"] for line in found.read_text().splitlines()]
    assert [len(answer.split()) for answer in answers] == [4, 4, 4], "the tiny model never ends an answer early"
    if "divprune" in arguments:
        assert "image tokens of the first prompt: 576 -> {'entrance': 127}" in done.stderr


@with_lmms_eval
def test_what_is_not_supported_says_so(example: Any) -> None:
    model = object.__new__(example.TokenPruned)
    with pytest.raises(NotImplementedError, match="take those that generate answers"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="take those with one question"):
        model.generate_until_multi_round([])
    clip = [{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}]
    with pytest.raises(NotImplementedError, match="tasks with video are not supported"):
        example.images_of(clip)
    with pytest.raises(ValueError, match="keep_ratio: fields of a config go with the name of a method"):
        example.TokenPruned("any", keep_ratio=0.5)


@with_lmms_eval
@pytest.mark.parametrize(
    ("until", "answer"), [(None, "a.\n\nb #c"), ("#", "a.\n\nb"), (["\n\n", "#", "."], "a"), ([], "a.\n\nb #c")]
)
def test_where_an_answer_ends(until: Any, answer: str, example: Any) -> None:
    assert example.cut(" a.\n\nb #c\n", until) == answer


@with_lmms_eval
def test_chats_become_what_templates_take(example: Any, tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    parts = [{"type": "image", "url": str(tmp_path / "grey.png")}, {"type": "text", "text": "what ?"}]
    chat = [{"role": "user", "content": parts}]
    assert example.for_template(chat) == [{"role": "user", "content": [{"type": "image"}, parts[1]]}]
    assert [image.mode for image in example.images_of(chat)] == ["RGB"]


@with_lmms_eval
def test_the_tasks_of_the_page_exist() -> None:
    from lmms_eval.tasks import TaskManager

    (named,) = re.findall(r"^TASKS=(\S+)", README, flags=re.MULTILINE)
    assert set(named.split(",")) <= set(TaskManager().all_tasks)


@pytest.mark.slow
def test_without_lmms_eval_it_says_what_to_install() -> None:
    code = f"import runpy, sys; sys.modules['lmms_eval'] = None; runpy.run_path({str(FOLDER / 'run.py')!r})"
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "pip install lmms-eval" in done.stderr and "Traceback" not in done.stderr


def test_configs_of_the_page_can_be_made() -> None:
    found = re.findall(r"prune_config=(\w+)((?:,\w+=[\w.]+)*)", README)
    assert found
    for method, fields in found:
        values = dict(field.split("=") for field in fields.split(",") if field)
        PruneConfig.for_method(method, **{name: json.loads(value) for name, value in values.items()})
