"""Training with the stock ``Trainer``: every checkpoint says how its model was pruned, and a word where what goes on
from one is pruned differently."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import PruneConfig
from ..config_files import CONFIG_NAME, MODEL_CONFIG_NAME, read_other
from .adapters import pruned_by, save_beside_adapters, words

SAID = "prune_config"


class PruningCallback(TrainerCallback, ExportableState):
    """Warns when training begins with a model that is pruned otherwise than what it goes on from, or than it says.

    Beside the adapters of PEFT in a checkpoint, which has no config.json then, it writes ``prune_config.json``.

    ``Trainer(..., callbacks=[PruningCallback()])``; after ``hf_tokenprune.enable_auto`` every new ``Trainer`` has
    it. What the model was pruned by it writes into the state of the ``Trainer``, where it finds it wherever the
    checkpoint lies. A checkpoint of a ``Trainer`` without it is known only if it is that of
    ``args.resume_from_checkpoint``, or of the step that training goes on from in ``args.output_dir``: of
    ``train(resume_from_checkpoint=path)`` no callback is told the path.
    """

    model: Any = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint says in its ``trainer_state.json``."""
        now = pruned_by(self.model)  # recovered values may be trained on, and are in the checkpoint's weights
        return {"args": {}, "attributes": {SAID: None if now is None else now.with_recovery(None).to_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = pruned_by(model)
        carried = getattr(getattr(model, "config", None), "prune_config", None)
        if now is None and carried is not None:
            says = PruneConfig.from_dict(carried)
            warnings.warn(
                f"this model trains dense, but its config says that it is pruned by {says}, and so will "
                "what it saves; prune(model), or del model.config.prune_config",
                stacklevel=2,
            )
        self.model = model
        said = state.stateful_callbacks.setdefault(type(self).__name__, {})  # else Trainer cannot save
        if not state.global_step:
            return
        last = said[-1] if isinstance(said, list) else said  # a list: of several such callbacks
        attributes = last.get("attributes", {})
        folders = [Path(folder) for folder in (args.resume_from_checkpoint, _folder(args, state)) if folder]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if SAID in attributes:  # wherever the checkpoint lies
            where, key = _folder(args, state).name, attributes[SAID]
            then = None if key is None else PruneConfig.from_dict(key)
        elif folder is not None:
            where, then = str(folder), _said_in(folder)
        else:
            return
        if then != now:
            warnings.warn(
                f"training goes on from {where} with a model that is pruned otherwise: it was {words(then)}, "
                f"and is now {words(now)}",
                stacklevel=2,
            )

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and (folder := _folder(args, state)).is_dir():
            save_beside_adapters(model, folder)


def _folder(args: Any, state: Any) -> Path:
    """Where the ``Trainer`` puts the checkpoint of this step."""
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _said_in(checkpoint: Path) -> PruneConfig | None:
    """How the model of a checkpoint was pruned: of a whole one in its config.json, of adapters beside them."""
    whole = checkpoint / MODEL_CONFIG_NAME
    if whole.is_file():
        key = read_other(whole).get("prune_config")
        return None if key is None else PruneConfig.from_dict(key)
    return next((PruneConfig.read(file) for file in sorted(checkpoint.glob(f"**/{CONFIG_NAME}"))), None)
