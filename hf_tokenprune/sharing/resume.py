"""Training with the stock ``Trainer``: a word where a checkpoint and what goes on from it are pruned differently."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import PruneConfig
from ..config_files import MODEL_CONFIG_NAME
from ..engine import current_config
from ..errors import UnsupportedModelError


class PruningCallback(TrainerCallback):
    """Warns when training begins with a model that is pruned otherwise than what it goes on from, or than it says.

    ``Trainer(..., callbacks=[PruningCallback()])``; after :func:`hf_tokenprune.enable_auto` every new ``Trainer`` has
    it. The checkpoint is that of ``args.resume_from_checkpoint``, else that of the step it goes on from in
    ``args.output_dir``.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = _pruned_by(model)
        carried = getattr(getattr(model, "config", None), "prune_config", None)
        if now is None and carried is not None:
            says = PruneConfig.from_dict(carried)
            warnings.warn(
                f"this model trains dense, but its config says that it is pruned by {says}, and so will "
                "what it saves; prune(model), or del model.config.prune_config",
                stacklevel=2,
            )
        if not state.global_step:
            return
        usual = f"{args.output_dir}/{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        files = [Path(folder) / MODEL_CONFIG_NAME for folder in (args.resume_from_checkpoint, usual) if folder]
        file = next((file for file in files if file.is_file()), None)
        if file is None:  # a checkpoint of adapters alone
            return
        key = json.loads(file.read_text(encoding="utf-8")).get("prune_config")
        then = None if key is None else PruneConfig.from_dict(key)
        if then != now:
            warnings.warn(
                f"training goes on from {file.parent} with a model that is pruned otherwise: it was {_words(then)}, "
                f"and is now {_words(now)}",
                stacklevel=2,
            )


def _words(config: PruneConfig | None) -> str:
    return "dense" if config is None else f"pruned by {config}"


def _pruned_by(model: Any) -> PruneConfig | None:
    """The config of a model or of the one inside PEFT's wrapper; None also for families without an adapter."""
    inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    try:
        return current_config(inner)
    except UnsupportedModelError:
        return None
