"""Saving that is killed, or finds a full disk, a folder that cannot be written or links: what was there is whole."""

import copy
import errno
import os
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTForImageClassification

import hf_tokenprune
from hf_tokenprune import PruneConfig, RandomConfig, UniformConfig, prune, save_pretrained
from hf_tokenprune.engine import current_config

from .families import tiny_model

OLD, NEW = UniformConfig(layers=(2,), keep_ratios=0.5), RandomConfig(layers=(3,), keep_ratios=0.75)
SHARDED, WHOLE = {"max_shard_size": "50KB"}, {"max_shard_size": "50GB"}


def model_with(config: PruneConfig, shift: float = 0.0) -> Any:
    model = tiny_model("vit", ViTForImageClassification)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shift)
    return prune(model, config)


def same_weights(one: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def killed_at(step: int, folder: Path, save: Callable[[], Any]) -> bool:
    """Whether ``save``, in a process of its own, comes to the ``step``-th change of a file in ``folder``."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return os.WTERMSIG(status) == signal.SIGKILL
        assert status == 0
        return False
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
        if event == "open":
            changes = isinstance(args[1], str) and bool(set(args[1]) & set("wax+"))
        if changes and str(args[0]).startswith(str(folder)):
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    try:
        sys.addaudithook(watch)
        save()
    except BaseException:
        os._exit(1)
    os._exit(0)


def interrupted(folder: Path, make: Callable[[], Any], save: Callable[[], Any], stride: int = 1) -> Iterator[int]:
    """Each step of ``save`` at which it can be killed, after which ``folder`` is as that leaves it."""
    for step in range(0, 200, stride):
        make()
        if not killed_at(step, folder, save):
            assert step > 3, "it changed nothing"
            return
        yield step
    raise AssertionError("it never ends")


def test_a_config_is_the_former_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for _ in interrupted(tmp_path, lambda: OLD.save_pretrained(tmp_path), lambda: NEW.save_pretrained(tmp_path)):
        found.append(PruneConfig.from_pretrained(tmp_path))
    assert set(found) == {OLD, NEW}


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_weights_are_the_former_or_the_new_ones(stride: int, tmp_path: Path) -> None:
    """Of one file and with the same config there is nothing in between."""
    former, new = model_with(OLD), model_with(OLD, shift=1.0)
    make = partial(hf_tokenprune.save_pretrained, former, tmp_path)
    found = set()
    for _ in interrupted(tmp_path, make, partial(hf_tokenprune.save_pretrained, new, tmp_path), stride):
        loaded = hf_tokenprune.from_pretrained(tmp_path)
        matches = [same_weights(loaded, former), same_weights(loaded, new)]
        assert sum(matches) == 1
        found.add(matches[1])
    assert False in found


CHANGES = {
    "one file": (WHOLE, WHOLE),
    "other shards": (SHARDED, SHARDED),
    "to shards": (WHOLE, SHARDED),
    "from shards": (SHARDED, WHOLE),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("config", [OLD, NEW], ids=["same config", "other config"])
def test_a_checkpoint_is_the_former_or_the_new_one(change: str, config: PruneConfig, tmp_path: Path) -> None:
    """Or it says that it is neither: where files of two checkpoints would go together."""
    before, after = CHANGES[change]
    former, new = model_with(OLD), model_with(config, shift=1.0)
    states = set()

    def make() -> None:
        hf_tokenprune.save_pretrained(former, tmp_path, **before)

    for _ in interrupted(tmp_path, make, lambda: hf_tokenprune.save_pretrained(new, tmp_path, **after)):
        try:
            loaded = hf_tokenprune.from_pretrained(tmp_path)
        except (hf_tokenprune.ConfigError, OSError) as error:
            assert "prune_config.json says" in str(error) or "no file named" in str(error)
            continue
        matches = [same_weights(loaded, former), same_weights(loaded, new)]
        assert sum(matches) == 1, "weights of both"
        assert current_config(loaded) == (config if matches[1] else OLD)
        states.add(matches[1])
    assert states == {False, True}
    make()
    hf_tokenprune.save_pretrained(new, tmp_path, **after)
    assert same_weights(hf_tokenprune.from_pretrained(tmp_path), new)
    fresh = tmp_path / "fresh"
    hf_tokenprune.save_pretrained(new, fresh, **after)
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".saving-")}
    assert names - {"fresh"} == {path.name for path in fresh.iterdir()}, "something of the former one is left"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", [None, "a.b"])
def test_nothing_of_the_former_weights_is_left(change: str, variant: str | None, tmp_path: Path) -> None:
    """Nor anything missing: those of another variant stay."""
    before, after = CHANGES[change]
    hf_tokenprune.save_pretrained(model_with(OLD), tmp_path, variant="other", **SHARDED)
    others = {path.name for path in tmp_path.iterdir() if "other" in path.name}
    hf_tokenprune.save_pretrained(model_with(OLD), tmp_path, variant=variant, **before)
    hf_tokenprune.save_pretrained(model_with(NEW, 1.0), tmp_path, variant=variant, **after)
    hf_tokenprune.save_pretrained(model_with(NEW, 1.0), tmp_path / "fresh", variant=variant, **after)
    fresh = {path.name for path in (tmp_path / "fresh").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"fresh", *fresh, *others}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SAVE: dict[str, Callable[[Path], Any]] = {
    "config": NEW.save_pretrained,
    "checkpoint": lambda folder: hf_tokenprune.save_pretrained(model_with(NEW, 1.0), folder),
}


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_a_full_disk_leaves_what_was_there(save: Callable[[Path], Any], tmp_path: Path, monkeypatch: Any) -> None:
    hf_tokenprune.save_pretrained(model_with(OLD), tmp_path)
    before = listing(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device, while saving; no file there is half written") as error:
        save(tmp_path)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)
    assert listing(tmp_path) == before and not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)
def test_a_folder_that_cannot_be_written(save: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sealed = Path(folder)
        user = os.geteuid()
        sealed.chmod(0o555)
        try:
            if user == 0:  # who may write everywhere
                os.seteuid(65534)
            for target in (sealed, sealed / "new"):
                with pytest.raises(PermissionError, match="Permission denied, while saving") as error:
                    save(target)
                assert error.value.filename == str(target)
        finally:
            os.seteuid(user)
        assert not list(sealed.iterdir())
        sealed.chmod(0o755)


def test_links_are_replaced_and_linked_folders_followed(tmp_path: Path) -> None:
    """As in the Hub's cache, whose blobs other revisions share."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    hf_tokenprune.save_pretrained(model_with(OLD), blobs)
    before = listing(blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert current_config(hf_tokenprune.from_pretrained(link)) == OLD
    hf_tokenprune.save_pretrained(model_with(NEW, 1.0), link)
    assert listing(blobs) == before and link.is_symlink()
    assert current_config(hf_tokenprune.from_pretrained(snapshot)) == NEW
    assert not [path for path in snapshot.iterdir() if path.is_symlink()]


def test_modes_are_those_of_any_file(tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    former = os.umask(0o027)
    try:
        model_with(OLD).save_pretrained(stock)
        hf_tokenprune.save_pretrained(model_with(OLD), tmp_path / "ours")
        for path in (tmp_path / "ours").iterdir():
            expected = stat.S_IMODE((stock / path.name).stat().st_mode) if (stock / path.name).exists() else 0o640
            assert stat.S_IMODE(path.stat().st_mode) == expected
            path.chmod(0o604)
        hf_tokenprune.save_pretrained(model_with(OLD), tmp_path / "ours")
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ours").iterdir()} == {0o604}
    finally:
        os.umask(former)


def test_a_model_is_saved_over_the_files_that_it_was_loaded_from(tmp_path: Path) -> None:
    """Its weights may still be read from them."""
    hf_tokenprune.save_pretrained(model_with(OLD), tmp_path)
    model = hf_tokenprune.from_pretrained(tmp_path)
    expected = copy.deepcopy(model.state_dict())
    hf_tokenprune.save_pretrained(model, tmp_path)
    loaded = hf_tokenprune.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_files_of_others_stay(tmp_path: Path) -> None:
    """CTranslate2, for one, calls its weights so."""
    (tmp_path / "model.bin").write_bytes(b"of another library")
    save_pretrained(prune(tiny_model("vit", ViTForImageClassification), "tome"), tmp_path)
    assert (tmp_path / "model.bin").read_bytes() == b"of another library"


def test_processes_that_are_not_the_main_one_write_nothing(tmp_path: Path) -> None:
    save_pretrained(prune(tiny_model("vit", ViTForImageClassification), "tome"), tmp_path, is_main_process=False)
    assert not [*tmp_path.iterdir()]
