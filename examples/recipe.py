"""What the training scripts here share: optimisers, learning rate, sine positions, and checkpoints to go on from."""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, batch_size: int, test_size: int) -> None:
    """Options of a training on mosaics, with these defaults."""
    parser.add_argument("--pictures", default="digits", help="or a folder with CIFAR-10 or a dataset like it")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=batch_size, help="mosaics a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=float, default=0.05, help="part of the steps")
    parser.add_argument("--every", type=int, default=200, help="steps between tests and checkpoints")
    parser.add_argument("--test-size", type=int, default=test_size, help="test mosaics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", default="this machine", help="for the model card")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint beside the output folder")


def make_optimizers(
    parameters: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest: far fewer steps than AdamW for all."""
    matrices = [p for name, p in parameters if "layers." in name and p.ndim == 2]
    others = [p for name, p in parameters if "layers." not in name or p.ndim != 2]
    return [
        # With this adjustment a step is as large as AdamW's, so one learning rate suits both.
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay),
    ]


def lr_factor(done: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; ``done`` is the part of the steps taken."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def sine_positions(side: int, width: int) -> torch.Tensor:
    """(side², width): sines and cosines of the row, then of the column; about as large as patch embeddings at first."""
    frequencies = math.pi / side * 2 ** torch.linspace(-1, math.log2(side) - 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies  # (side, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)
    return 0.2 * torch.cat([rows, columns], dim=-1)


class Training:
    """Steps of optimisers with a checkpoint now and then; everything random is up to the step, so that a run that was
    interrupted goes on to the same weights.

    Args:
        modules: with the parameters.
        path: ``PATH.pt`` is the checkpoint, ``PATH.jsonl`` the log.
        steps: to take in all.
        lr, weight_decay, warmup: of both optimisers; the warm-up is a part of the steps.
        resume: go on from the checkpoint.
    """

    def __init__(
        self, modules: nn.Module, path: Path, steps: int, lr: float, weight_decay: float, warmup: float, resume: bool
    ) -> None:
        self.steps, self.path = steps, path
        self.optimizers = make_optimizers(
            [(n, p) for n, p in modules.named_parameters() if p.requires_grad], lr, weight_decay
        )
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step / steps, warmup))
            for optimizer in self.optimizers
        ]
        self.stateful: list[Any] = [modules, *self.optimizers, *self.schedulers]
        self.first, self.seconds = 0, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume:
            checkpoint = torch.load(path.with_suffix(".pt"), map_location="cpu")
            for part, state in zip(self.stateful, checkpoint["states"], strict=True):
                part.load_state_dict(state)
            self.first, self.seconds = checkpoint["step"], checkpoint["seconds"]
        else:
            path.with_suffix(".jsonl").write_text("", encoding="utf-8")

    def run(
        self, loss_of: Callable[[int], dict[str, torch.Tensor]], test: Callable[[], dict[str, float]], every: int
    ) -> Iterator[dict[str, float]]:
        """Take all steps; yield the log line, mean losses and what ``test`` found, of every ``every`` steps.

        Args:
            loss_of: maps the number of a step to its losses; their sum is descended.
            test: measures the model.
        """
        bar = tqdm(total=self.steps, initial=self.first, unit="step")
        sums: dict[str, float] = {}
        start = time.perf_counter()
        for step in range(self.first, self.steps):
            losses = loss_of(step)
            sum(losses.values(), torch.zeros(())).backward()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / every
            bar.update()
            if (step + 1) % every == 0 or step + 1 == self.steps:
                line = {"step": step + 1, **sums, **test()}
                self.seconds += time.perf_counter() - start
                line["minutes"] = self.seconds / 60
                sums, start = {}, time.perf_counter()
                states = [part.state_dict() for part in self.stateful]
                torch.save({"states": states, "step": step + 1, "seconds": self.seconds}, self.path.with_suffix(".pt"))
                with self.path.with_suffix(".jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps({key: round(value, 4) for key, value in line.items()}) + "\n")
                bar.write("  ".join(f"{key} {value:.4g}" for key, value in line.items()))
                yield line
        bar.close()
