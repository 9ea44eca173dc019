"""Wall-clock time of a vision-language model that answers prompts with one image: prefill, decode, end to end."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..cost import GenerationCostReport
from ..engine import find_adapter
from ..errors import UnsupportedModelError
from .medians import Quartiles, cell, decision_share, explained, over, shown
from .operations import count_operations
from .timing import Arms, Repeats, Timing, peak_bytes, seconds

PARTS = {"prefill": "prefill", "decode": "decode a token", "end_to_end": "end to end"}


@dataclass(frozen=True)
class GenerationRow:
    """One batch size. Seconds are for a whole batch.

    Attributes:
        prefill: one forward of images and prompts, vision tower included, to the logits of the last token: the time to
            the first new token.
        decode: mean time of every further one, between the first and the last token inside ``generate``.
        end_to_end: all of ``generate``, greedy.
        decision_share: median of (pruned - given) / dense of the prefill, the cost of choosing the tokens, where
            "given" drops as many tokens without choosing; None where it cannot be told from noise, see `medians`.
        decision_quartiles: its lower and upper quartile; None of too few rounds.
        dense_peak_bytes, pruned_peak_bytes: most memory held at once by tensors of one prefill (without the weights).
        dense_operations, pruned_operations: what one prefill dispatches, views not counted; see `operations`.
    """

    batch_size: int
    prefill: Timing
    decode: Timing
    end_to_end: Timing
    decision_share: float | None
    decision_quartiles: Quartiles | None
    dense_peak_bytes: int
    pruned_peak_bytes: int
    dense_operations: int
    pruned_operations: int


@dataclass(frozen=True)
class GenerationBenchmarkReport:
    """All batch sizes, beside what the MACs promise."""

    rows: tuple[GenerationRow, ...]
    macs: GenerationCostReport
    rounds: int
    environment: dict[str, Any]

    @property
    def ideal(self) -> dict[str, float]:
        """Speed-up of each part if time followed MACs. Decoding mostly waits for the weights instead."""
        dense, pruned = self.macs.dense, self.macs.pruned
        return {
            "prefill": self.macs.ideal_speedup,
            "decode": dense.decode_macs / pruned.decode_macs,
            "end_to_end": (dense.macs + dense.decode_macs) / (pruned.macs + pruned.decode_macs),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None for what cannot be told from noise."""
        rows = []
        for row in self.rows:
            timings = {part: (getattr(row, part), ideal) for part, ideal in self.ideal.items()}
            parts = {
                part: {**asdict(timing), "ideal": ideal, "of_ideal": over(timing.speedup, ideal)}
                for part, (timing, ideal) in timings.items()
            }
            rows.append({**asdict(row), **parts})
        return {"rows": rows, "macs": self.macs.to_dict(), "rounds": self.rounds, "environment": self.environment}

    def summary(self) -> str:
        """A table with three rows a batch size."""
        lines = [
            f"{'batch':>5}  {'part':<14}{'dense ms':>11}{'pruned ms':>11}{'speed-up':>21}"
            f"{'ideal':>7}{'of ideal':>10}{'decision':>24}{'peak memory MB':>17}{'operations':>15}"
        ]
        for row in self.rows:
            memory = f"{row.dense_peak_bytes / 1e6:.0f} -> {row.pruned_peak_bytes / 1e6:.0f}"
            operations = f"{row.dense_operations} -> {row.pruned_operations}"
            of_prefill = f"{cell(row.decision_share, row.decision_quartiles, '.1%'):>24}{memory:>17}{operations:>15}"
            for part, ideal in self.ideal.items():
                timing: Timing = getattr(row, part)
                lines.append(
                    f"{row.batch_size:>5}  {PARTS[part]:<14}{timing.dense_seconds * 1e3:>11.1f}"
                    f"{timing.pruned_seconds * 1e3:>11.1f}{cell(timing.speedup, timing.speedup_quartiles, '.2f'):>21}"
                    f"{ideal:>7.2f}{shown(over(timing.speedup, ideal), '.2f'):>10}"
                    f"{of_prefill if part == 'prefill' else ''}"
                )
        setting = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        legend = explained("".join(lines), self.rounds)
        lines.append(f"{self.macs.prompt}; {self.rounds} interleaved rounds; medians; {legend}; {setting}")
        return "\n".join(lines)


def measure_generation(
    arms: Arms,
    batch_size: int,
    text_tokens: int,
    new_tokens: int,
    image_size: tuple[int, int] | None,
    repeats: Repeats,
) -> GenerationRow:
    """One row: prefill and ``generate`` of every arm, on random prompts.

    Raises:
        UnsupportedModelError: the model cannot generate.
    """
    from transformers import GenerationConfig

    model = arms.model
    inputs = checked_inputs(model, batch_size, text_tokens, image_size)
    greedy = GenerationConfig(
        min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False, num_beams=1, pad_token_id=0
    )

    def prefill(**given: Tensor) -> None:
        model(**(given or inputs), use_cache=True, logits_to_keep=1)

    def measure() -> tuple[float, float, float]:
        clock = TokenClock()
        first = seconds(prefill)
        whole = seconds(lambda: model.generate(**inputs, generation_config=greedy, streamer=clock))
        return first, clock.seconds_per_token, whole

    measured = arms.interleave(measure, repeats, f"batch {batch_size}")
    prefills, decodes, wholes = ({arm: [run[i] for run in runs] for arm, runs in measured.items()} for i in range(3))
    share, share_quartiles = decision_share(**prefills)
    return GenerationRow(
        batch_size,
        prefill=Timing.of(prefills["dense"], prefills["pruned"]),
        decode=Timing.of(decodes["dense"], decodes["pruned"]),
        end_to_end=Timing.of(wholes["dense"], wholes["pruned"]),
        decision_share=share,
        decision_quartiles=share_quartiles,
        dense_peak_bytes=arms.run("dense", lambda: peak_bytes(prefill)),
        pruned_peak_bytes=arms.run("pruned", lambda: peak_bytes(prefill)),
        dense_operations=arms.run("dense", lambda: count_operations(prefill, inputs)),
        pruned_operations=arms.run("pruned", lambda: count_operations(prefill, inputs)),
    )


class TokenClock:
    """A streamer for ``generate`` that notes when each token is there. It is given the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by ``generate`` with tokens that are on the CPU, so that they are there on a GPU too."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by ``generate`` behind the last token."""

    @property
    def seconds_per_token(self) -> float:
        """Mean time from the first new token to the last."""
        _, first, *_, last = self.times
        return (last - first) / (len(self.times) - 2)


def checked_inputs(
    model: Any, batch_size: int, text_tokens: int, image_size: tuple[int, int] | None
) -> dict[str, Tensor]:
    """``random_inputs`` of a model that can answer them.

    Raises:
        UnsupportedModelError: the model cannot generate.
    """
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot generate; load the checkpoint with a class that has a language modelling "
            "head, such as AutoModelForImageTextToText"
        )
    return random_inputs(model, batch_size, text_tokens, image_size)


def random_inputs(
    model: Any, batch_size: int, text_tokens: int, image_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """What a processor makes of prompts with one image each, at random: text, image, text.

    Args:
        text_tokens: tokens of each prompt that are not of the image; one half stands in front of it.
        image_size: (height, width) in pixels, for families that take images of any size or cut them; None: a usual
            size.
    """
    adapter = find_adapter(model)
    shape = adapter.shape(model, image_size)
    generator = torch.Generator().manual_seed(0)
    placeholders = {kind: getattr(model.config, name) for kind, name in adapter.placeholders.items()}
    words = torch.tensor([token for token in range(shape.vocab_size) if token not in placeholders.values()])
    ids = words[torch.randint(len(words), (batch_size, text_tokens), generator=generator)]
    front = text_tokens // 2
    ids[:, front - 1] = ids[0, front - 1]  # what stands in front of an image is the same everywhere
    image = torch.full((batch_size, shape.image_tokens), placeholders["image"])
    input_ids = torch.cat([ids[:, :front], image, ids[:, front:]], dim=1)
    images = adapter.image_inputs(model, image_size, input_ids == placeholders["image"], generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in inputs.items()
    }
