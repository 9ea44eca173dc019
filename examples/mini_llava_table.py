"""Methods × keep ratios × kinds of questions, for a LLaVA that train_mini_llava.py made: tables in Markdown.

python examples/mini_llava_table.py --mosaics 100
python examples/mini_llava_table.py --mosaics 100 --layout sparse --rows random 'divprune*' resize
python examples/mini_llava_table.py --model my_llava --pictures folder_with_cifar10 --out demo_output/photographs

A row is measured once and kept in --out; what is there already is not measured again. So a run that was stopped goes
on, and several may share the folder, each with --rows of its own; one without --rows does the rest and prints all.
"""

import argparse
import dataclasses
import fnmatch
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from mosaic_sources import load_pictures
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_tokenprune import PruneConfig, UniformConfig, list_methods, pruned
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.mosaics import LLAVA_DIR, SIDE, TEST_SEED, Layout, Mosaics, Pictures, cells_of
from hf_tokenprune.demo.questions import KINDS_OF, MosaicQuestions, ask
from hf_tokenprune.demo.run import on_mini_llava
from hf_tokenprune.engine import find_adapter
from hf_tokenprune.errors import ConfigError
from hf_tokenprune.evaluation import (
    QuestionDataset,
    evaluate_answers,
    interpolated_positions,
    is_right,
    load_questions,
    mean_text_tokens,
    resized,
)
from hf_tokenprune.evaluation.tables import markdown

KEEP = (0.5, 0.33, 0.22, 0.11, 0.06)
CHANCE = {"what": 1 / 10, "where": 1 / 9, "count": 1 / 5, "compare": 1 / 90, "presence": 1 / 2}
SAME_CHOICE = {"positions", "newlines", "budget", "where", "exact_last_block", "restore", "keep_cls"}
SAME_CHOICE |= {"text", "direction", "softmax_over"}  # there is no text but the question; details of TransPrune
"""Fields with few values that do not change what a method looks for, or not here."""
MORE: dict[str, tuple[dict[str, Any], ...]] = {
    "random": ({"seed": 1}, {"seed": 2}),
    "dart": ({"layer": None},),
    "divprune": ({"centre": True, "features": "tower"},),
}
"""Further rows of methods, of fields with many values, or of several fields."""
RESIZE = "resize"


def rows_of(model: Any) -> dict[str, PruneConfig]:
    """Every method that prunes images, as by default, and with each other value of its fields that have few."""
    shape, found = find_adapter(model).shape(model), {}
    for method in list_methods("decoder"):
        usual = PruneConfig.for_method(method)
        names = [field.name for field in dataclasses.fields(usual) if field.name not in SAME_CHOICE]
        changed = list(MORE.get(method, ()))
        for name in names:
            try:
                others = [getattr(other, name) for other in usual.choices(name, shape)]
            except ConfigError:  # no field with few values
                continue
            changed += [{name: value} for value in others if value != getattr(usual, name)]
        for fields in ({}, *changed):
            config = on_mini_llava(dataclasses.replace(usual, **fields))
            if not all(stage.videos_only for stage in config.stages_for(shape)):
                found[" ".join([method, *(f"{name}={value}" for name, value in fields.items())])] = config
    return found


def blind(questions: QuestionDataset, pictures: Pictures, layout: Layout, n: int = 20_000) -> dict[str, float]:
    """Accuracy of the most frequent answer to the same words about other mosaics: what no blind model can beat."""
    answers: dict[str, Counter[str]] = {}
    kinds = KINDS_OF[layout]
    for i in range(n):
        rng = np.random.default_rng((TEST_SEED + 1, i))
        cells = cells_of(layout, rng)
        for kind in kinds:
            question = ask(kind, cells, pictures, rng)
            answers.setdefault(question.text, Counter())[question.answer] += 1
    hits: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for text, right, kind in zip(questions.questions, questions.answers, questions.kinds, strict=True):
        assert kind is not None
        hits[kind].append(is_right(answers[text].most_common(1)[0][0], right))
    return {kind: float(np.mean(found)) for kind, found in hits.items()}


def measure(
    model: Any, processor: Any, questions: QuestionDataset, config: PruneConfig | None, batch_size: int
) -> dict[str, Any]:
    """A row: the report of the dense model and of each ratio, and the part of the decoder's work that each is.

    Args:
        config: None: images of fewer pixels, whose work is that of as many tokens on a grid.
    """
    text_tokens = mean_text_tokens(model, questions, processor)
    if config is None:
        processors = {str(keep): resized(processor, keep) for keep in KEEP}
        kept = {keep: small.plan(SIDE, SIDE) for keep, small in processors.items()}
        configs = {keep: UniformConfig(keep_ratios=plan.kept / plan.usual) for keep, plan in kept.items()}
        arms: dict[str, Any] = dict.fromkeys(processors, partial(interpolated_positions, model))
    else:
        processors = {}
        configs = {str(keep): config.for_budget(model, keep=keep, text_tokens=text_tokens) for keep in KEEP}
        arms = {keep: partial(pruned, model, config) for keep, config in configs.items()}
    report = evaluate_answers(
        model,
        questions,
        processor,
        arms,
        batch_size=batch_size,
        max_new_tokens=8,
        progress=False,
        processors=processors,
    )
    # The decoder's work alone: that of the vision tower, which is as large here, few methods change.
    dense = sum(layer.macs for layer in cost(model, text_tokens=text_tokens).dense.layers)
    costs = {keep: cost(model, config, text_tokens=text_tokens).pruned for keep, config in configs.items()}
    work = {keep: sum(layer.macs for layer in found.layers) / dense for keep, found in costs.items()}
    return {"work": work, **report.to_dict()}


def tables(rows: Mapping[str, Mapping[str, Any]], kinds: tuple[str, ...]) -> str:
    """Of rows × keep ratios: the decoder's work, exact match of all questions, KL, and exact match of each kind."""
    runs = {name: {run["name"]: run for run in row["rows"]} for name, row in rows.items()}
    dense = next(iter(runs.values()))["dense"]

    def signed(interval: list[float]) -> str:
        return "[{:+.1f}, {:+.1f}]".format(*interval).replace("-", "\N{MINUS SIGN}")

    def table(title: str, cell: Callable[[str, str], str]) -> str:
        body = [[name, *(cell(name, str(keep)) for keep in KEEP)] for name in rows]
        return f"{title}\n\n{markdown(['method', *(f'{keep:.0%}' for keep in KEEP)], body)}\n\n"

    def match(name: str, keep: str) -> str:
        return f"{100 * runs[name][keep]['overall']['accuracy']:.1f} {signed(runs[name][keep]['overall']['interval'])}"

    def kl(name: str, keep: str) -> str:
        low, high = runs[name][keep]["kl_interval"]
        return f"{runs[name][keep]['kl']:.3f} ± {(high - low) / 2:.3f}"

    text = table("Decoder work, % of dense:", lambda name, keep: f"{100 * rows[name]['work'][keep]:.0f}")
    text += table(f"All questions (dense {100 * dense['overall']['accuracy']:.1f}):", match)
    text += table("KL(dense ‖ pruned) along the dense answers, nats:", kl)
    for kind in kinds:
        title = f"`{kind}` (dense {100 * dense['kinds'][kind]['accuracy']:.1f}):"
        text += table(title, lambda name, keep, kind=kind: f"{100 * runs[name][keep]['kinds'][kind]['accuracy']:.1f}")  # type: ignore[misc]
    return text


def percent(parts: dict[str, float]) -> str:
    """One line."""
    return ", ".join(f"{name} {100 * part:.1f} %" for name, part in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(LLAVA_DIR))
    parser.add_argument("--pictures", default="digits", help="or a folder with CIFAR-10 or a dataset like it")
    parser.add_argument("--mosaics", type=int, default=100, help="five questions each; three in the sparse layout")
    parser.add_argument("--layout", nargs="+", choices=get_args(Layout), default=get_args(Layout))
    parser.add_argument("--rows", nargs="+", default=["*"], help="names or patterns of rows; default: all")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("demo_output/mini_llava_table"))
    args = parser.parse_args()

    of_model = "packaged" if args.model == str(LLAVA_DIR) else args.model  # the same wherever the package lies
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    pictures = load_pictures(args.pictures, "test")
    every: dict[str, PruneConfig | None] = {**rows_of(model), RESIZE: None}
    chosen = {name: c for name, c in every.items() if any(fnmatch.fnmatchcase(name, part) for part in args.rows)}
    for layout in args.layout:
        questions = load_questions(list(MosaicQuestions(Mosaics(pictures, args.mosaics, layout=layout))))
        folder, rows = args.out / layout, {}
        folder.mkdir(parents=True, exist_ok=True)
        for name, config in chosen.items():
            file = folder / f"{name}.json"
            about = {"model": of_model, "pictures": args.pictures, "mosaics": args.mosaics}
            about["config"] = None if config is None else config.to_dict()
            if not file.exists() or json.loads(file.read_text(encoding="utf-8"))["about"] != about:
                row = measure(model, processor, questions, config, args.batch_size)
                file.write_text(json.dumps({"about": about, **row}, indent=1) + "\n", encoding="utf-8")
                print(f"measured {layout}: {name}", flush=True)
            rows[name] = json.loads(file.read_text(encoding="utf-8"))
        guesses = {kind: CHANCE[kind] for kind in KINDS_OF[layout]}
        text = tables(rows, KINDS_OF[layout])
        text += f"Chance: {percent(guesses)}. Best blind guess: {percent(blind(questions, pictures, layout))}.\n"
        (args.out / f"{layout}.md").write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
