"""Methods × keep ratios × kinds of questions, for a LLaVA that train_mini_llava.py made: tables in Markdown and a CSV.

python examples/mini_llava_table.py --out demo_output/mini_llava_table --mosaics 200
python examples/mini_llava_table.py --model my_llava --pictures folder_with_cifar10 --out tables
"""

import argparse
import csv
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from mosaic_sources import load_pictures
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_tokenprune import pruned
from hf_tokenprune.cost import cost
from hf_tokenprune.demo.mosaics import LLAVA_DIR, TEST_SEED, Mosaics, Pictures, cells_of_several
from hf_tokenprune.demo.questions import KINDS, MosaicQuestions, ask
from hf_tokenprune.demo.run import decoder_configs
from hf_tokenprune.evaluation import (
    AnswersReport,
    QuestionDataset,
    evaluate_answers,
    is_right,
    load_questions,
    mean_text_tokens,
)

KEEP = (0.5, 0.33, 0.22, 0.11, 0.06)
CHANCE = {"what": 1 / 10, "where": 1 / 9, "count": 1 / 5, "compare": 1 / 90, "presence": 1 / 2}


def blind(questions: QuestionDataset, pictures: Pictures, n: int = 20_000) -> dict[str, float]:
    """Accuracy of the most frequent answer to the same words about other mosaics: what no blind model can beat."""
    answers: dict[str, Counter[str]] = {}
    for i in range(n):
        rng = np.random.default_rng((TEST_SEED + 1, i))
        cells = cells_of_several(rng)
        for kind in KINDS:
            question = ask(kind, cells, pictures, rng)
            answers.setdefault(question.text, Counter())[question.answer] += 1
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for text, right, kind in zip(questions.questions, questions.answers, questions.kinds, strict=True):
        hits[kind].append(is_right(answers[text].most_common(1)[0][0], right))
    return {kind: float(np.mean(found)) for kind, found in hits.items()}


def run_name(method: str, keep: float) -> str:
    return f"{keep:.0%} {method}"


def percent(parts: dict[str, float]) -> str:
    """One line."""
    return ", ".join(f"{name} {100 * part:.1f} %" for name, part in parts.items())


def markdown(report: AnswersReport, work: dict[str, float]) -> str:
    """Tables of methods × keep ratios: the decoder's work, all questions, and one for each kind of question."""
    dense, rows = report.rows[0], {row.name: row for row in report.rows}

    def with_interval(name: str) -> str:
        match = rows[name].overall
        low, high = match.interval or (0.0, 0.0)
        return f"{100 * match.accuracy:.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "\N{MINUS SIGN}")

    def table(title: str, cell: Callable[[str], str]) -> str:
        head = f"{title}\n\n| method | {' | '.join(f'{keep:.0%}' for keep in KEEP)} |\n|---|{'---:|' * len(KEEP)}\n"
        lines = [[method, *(cell(run_name(method, keep)) for keep in KEEP)] for method in decoder_configs(KEEP[0])]
        return head + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"

    text = table("Decoder work, % of dense:", lambda name: f"{100 * work[name]:.0f}")
    text += table(f"All questions (dense {100 * dense.overall.accuracy:.1f}):", with_interval)
    for kind in KINDS:
        title = f"`{kind}` (dense {100 * dense.kinds[kind].accuracy:.1f}):"
        text += table(title, lambda name, kind=kind: f"{100 * rows[name].kinds[kind].accuracy:.1f}")  # type: ignore[misc]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(LLAVA_DIR))
    parser.add_argument("--pictures", default="digits", help="or a folder with CIFAR-10 or a dataset like it")
    parser.add_argument("--mosaics", type=int, default=200, help="five questions each")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("demo_output/mini_llava_table"))
    args = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    pictures = load_pictures(args.pictures, "test")
    questions = load_questions(list(MosaicQuestions(Mosaics(pictures, args.mosaics))))
    text_tokens = mean_text_tokens(model, questions, processor)
    configs = {run_name(method, keep): c for keep in KEEP for method, c in decoder_configs(keep).items()}
    report = evaluate_answers(
        model,
        questions,
        processor,
        {name: partial(pruned, model, config) for name, config in configs.items()},
        batch_size=args.batch_size,
        max_new_tokens=8,
    )
    # The decoder's work alone: that of the vision tower, which is as large here, no method changes.
    dense = sum(layer.macs for layer in cost(model, text_tokens=text_tokens).dense.layers)
    work = {
        name: sum(layer.macs for layer in cost(model, config, text_tokens=text_tokens).pruned.layers) / dense
        for name, config in configs.items()
    }
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["run", "decoder work", "all", "difference", "low", "high", *KINDS])
        for row in report.rows:
            scores = [row.kinds[kind].accuracy for kind in KINDS]
            interval = [row.overall.difference or 0.0, *(row.overall.interval or (0.0, 0.0))]
            part = work.get(row.name, 1.0)
            table.writerow([row.name, *(f"{v:.4f}" for v in (part, row.overall.accuracy, *interval, *scores))])
    guesses = f"Chance: {percent(CHANCE)}. Best blind guess: {percent(blind(questions, pictures))}.\n"
    text = markdown(report, work) + guesses
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
