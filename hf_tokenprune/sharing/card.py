"""Model cards: the ``README.md`` that the Hub shows, of a pruned checkpoint or of a config alone.

A card that is there keeps its text and what its metadata says; ours is the part between two marks, written anew by
each push.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, constants
from torch import nn

from ..config import PruneConfig
from ..config_files import CONFIG_NAME, is_path
from ..cost import cost
from ..engine import find_adapter
from ..errors import DOCS, ConfigError
from ..registry import list_methods
from .fit import fits

BEGIN = "<!-- hf_tokenprune: begin. Each push writes what follows anew; your own words are safe outside the marks. -->"
END = "<!-- hf_tokenprune: end -->"
HOME = "https://github.com/hf-tokenprune/hf_tokenprune"
TAGS = ("hf_tokenprune", "token-pruning")
EVALUATION = "### Evaluation"
SOURCE = "hf_tokenprune"
"""Results in the metadata that come from reports say so, so that those of another config go with it."""
CONFIG_ALONE = "hf_tokenprune"
"""``library_name`` of a repository without a model, until it has one."""
PIPELINES = {
    "image-classification": "AutoModelForImageClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-feature-extraction": "AutoModel",
}
"""Tasks of the Hub, with the auto class of their models; the first that has a model is its task."""


class Report(Protocol):
    """A report of ``hf_tokenprune.evaluation``: rows with a ``name`` and ``metrics``, the dense one first."""

    @property
    def rows(self) -> tuple[Any, ...]: ...

    def to_markdown(self) -> str: ...


def model_card(
    model: nn.Module,
    config: PruneConfig,
    repo_id: str,
    card: ModelCard | None = None,
    *,
    revision: str | None = None,
    tags: Iterable[str] = (),
    reports: Mapping[str, Report] | None = None,
) -> ModelCard:
    """The card of a checkpoint that carries a config.

    Args:
        model: pruned by it, or dense; only its config and sizes are read.
        repo_id: ``owner/name``, or the name of a folder.
        card: the one that is there; it is changed.
        revision: the branch that the card is for; None: main.
        tags: further ones.
        reports: of paired evaluations, by the data set that each is on: its name on the Hub, where it has one.

    Raises:
        ConfigError: a report has several pruned runs, and none is called by the method.
    """
    base, task = _base_model(model, repo_id), _task(model)
    results = [
        EvalResult(
            *(task or "other", dataset, dataset, metric, value),
            metric_name=metric.replace("_", " "),
            source_name=SOURCE,
            source_url=HOME,
        )
        for dataset, report in (reports or {}).items()
        for metric, value in row_of(report, config.method, dataset).metrics.items()
        if math.isfinite(value)
    ]
    known = {"base_model": base, "library_name": "transformers", "pipeline_tag": task}
    of_revision = f', revision="{revision}"' if revision else ""
    section = f"""## Token pruning

{_method(config)} prunes {_base_link(base)}.
The files are those of a stock checkpoint: Transformers alone loads it **dense**, with all tokens and no speed-up.
To have it pruned, `pip install hf-tokenprune` and

```python
import hf_tokenprune

model = hf_tokenprune.from_pretrained("{repo_id}"{of_revision})
```

It is used as the dense model is. `hf_tokenprune.unprune(model)` gives that one back, bit for bit, and after
`hf_tokenprune.enable_auto()` stock `from_pretrained` and `pipeline` prune too.

{_fields(config)}

{_cost(model, config)}"""
    tables = [f"On {dataset}: {report.to_markdown()}" for dataset, report in (reports or {}).items()]
    old = [] if card is None else card.data.get("eval_results", [])
    if card is not None and not reports and _fields(config) in card.text:  # of this very config, so it still holds
        tables = re.findall(f"{EVALUATION}\n\n(.*)\n{END}", card.text, re.DOTALL)
    else:
        old = [result for result in old if result.source_name != SOURCE]
    if tables:
        section += "\n\n".join(["", EVALUATION, *tables])
    card = _merged(card, repo_id, section, known, [*TAGS, config.method, *tags])
    if card.data.get("eval_results") or results:
        card.data["model_name"] = card.data.get("model_name", repo_id.rpartition("/")[2])
        card.data["eval_results"] = [*old, *results]
    return card


def config_card(
    config: PruneConfig,
    repo_id: str,
    card: ModelCard | None = None,
    *,
    revision: str | None = None,
    tags: Iterable[str] = (),
    beside: str | None = None,
) -> ModelCard:
    """The card of a repository that a config was pushed to. Arguments are those of ``model_card``.

    Args:
        beside: what the repository holds besides, in words ("model", "adapter of PEFT"); None: nothing.
    """
    there = f'"{repo_id}"' if revision is None else f'PruneConfig.from_pretrained("{repo_id}", revision="{revision}")'
    name = "PruneConfig, from_pretrained" if revision else "from_pretrained"
    alone = (
        "There is no model here, so Transformers alone can do nothing with this repository."
        if beside is None
        else f'It says how the {beside} of this repository is pruned: `hf_tokenprune.from_pretrained("{repo_id}")`.'
    )
    section = f"""## Token pruning config

A config of {_method(config)}, for any checkpoint it fits:
**{fits(config)}**. {alone}
`pip install hf-tokenprune` and

```python
from hf_tokenprune import {name}

model = from_pretrained("owner/checkpoint", {there})
```

A checkpoint that it does not fit is refused, before its weights are downloaded. On a model in memory:
`hf_tokenprune.prune(model, {there})`.

{_fields(config)}"""
    known = {"library_name": CONFIG_ALONE} if beside is None else {}
    return _merged(card, repo_id, section, known, [*TAGS, config.method, *tags])


def read_card(path: Path | None) -> ModelCard | None:
    """The card in a file, if there is one.

    Raises:
        ConfigError: its metadata cannot be read.
    """
    import yaml  # type: ignore[import-untyped]

    if path is None or not path.exists():
        return None
    try:
        return ModelCard.load(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not in UTF-8, so it is no model card; save it in that ({error})") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no model card that could be kept ({error}); mend its metadata") from error


def _merged(
    card: ModelCard | None,
    repo_id: str,
    section: str,
    known: Mapping[str, Any],
    tags: Iterable[str],
) -> ModelCard:
    """A card with the section in place of the one between its marks, or at its end. What its metadata says stays."""
    name = repo_id.rpartition("/")[2]
    card = card or ModelCard(f"---\n{{}}\n---\n\n# {name}\n")
    marked = f"{BEGIN}\n{section}\n{END}"
    begin, end = re.escape(BEGIN), re.escape(END)
    # Not from a mark whose end is lost: what follows it is the author's.
    text, found = re.subn(f"{begin}(?:(?!{begin}).)*?{end}", lambda _: marked, card.text, flags=re.DOTALL)
    card.text = text if found else f"{card.text.rstrip()}\n\n{marked}\n"
    for key, value in known.items():
        if value is not None and card.data.get(key) in (None, CONFIG_ALONE):
            card.data[key] = value
    before = card.data.get("tags", [])
    before = [before] if isinstance(before, str) else before
    stale = list_methods() if found else ()  # of the config that was here before
    card.data["tags"] = list(dict.fromkeys([*(tag for tag in before if tag not in stale), *tags]))
    return card


def _method(config: PruneConfig) -> str:
    return f"[hf_tokenprune]({HOME})'s method [`{config.method}`]({DOCS}/methods.md)"


def _base_link(base: str | None) -> str:
    return f"the tokens of [{base}](https://huggingface.co/{base})" if base else "the tokens of this model"


def _fields(config: PruneConfig) -> str:
    return f"`{CONFIG_NAME}`:\n\n```json\n{json.dumps(config.to_dict(), indent=2, sort_keys=True)}\n```"


def _cost(model: nn.Module, config: PruneConfig) -> str:
    """Tokens and multiply-adds, layer by layer."""
    try:
        report = cost(model, config)
    except ConfigError:  # of an image nothing leaves
        return "It prunes videos; what leaves depends on their frames."
    return f"What is left for one image, and its multiply-adds (MACs):\n\n```text\n{report.summary()}\n```"


def _base_model(model: Any, repo_id: str) -> str | None:
    """The repository that a model was loaded from, if it was one, and another.

    What looks like one may be a folder that was here: the Hub's cache has every repository that was loaded from.
    """
    name = str(model.config.name_or_path or "")
    if name.count("/") != 1 or is_path(name) or Path(name).exists() or name == repo_id:
        return None
    return name if Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}").is_dir() else None


def _task(model: Any) -> str | None:
    """What the Hub calls the task of a model, where it is known."""
    import transformers

    for task, auto in PIPELINES.items():
        classes = getattr(transformers, auto)._model_mapping.get(type(model.config), ())
        of_images = auto != "AutoModel" or find_adapter(model).shape(model).kind == "vision"
        if of_images and type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            return task
    return None


def row_of(report: Report, method: str, dataset: str) -> Any:
    """The row of the model that the card is of: the only pruned one, or the one called by the method.

    Raises:
        ConfigError: there is no telling.
    """
    pruned = {row.name: row for row in report.rows[1:]}
    if len(pruned) == 1:
        return next(iter(pruned.values()))
    if method not in pruned:
        raise ConfigError(
            f"the report on {dataset!r} has the pruned runs {', '.join(pruned)}, none of them called {method!r}: which "
            "is of this model cannot be told; give a report with its run alone"
        )
    return pruned[method]
