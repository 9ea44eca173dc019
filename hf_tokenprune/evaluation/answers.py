"""Ask a vision-language model questions, dense and pruned in turn: its answers, and how far a pruned model is from the
dense one at every token of these."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from hf_tokenprune.errors import UnsupportedModelError
from hf_tokenprune.evaluation.answers_report import Answers, AnswersReport
from hf_tokenprune.evaluation.loop import batches, in_dtype_of, place
from hf_tokenprune.evaluation.optional import require
from hf_tokenprune.evaluation.prompts import prompts
from hf_tokenprune.evaluation.questions import AskedSample, QuestionDataset
from hf_tokenprune.evaluation.teacher_forcing import answer_logits, mean_kl, up_to_end
from hf_tokenprune.evaluation.turns import DENSE, Turns, Variants, check_names


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

    Behind each turn, untimed, every variant is fed the dense model's answers, for `AnswersRow.kl`. Logits are held of
    one batch and two runs.

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
    runs, turns, counts = _ask(
        model, questions, every, variants, batch_size, max_new_tokens, prompt, accelerator, progress, "answer"
    )
    dense = runs.pop(DENSE)
    return AnswersReport.from_answers(questions, dense, runs, macs, turns.speeds(counts))


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
    runs, _, _ = _ask(
        model, questions, {DENSE: processor}, {}, batch_size, max_new_tokens, prompt, accelerator, progress, desc
    )
    return runs[DENSE]


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
) -> tuple[dict[str, Answers], Turns, list[int]]:
    """Answers by arm, the turns with their times, and the number of questions in every batch of all processes."""
    accelerate = require("accelerate")
    if getattr(model, "generate", None) is None:
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
    kl: dict[str, list[float]] = {name: [] for name in variants}
    # Drops what was repeated to give every process a full last batch.
    gather = partial(accelerator.gather_for_metrics, use_gather_object=True)
    for batch in tqdm(loader, desc=desc, disable=not (progress and accelerator.is_main_process)):
        inputs = {name: in_dtype_of(model, made) for name, made in batch.items()}
        generate = partial(_generate, model, inputs, max_new_tokens)
        if not counts:
            turns.warm_up(generate)
        said = turns.take(generate)
        for name, tokens in said.items():
            answers = processors[DENSE].batch_decode(tokens, skip_special_tokens=True)
            own = gather([text.strip() for text in answers])
            texts[name] += own
        for name, distances in _distances(turns, model, inputs, said[DENSE]).items():
            kl[name] += gather(distances)
        counts.append(len(own))
    slowest = turns.slowest()
    runs = {
        name: Answers(tuple(own), sum(slowest[name]), tuple(kl[name]) if name in kl else None)
        for name, own in texts.items()
    }
    return runs, turns, counts


def _generate(model: Any, inputs: Mapping[str, dict[str, Tensor]], most: int, arm: str) -> Tensor:
    """New tokens of an arm: behind its own prompt, or behind that of the dense one."""
    given = inputs.get(arm, inputs[DENSE])
    tokens: Tensor = model.generate(**given, max_new_tokens=most, do_sample=False)
    return tokens[:, given["input_ids"].shape[1] :]


def _distances(
    turns: Turns, model: Any, inputs: Mapping[str, dict[str, Tensor]], answer: Tensor
) -> dict[str, list[float]]:
    """By variant, the KL of each question of a batch along the dense model's answer (B, L)."""
    variants = [name for name in turns.arms if name != DENSE]
    if not variants:
        return {}
    counts = up_to_end(model, answer)

    def say(arm: str) -> Tensor:
        return answer_logits(model, inputs.get(arm, inputs[DENSE]), answer, counts)

    dense = turns.run(DENSE, say)
    return {name: mean_kl(dense, turns.run(name, say), counts).tolist() for name in variants}
