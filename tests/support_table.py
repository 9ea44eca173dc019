"""The tables of methods and model families in docs/methods.md, made from the registries and the checks of the adapters.

``python -m tests.support_table`` writes them anew; a test compares.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from hf_tokenprune import PruneConfig, TokenPruneError
from hf_tokenprune.engine import find_adapter, options, plan
from hf_tokenprune.evaluation.tables import markdown
from hf_tokenprune.registry import get_method

from .decoder_families import FAMILIES as DECODERS
from .families import methods_for, supported_classes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
START, END = "<!-- made by `python -m tests.support_table` -->\n\n", "\n<!-- end -->"


def works(model: PreTrainedModel, config: PruneConfig) -> bool:
    adapter = find_adapter(model)
    try:
        adapter.check(model, plan(config, adapter.shape(model)), **options(config))
    except TokenPruneError:
        return False
    return True


def cell(models: Sequence[PreTrainedModel], config: PruneConfig) -> str:
    """What the default config of a method does on the model classes of a family."""
    found = [works(model, config) for model in models]
    if all(found):
        return "yes"
    if any(field.name == "exact_last_block" for field in dataclasses.fields(config)):
        plain = dataclasses.replace(config, exact_last_block=False)  # type: ignore[call-arg]
        if all(works(model, plain) for model in models):
            return "yes ²"
        if hasattr(plain, "salience") and all(
            works(model, dataclasses.replace(plain, salience="contrast")) for model in models
        ):
            return "yes ³"
    return "yes ¹" if any(found) else "no"


def table(kind: str, families: dict[str, list[PreTrainedModel]]) -> str:
    methods = methods_for(kind)
    rows = [
        [f"`{family}`", *(cell(models, get_method(name)()) for name in methods)] for family, models in families.items()
    ]
    return markdown(["family", *(f"`{name}`" for name in methods)], rows)


def tables() -> str:
    """Both tables, of models of their families' default sizes (without memory for weights)."""
    encoders: dict[str, list[PreTrainedModel]] = {}
    with torch.device("meta"):
        for family, cls in supported_classes():
            masked = {"mask_ratio": 0.0} if family == "vit_mae" else {}
            encoders.setdefault(family, []).append(cls(AutoConfig.for_model(family, **masked)))
        decoders = {name: [AutoModelForImageTextToText.from_config(AutoConfig.for_model(name))] for name in DECODERS}
    return f"{table('vision', encoders)}\n\n{table('decoder', decoders)}\n"


def parts() -> tuple[str, str, str]:
    """The page before the tables, the tables in it, and the rest."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    old, after = rest.split(END)
    return before, old, after


if __name__ == "__main__":
    before, _, after = parts()
    PAGE.write_text(before + START + tables() + END + after, encoding="utf-8")
