"""What a push uploads of a folder; the Hub itself is in ``tests/test_hub.py``."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from hf_tokenprune import ConfigError
from hf_tokenprune.sharing.upload import files_of_model


def test_what_is_no_part_of_a_model_is_not_uploaded(tmp_path: Path) -> None:
    """A folder as a Trainer leaves it; and pickles, whatever they are called."""
    parts = {"config.json", "model.safetensors", "README.md", "openvino_model.bin", "notes.txt", "empty"}
    for name in parts:
        (tmp_path / name).write_bytes(b"" if name == "empty" else b"plain")
    with zipfile.ZipFile(tmp_path / "archive.npz", "w") as archive:
        archive.writestr("a.npy", b"numbers")
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "model.ckpt", "weights.safetensors"}
    for name in state:
        torch.save({"a": torch.ones(2)}, tmp_path / name)
    torch.save([1], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "data").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / ".hidden").write_text("")
    (tmp_path / "runs").mkdir()
    kept, left = files_of_model(tmp_path)
    assert {path.name for path in kept} == parts | {"archive.npz"}
    assert {path.name for path in left} == state | {"old.pt", "data", "trainer_state.json"}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "recovered.safetensors").write_bytes(b"of a few parameters")
    with pytest.raises(ConfigError, match=r"no weights in \*\.safetensors, .* save it anew"):
        files_of_model(tmp_path)
