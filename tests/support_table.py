"""Tables in docs/ of what works on which family and what is refused, made from the registries and the adapters' checks.

``python -m tests.support_table`` writes them anew; a test compares.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from hf_tokenprune import PruneConfig, TokenPruneError
from hf_tokenprune.engine import find_adapter, options, plan
from hf_tokenprune.evaluation.tables import markdown
from hf_tokenprune.registry import get_adapter, get_method
from hf_tokenprune.signals import Stage

from .decoder_families import FAMILIES as DECODERS
from .decoder_families import Case, texts_of
from .families import methods_for, supported_classes

DOCS = Path(__file__).resolve().parents[1] / "docs"
START, END = "<!-- made by `python -m tests.support_table` -->\n\n", "\n<!-- end -->"


def refusal(model: PreTrainedModel, config: PruneConfig) -> str:
    """Why a model is not pruned by a config; empty where it is.

    The first sentence of the error, without what stands in brackets, what says which method it was, and advice: so that
    one reason has the same words for all methods.
    """
    adapter = find_adapter(model)
    stages: tuple[Stage, ...] = ()
    try:
        shape = adapter.shape(model)
        stages = plan(config, shape)
        adapter.check(model, stages, **options(config, shape))
    except TokenPruneError as error:
        whole = re.sub(r" \([^()]*\)", "", str(error)).partition(". ")[0]
        names = {type(config).__name__, *(stage.title for stage in stages)}
        clauses = [clause for clause in whole.split("; ") if not clause.startswith("use ")]
        return "; ".join(clause for clause in clauses if not names & set(clause.split())) or whole
    return ""


def works(model: PreTrainedModel, config: PruneConfig) -> bool:
    return not refusal(model, config)


def fitted(model: PreTrainedModel, method: str) -> PruneConfig:
    """The method's default where it works, else a config that fits few tokens too: tiles of some families have few."""
    default, case = get_method(method)(), Case(method)
    return default if works(model, default) or case.parts is not None else case.config(model)


# -- docs/methods.md -------------------------------------------------------------------------------------------------


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


def encoder_table() -> str:
    """Of models of their families' default sizes (without memory for weights)."""
    methods = methods_for("vision")
    encoders: dict[str, list[PreTrainedModel]] = {}
    with torch.device("meta"):
        for family, cls in supported_classes():
            masked = {"mask_ratio": 0.0} if family == "vit_mae" else {}
            encoders.setdefault(family, []).append(cls(AutoConfig.for_model(family, **masked)))
    header = ["family", *(f"`{name}`" for name in methods)]
    cells = {name: [cell(models, get_method(each)()) for each in methods] for name, models in encoders.items()}
    return f"{markdown(header, [[f'`{family}`', *row] for family, row in cells.items()])}\n"


# -- docs/vision_language_families.md -------------------------------------------------------------------------------


def stock_decoder(family: str) -> PreTrainedModel:
    """A vision-language model of its family's default sizes, without memory for weights."""
    config = AutoConfig.for_model(family)
    config.get_text_config().pad_token_id = None  # that of some defaults is no token of their vocabulary
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    return model


def decoder_table() -> str:
    """What each family can be, what is refused on it, and the reasons.

    Without methods that are made of others: these work where their parts do.
    """
    methods = [name for name in methods_for("decoder") if Case(name).parts is None]
    reasons: list[str] = []
    rows = []
    for family in DECODERS:
        model = stock_decoder(family)
        found = {f"`{name}`": refusal(model, fitted(model, name)) for name in methods}
        reasons += [reason for reason in dict.fromkeys(found.values()) if reason and reason not in reasons]
        refused = [f"{name} ({1 + reasons.index(reason)})" for name, reason in found.items() if reason]
        axes = get_adapter(family).position_axes
        rows.append(
            [
                f"`{family}`",
                ", ".join(f"`{text}`" for text in texts_of(family)),
                "renumbered or original" if axes == 1 else f"original, of {axes} axes",
                ", ".join(refused) or "none",
            ]
        )
    header = ["family", "language models", "positions", "refused"]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))
    return f"{markdown(header, rows).replace('---:', '---')}\n\n{notes}\n"


PAGES: dict[Path, Callable[[], str]] = {
    DOCS / "methods.md": encoder_table,
    DOCS / "vision_language_families.md": decoder_table,
}


def parts(page: Path) -> tuple[str, str, str]:
    """The page before the tables, the tables in it, and the rest."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    old, after = rest.split(END)
    return before, old, after


if __name__ == "__main__":
    for page, made in PAGES.items():
        before, _, after = parts(page)
        page.write_text(before + START + made() + END + after, encoding="utf-8")
