"""What a vision-language model answers, dense against pruned on the same questions: exact match, kind by kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from hf_tokenprune.benchmark.medians import Quartiles, cell
from hf_tokenprune.errors import TokenPruneError, UnsupportedModelError
from hf_tokenprune.evaluation.loop import batches, in_dtype_of, place
from hf_tokenprune.evaluation.optional import require
from hf_tokenprune.evaluation.prompts import prompts
from hf_tokenprune.evaluation.questions import AskedSample, QuestionDataset, is_right
from hf_tokenprune.evaluation.report import paired_difference, speed_notes
from hf_tokenprune.evaluation.tables import aligned, filled, markdown, number, plain, with_interval
from hf_tokenprune.evaluation.turns import DENSE, Speed, Turns, Variants, check_names


@dataclass(frozen=True)
class Answers:
    """What a model answered to n questions, in their order.

    Attributes:
        texts: answers.
        seconds: time spent in ``generate``; of the slowest process for every batch of a distributed run. Times of two
            models that ran one after the other do not compare: `evaluate_answers` lets them take turns.
    """

    texts: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class ExactMatch:
    """Exact match of one run on the questions of a kind, or on all.

    Attributes:
        n: number of questions.
        accuracy: fraction of them answered right; see `is_right`.
        difference: to the dense run on the same questions, in percentage points; negative is a loss. None for that run.
        interval: 95 % interval of the difference, in percentage points; see `scores.paired_interval`. Questions about
            one image count as independent.
    """

    n: int
    accuracy: float
    difference: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class AnswersRow:
    """One run. Comparisons of the dense run with itself are None.

    Attributes:
        name: of the run; the first row is ``"dense"``.
        overall: all questions.
        kinds: exact match by kind of question; empty if no question says its kind.
        agreement: fraction of questions with the same answer as the dense run's, but for case and spaces.
        questions_per_second: through ``generate``; see `Speed.per_second`. None without timing.
        macs: multiply-adds of the prefill of a question, as given by the caller.
        speed_up: median over batches of the dense run's time over this one's, taken in turn. None where it cannot be
            told from noise, without timing, and of fewer than three full batches. Longer answers take longer.
        speed_up_quartiles: over batches.
        ideal_speed_up: MACs of the dense run over those of this one, if both were given.
    """

    name: str
    overall: ExactMatch
    kinds: dict[str, ExactMatch]
    questions_per_second: float | None = None
    agreement: float | None = None
    macs: float | None = None
    speed_up: float | None = None
    speed_up_quartiles: Quartiles | None = None
    ideal_speed_up: float | None = None


@dataclass(frozen=True)
class AnswersReport:
    """Rows of a dense and of pruned runs on the same questions, the dense one first.

    Attributes:
        rows: the runs.
    """

    rows: tuple[AnswersRow, ...]

    @classmethod
    def from_answers(
        cls,
        questions: QuestionDataset,
        dense: Answers,
        runs: Mapping[str, Answers],
        macs: Mapping[str, float] | None = None,
        speeds: Mapping[str, Speed] | None = None,
    ) -> "AnswersReport":
        """Compare ``runs`` with ``dense``; ``macs`` of the prefill and ``speeds`` by name, ``"dense"`` included.

        Raises:
            TokenPruneError: a run of another number of questions or called "dense", MACs of a run that there is not.
        """
        macs = macs or {}
        check_names(runs, macs)
        every = {DENSE: dense, **runs}
        for name, run in every.items():
            if len(run.texts) != len(questions):
                raise TokenPruneError(
                    f"run {name!r} has {len(run.texts)} answers to {len(questions)} questions; all must be answered"
                )
        right = {
            name: torch.tensor([is_right(*pair) for pair in zip(run.texts, questions.answers, strict=True)])
            for name, run in every.items()
        }
        members = {
            kind: torch.tensor([other == kind for other in questions.kinds])
            for kind in dict.fromkeys(questions.kinds)
            if kind is not None
        }

        def score(name: str, chosen: Tensor | slice) -> ExactMatch:
            hits = right[name][chosen]
            accuracy = float(hits.double().mean())
            if name == DENSE:
                return ExactMatch(len(hits), accuracy)
            return ExactMatch(len(hits), accuracy, *paired_difference(right[DENSE][chosen], hits))

        rows = []
        for name, run in every.items():
            compared = name != DENSE
            speed = (speeds or {}).get(name, Speed())
            same = [is_right(text, (other,)) for text, other in zip(run.texts, dense.texts, strict=True)]
            rows.append(
                AnswersRow(
                    name=name,
                    overall=score(name, slice(None)),
                    kinds={kind: score(name, chosen) for kind, chosen in members.items()},
                    questions_per_second=speed.per_second,
                    agreement=sum(same) / len(same) if compared else None,
                    macs=macs.get(name),
                    speed_up=speed.speed_up,
                    speed_up_quartiles=speed.speed_up_quartiles,
                    ideal_speed_up=macs[DENSE] / macs[name] if compared and {DENSE, name} <= set(macs) else None,
                )
            )
        return cls(tuple(rows))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``questions`` and ``rows`` with the fields and units of `AnswersRow`."""
        return {"questions": self.rows[0].overall.n, "rows": [plain(asdict(row)) for row in self.rows]}

    def summary(self) -> str:
        """The table as plain text, with what it rests on above and below."""
        return f"{self._caption()}\n\n{aligned(*self._table())}\n\n{self._notes()}"

    def to_markdown(self) -> str:
        """The same as Markdown."""
        return f"{self._caption()}\n\n{markdown(*self._table())}\n\n{self._notes()}"

    def _caption(self) -> str:
        return f"{self.rows[0].overall.n} questions, every run on the same ones. Exact match in %."

    def _notes(self) -> str:
        return (
            "[ ]: 95 % interval of the difference in percentage points, Bonett-Price for paired proportions; questions "
            "about one image count as independent. GMACs and ideal: prefill. "
            f"{speed_notes(self.rows, 'questions/s: generate() only, longer answers take longer')}"
        )

    def _table(self) -> tuple[list[str], list[list[str]]]:
        first = self.rows[0]
        columns: dict[str, Callable[[AnswersRow], str]] = {
            "run": lambda row: row.name,
            "all": lambda row: number(row.overall.accuracy, ".1f", 100),
            "vs dense": lambda row: with_interval(row.overall.difference, row.overall.interval, "+.1f"),
        }
        cells = {title: [cell(row) for row in self.rows] for title, cell in columns.items()}
        for kind in first.kinds:
            cells[kind] = [number(row.kinds[kind].accuracy, ".1f", 100) for row in self.rows]
        columns = {
            "agreement %": lambda row: number(row.agreement, ".1f", 100),
            "GMACs": lambda row: number(row.macs, ".3f", 1e-9),
            "questions/s": lambda row: number(row.questions_per_second, ".1f"),
            "speed-up": lambda row: cell(row.speed_up, row.speed_up_quartiles, ".2f"),
            "ideal": lambda row: number(row.ideal_speed_up, ".2f"),
        }
        return filled(cells | {title: [cell(row) for row in self.rows] for title, cell in columns.items()})


def evaluate_answers(
    model: nn.Module,
    questions: QuestionDataset,
    processor: Any,
    variants: Variants,
    macs: Mapping[str, float] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    prompt: str | None = None,
    accelerator: Any = None,
    progress: bool = True,
    processors: Mapping[str, Any] | None = None,
) -> AnswersReport:
    """Ask a vision-language model as it is and within each variant the same questions, in turn on every batch.

    Args:
        variants: name -> function that makes a context manager, in which ``model`` is changed: for example
            ``{"DivPrune": lambda: pruned(model, config)}``. It is entered anew for every batch.
        macs: multiply-adds of the prefill of ``"dense"`` and of the variants; any may be left out.
        processors: by name of a variant, what makes its inputs in place of ``processor``; see `resized`.

    The other arguments are those of `collect_answers`.

    Raises:
        TokenPruneError: see `AnswersReport.from_answers`; names are checked before anything runs. And what
            `collect_answers` raises.
    """
    check_names(variants, macs or {}, processors or {})
    every = {DENSE: processor, **(processors or {})}
    texts, turns, counts = _ask(
        model, questions, every, variants, batch_size, max_new_tokens, prompt, accelerator, progress, "answer"
    )
    slowest = turns.slowest()
    dense, *runs = ((name, Answers(tuple(own), sum(slowest[name]))) for name, own in texts.items())
    return AnswersReport.from_answers(questions, dense[1], dict(runs), macs, turns.speeds(counts))


def collect_answers(
    model: nn.Module,
    questions: QuestionDataset,
    processor: Any,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    prompt: str | None = None,
    accelerator: Any = None,
    progress: bool = True,
    desc: str = "answer",
) -> Answers:
    """Greedy answers of a vision-language model to all questions, in left-padded batches, on every process.

    The model runs in eval mode without gradients, in its own dtype, on the accelerator's device, where it stays; the
    training flags of its modules are put back. The first batch runs once more, untimed, before the clock starts.

    Args:
        model: has ``generate``.
        questions: what `load_questions` returns.
        processor: of the model, for images and texts: ``AutoProcessor.from_pretrained``.
        batch_size: questions per call of ``generate`` and process.
        max_new_tokens: of an answer.
        prompt: text with ``{}`` where the question goes and the model's image token; None: the processor's chat
            template, as one user turn.
        accelerator: an ``accelerate.Accelerator``; None makes one, which follows ``accelerate launch``.
        progress: show a bar on the main process.
        desc: what the bar calls this run.

    Raises:
        DataError: an image cannot be decoded; the message names it.
        TokenPruneError: a processor without a chat template and no ``prompt``, or one without ``{}``.
        UnsupportedModelError: the model does not generate.
        ImportError: `accelerate` is not installed.
    """
    texts, turns, _ = _ask(
        model, questions, {DENSE: processor}, {}, batch_size, max_new_tokens, prompt, accelerator, progress, desc
    )
    return Answers(tuple(texts[DENSE]), sum(turns.slowest()[DENSE]))


def _ask(
    model: nn.Module,
    questions: QuestionDataset,
    processors: Mapping[str, Any],
    variants: Variants,
    batch_size: int,
    max_new_tokens: int,
    prompt: str | None,
    accelerator: Any,
    progress: bool,
    desc: str,
) -> tuple[dict[str, list[str]], Turns, list[int]]:
    """Answers by arm, the turns with their times, and the number of questions in every batch of all processes."""
    accelerate = require("accelerate")
    answer: Any = getattr(model, "generate", None)
    if answer is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no generate(); load it with AutoModelForImageTextToText"
        )
    prompt_of = prompts(processors[DENSE], prompt)
    accelerator = accelerator or accelerate.Accelerator()

    def collate(samples: Sequence[AskedSample]) -> Any:
        given: dict[str, Any] = {
            "images": [sample["image"] for sample in samples],
            "text": [prompt_of(sample["question"]) for sample in samples],
            "padding": True,
            "padding_side": "left",  # every prompt ends where its answer begins
            "return_tensors": "pt",
        }
        return {name: dict(processor(**given)) for name, processor in processors.items()}

    loader = batches(questions, batch_size, collate, accelerator)
    place(model, accelerator)
    turns = Turns(model, variants, accelerator)
    counts: list[int] = []
    texts: dict[str, list[str]] = {name: [] for name in turns.arms}
    for batch in tqdm(loader, desc=desc, disable=not (progress and accelerator.is_main_process)):
        inputs = {name: in_dtype_of(model, made) for name, made in batch.items()}
        generate = partial(_generate, answer, inputs, max_new_tokens)
        if not counts:
            turns.warm_up(generate)
        for name, tokens in turns.take(generate).items():
            answers = processors[DENSE].batch_decode(tokens, skip_special_tokens=True)
            # Drops what was repeated to give every process a full last batch.
            own = accelerator.gather_for_metrics([text.strip() for text in answers], use_gather_object=True)
            texts[name] += own
        counts.append(len(own))
    return texts, turns, counts


def _generate(answer: Callable[..., Tensor], inputs: Mapping[str, dict[str, Tensor]], most: int, arm: str) -> Tensor:
    """New tokens of an arm: behind its own prompt, or behind that of the dense one."""
    given = inputs.get(arm, inputs[DENSE])
    return answer(**given, max_new_tokens=most, do_sample=False)[:, given["input_ids"].shape[1] :]
