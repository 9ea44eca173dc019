"""Dense against pruned answers to the same questions: exact match kind by kind, KL, their intervals, and tables."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tokenprune.benchmark.medians import Quartiles, cell
from hf_tokenprune.errors import TokenPruneError
from hf_tokenprune.evaluation.questions import QuestionDataset, is_right
from hf_tokenprune.evaluation.report import kl_interval, paired_difference, speed_notes
from hf_tokenprune.evaluation.tables import aligned, filled, markdown, number, plain, with_interval
from hf_tokenprune.evaluation.turns import DENSE, Speed, check_names


@dataclass(frozen=True)
class Answers:
    """What a model answered to n questions, in their order.

    Attributes:
        texts: answers.
        seconds: time spent in ``generate``; of the slowest process for every batch of a distributed run. Times of two
            models that ran one after the other do not compare: `evaluate_answers` lets them take turns.
        kl: of each question, KL(dense || this) of the next token in nats, mean over the tokens of the dense model's
            answer; see `teacher_forcing`. None: not measured.
    """

    texts: tuple[str, ...]
    seconds: float
    kl: tuple[float, ...] | None = None


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
        kl: mean over questions of `Answers.kl`, in nats; None where it was not measured.
        kl_interval: its 95 % interval, mean +- 1.96 sd / sqrt(n), cut at 0; None for a single question. Questions about
            one image count as independent.
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
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    macs: float | None = None
    speed_up: float | None = None
    speed_up_quartiles: Quartiles | None = None
    ideal_speed_up: float | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """What a model card says of this run: those that apply, by name."""
        values = {"exact_match": self.overall.accuracy, "agreement": self.agreement, "kl": self.kl}
        return {name: value for name, value in values.items() if value is not None}


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
            for what, found in (("answers", run.texts), ("values of KL", run.kl)):
                if found is not None and len(found) != len(questions):
                    raise TokenPruneError(
                        f"run {name!r} has {len(found)} {what} to {len(questions)} questions; all must be answered"
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
            kl = None if run.kl is None else torch.tensor(run.kl, dtype=torch.float64)
            rows.append(
                AnswersRow(
                    name=name,
                    overall=score(name, slice(None)),
                    kinds={kind: score(name, chosen) for kind, chosen in members.items()},
                    questions_per_second=speed.per_second,
                    agreement=sum(same) / len(same) if compared else None,
                    kl=None if kl is None else float(kl.mean()),
                    kl_interval=None if kl is None else kl_interval(kl),
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
            "about one image count as independent. KL(dense || run) of the next token in nats, mean over the tokens of "
            "the dense answer [95 %, normal]. GMACs and ideal: prefill. "
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
            "KL": lambda row: with_interval(row.kl, row.kl_interval, ".3g"),
            "GMACs": lambda row: number(row.macs, ".3f", 1e-9),
            "questions/s": lambda row: number(row.questions_per_second, ".1f"),
            "speed-up": lambda row: cell(row.speed_up, row.speed_up_quartiles, ".2f"),
            "ideal": lambda row: number(row.ideal_speed_up, ".2f"),
        }
        return filled(cells | {title: [cell(row) for row in self.rows] for title, cell in columns.items()})
