"""``hf-tokenprune apply``: a checkpoint that carries its config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import PruneConfig
from ..errors import ConfigError
from .options import (
    ConfigOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    SetOpt,
    configs_for,
    load_dense,
    new_folder,
    readable_errors,
    save_processor,
    show,
)
from .output import writable_folder


@readable_errors
def apply(
    model: ModelArg,
    out: Annotated[Path, typer.Argument(help="Folder to write to; must be new or empty.")],
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload it too; `push` does so with more options.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Write a copy of a checkpoint that carries its prune config (weights unchanged)."""
    from ..cost import cost
    from ..sharing.upload import check_repo_id, check_user

    if push is not None:
        check_repo_id(push)
        check_user()
    writable_folder(new_folder(out))
    loaded = load_dense(model, "cpu")
    name, config = one_config("apply writes", loaded, model, method, set_, gmacs, prune_config)
    save_pruned(model, loaded, config, out)
    report = cost(loaded)
    text = f"{out}: {name}, {report.dense.macs / 1e9:.3f} -> {report.pruned.macs / 1e9:.3f} GMACs an image"
    data = {"path": str(out), "config": config.to_dict(), **report.to_dict()}
    if push is not None:
        data["url"] = push_folder(out, loaded, config, push)
        text += f"\n{data['url']}"
    show(as_json, data, text)


def one_config(verb: str, *named: Any) -> tuple[str, PruneConfig]:
    """The config that the options name, with its label; ``named`` is for ``configs_for``.

    Raises:
        ConfigError: they name several.
    """
    variants = configs_for(*named)
    if len(variants) != 1:
        raise ConfigError(f"{verb} one config, got {len(variants)} ({', '.join(variants)}); choose one")
    return next(iter(variants.items()))


def save_pruned(path: str, loaded: Any, config: PruneConfig, out: Path) -> None:
    """Prune a model and write its checkpoint, with the processor of the one in ``path``."""
    from ..engine import prune
    from ..sharing import save_pretrained

    save_pretrained(prune(loaded, config), out)
    save_processor(path, loaded, out)


def push_folder(folder: Path, model: Any, config: PruneConfig, repo_id: str, **kwargs: Any) -> str:
    """Upload the files of a folder, not those in its folders; the address of the commit or pull request."""
    from ..sharing.saving import push_files
    from ..sharing.upload import files_of_model

    files, left = files_of_model(folder)
    if left:
        names = ", ".join(path.name for path in left)
        typer.secho(f"note: left out, pickles or no part of the model: {names}", fg=typer.colors.YELLOW, err=True)
    commit = push_files(files, model, config, repo_id, **kwargs)
    return commit.pr_url or str(commit)
