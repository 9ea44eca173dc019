"""``hf-tokenprune push``: a pruned checkpoint, or a config alone, with a model card, on the Hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ..config import PruneConfig
from ..config_files import ADAPTER_CONFIG_NAME, CONFIG_NAME, MODEL_CONFIG_NAME
from ..errors import ConfigError
from .apply import one_config, push_folder, save_pruned
from .options import (
    ConfigOpt,
    JsonOpt,
    MacsOpt,
    MethodOpt,
    ModelArg,
    SetOpt,
    empty_model,
    load_dense,
    readable_errors,
    show,
)


@readable_errors
def push(
    model: ModelArg,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub, made if need be.")],
    method: MethodOpt = None,
    set_: SetOpt = None,
    gmacs: MacsOpt = None,
    prune_config: ConfigOpt = None,
    config_only: Annotated[bool, typer.Option("--config-only", help="Upload the config and no model.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch, made if need be; of a pull request the one that it is for.")
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """Upload a checkpoint with its prune config and a model card; who you are is told by `hf auth login` or HF_TOKEN.

    Of a folder that carries its config the files are uploaded as they are, without those in its folders, pickles and
    what a Trainer keeps beside the model.
    """
    from ..engine import prune
    from ..sharing.pretrained import choose_config
    from ..sharing.upload import check_repo_id, check_user

    folder, options = Path(model), (model, method, set_, gmacs, prune_config)
    if Path(repo_id).is_dir() and not folder.is_dir():
        raise ConfigError(
            f"{repo_id!r} is a folder and {model!r} is none: the folder comes first, then the repository, owner/name"
        )
    check_repo_id(repo_id)
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / MODEL_CONFIG_NAME).is_file():
        raise ConfigError(
            f"the folder {model!r} holds an adapter of PEFT: `hf upload {repo_id} {model}` uploads it, with its "
            f"{CONFIG_NAME}"
        )
    about: dict[str, Any] = {"private": private or None, "create_pr": create_pr, "revision": revision}
    named = method or gmacs or prune_config
    if config_only and not named and folder.is_dir() and not (folder / MODEL_CONFIG_NAME).exists():
        config = PruneConfig.from_pretrained(folder)
    else:
        empty = empty_model(model)
        carried = getattr(empty.config, "prune_config", None)
        as_it_is = not named and folder.is_dir() and choose_config(model, None, carried, {}) is not None
        config = one_config("push uploads", empty, *options)[1]
        prune(empty, config)  # refused here if it does not fit
    check_user()
    if config_only:
        commit = config.push_to_hub(repo_id, **about)
        url = commit.pr_url or str(commit)
    elif as_it_is:
        url = push_folder(folder, empty, config, repo_id, **about)
    else:
        loaded = load_dense(model, "cpu")
        with TemporaryDirectory() as out:
            save_pruned(model, loaded, config, Path(out))
            url = push_folder(Path(out), loaded, config, repo_id, **about)
    show(as_json, {"url": url, "config": config.to_dict()}, url)
