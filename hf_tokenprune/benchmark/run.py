"""The benchmark of any model: which arms are timed, at which batch sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import get_args

import torch
from torch import nn

from ..cost import CostReport, GenerationCostReport, cost
from ..engine import ConfigLike, as_config, current_config
from ..errors import ConfigError
from .compiled import CompiledBenchmarkReport, CompileMode, measure_compiled
from .decoder import GenerationBenchmarkReport, measure_generation
from .timing import Arms, Repeats, dense, environment, settings
from .vision import BenchmarkReport, measure_images


def benchmark(
    model: nn.Module,
    config: ConfigLike | None = None,
    batch_sizes: Sequence[int] | None = None,
    rounds: int = 15,
    warmup: int = 2,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    image_size: tuple[int, int] | None = None,
    progress: bool = False,
    *,
    text_tokens: int | None = None,
    new_tokens: int | None = None,
    compile_mode: CompileMode | None = None,
    engine: str = "pytorch",
) -> BenchmarkReport | GenerationBenchmarkReport | CompiledBenchmarkReport:
    """Time ``model`` dense and pruned on random images, on the device it is on.

    Args:
        model: a model with an adapter; left as it was.
        config: None: the config the model is pruned with.
        batch_sizes: images a forward; None: 1, 8 and 32, of a vision-language model 1 and 4.
        rounds: measured rounds a batch size, each one run of every arm, after ``warmup`` unmeasured ones.
        threads: CPU threads, for the measurement only; None: as they are.
        dtype: None: the model's own; another one is measured on a copy.
        image_size: (height, width) in pixels; other than the checkpoint's own it needs ``interpolate_pos_encoding``,
            or a family that takes images of any size or cuts them into crops.
        progress: show a progress bar.
        text_tokens: vision-language models: tokens of each prompt besides those of its one image; None: 64.
        new_tokens: vision-language models: tokens to generate; None: 32.
        compile_mode: both models go through ``torch.compile`` in this mode: "default", or "reduce-overhead", which
            makes CUDA graphs. The forward of an encoder must be one graph; of a vision-language model the prefill is
            measured. Graphs compiled before are forgotten. None: neither model is compiled.
        engine: vision encoders: "onnxruntime" or "openvino" times dense and pruned exports of the model there.

    Returns:
        Of a vision encoder a ``BenchmarkReport``; of a vision-language model a ``GenerationBenchmarkReport``, which
        splits prefill, decode and end to end; with ``compile_mode`` a ``CompiledBenchmarkReport``.

    Raises:
        ConfigError: no config, or one that does not fit; counts that are too small, or have no effect on this model.
        UnsupportedModelError: the model cannot be pruned, or exported to the engine, or is a vision-language model
            without a head.
        ImportError: the engine is not installed.
    """
    config = current_config(model) if config is None else as_config(config)
    if config is None:
        raise ConfigError("this model is not pruned: give benchmark a config")
    macs = cost(model, config, image_size, text_tokens=text_tokens, new_tokens=new_tokens)
    if batch_sizes is None:
        batch_sizes = (1, 4) if isinstance(macs, GenerationCostReport) else (1, 8, 32)
    for name, counts in (("batch_sizes", batch_sizes), ("rounds", [rounds]), ("threads", [threads or 1])):
        if not counts or min(counts) < 1:
            raise ConfigError(f"{name}={counts}: expected numbers >= 1")
    if compile_mode not in (None, *get_args(CompileMode)):
        raise ConfigError(f"compile_mode={compile_mode!r}: expected one of {', '.join(get_args(CompileMode))}, or None")
    if compile_mode is not None and engine != "pytorch":
        raise ConfigError(f"engine={engine!r} runs exported files, which torch.compile has no part in; leave out one")
    if dtype is not None and dtype != next(model.parameters()).dtype:
        model = copy.deepcopy(model).to(dtype)
    repeats = Repeats(rounds, warmup, progress)
    if compile_mode is not None:
        text = macs.text_tokens if isinstance(macs, GenerationCostReport) else None
        with settings(model, threads), dense(model):
            where = {**environment(model), "compile": compile_mode}
            same = (text, image_size, repeats, compile_mode)
            compiled = (measure_compiled(model, config, batch_size, *same) for batch_size in batch_sizes)
            return CompiledBenchmarkReport(tuple(compiled), macs, rounds, where)
    with settings(model, threads), dense(model):
        arms, where = Arms(model, config), environment(model)
        if engine != "pytorch":
            from .engines import measure_exported  # export is above, and evaluation, which it needs, reads `medians`

            exported, version = measure_exported(arms, engine, batch_sizes, image_size, repeats)
            assert isinstance(macs, CostReport)  # other models are not exported
            return BenchmarkReport(tuple(exported), macs, rounds, where | {"engine": version})
        if isinstance(macs, GenerationCostReport):
            sizes = (macs.text_tokens, macs.new_tokens, image_size)
            generated = (measure_generation(arms, batch_size, *sizes, repeats) for batch_size in batch_sizes)
            return GenerationBenchmarkReport(tuple(generated), macs, rounds, where)
        rows = (measure_images(arms, batch_size, image_size, repeats) for batch_size in batch_sizes)
        return BenchmarkReport(tuple(rows), macs, rounds, where)
