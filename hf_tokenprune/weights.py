"""Values of a few parameters that were trained with pruning on: the file they travel in, into a model, out of it.

A file is a ``.safetensors`` of tensors called like parameters. What stood in the model is kept in buffers beside the
parameters, which are no part of the ``state_dict`` and follow the model to a device, into a dtype and into a copy.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from .config_files import VALUES, check_size, read_beside
from .errors import ConfigError, UnsupportedModelError, did_you_mean, shown

if TYPE_CHECKING:  # help of the command line, and configs, do not wait for torch
    from torch import Tensor, nn

C = TypeVar("C", bound="Recoverable")
RECOVERY = "recovery"
"""What the key is called that names the file in a config."""
RECOVERY_NAME = f"recovered{VALUES}"
FILE_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_.-]{{0,99}}\{VALUES}")
SHA256 = re.compile(r"[0-9a-f]{64}")
ORIGINAL = "token_prune_original_"
"""How the buffers are called that hold what a parameter was, before its name."""
OF_PEFT = ".base_layer"
"""What PEFT puts into the name of a parameter under an adapter."""


@dataclass(frozen=True)
class Recovery:
    """A file of values, by name and hash.

    Attributes:
        file: its name, beside ``prune_config.json``.
        sha256: of its bytes, in hexadecimal digits.
        content: these bytes; None where it is only known what they would have to be.
    """

    file: str
    sha256: str
    content: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> Recovery:
        """The file of these values, each by the name of its parameter.

        Raises:
            ConfigError: they are too many for a file that would be read again.
        """
        from safetensors.torch import save

        content = save({name: value.detach().cpu().contiguous() for name, value in sorted(values.items())})
        check_size(len(content), RECOVERY_NAME, "recovered values: ")
        return cls(RECOVERY_NAME, hashlib.sha256(content).hexdigest(), content)

    @classmethod
    def from_dict(cls, data: Any) -> Recovery:
        """What a config says of the file.

        Raises:
            ConfigError: it says something else than a plain name of a ``.safetensors`` and a hash.
        """
        if not isinstance(data, dict) or set(data) != {"file", "sha256"}:
            raise ConfigError(f'recovery={shown(data)}: expected {{"file": ..., "sha256": ...}}, or leave it out')
        for name, form, words in (
            ("file", FILE_NAME, f"the name of a file beside the config, such as {RECOVERY_NAME!r}"),
            ("sha256", SHA256, "64 hexadecimal digits in lower case"),
        ):
            if not isinstance(data[name], str) or not form.fullmatch(data[name]):
                raise ConfigError(f"{name}={shown(data[name])} in recovery: expected {words}")
        return cls(data["file"], data["sha256"])

    def to_dict(self) -> dict[str, str]:
        """JSON values only."""
        return {"file": self.file, "sha256": self.sha256}

    def holding(self, content: bytes, where: object) -> Recovery:
        """The same with its bytes, read from ``where``.

        Raises:
            ConfigError: these are others.
        """
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise ConfigError(
                f"{where} is not the file that the config beside it names: its SHA-256 is {found}, expected "
                f"{self.sha256}. Nothing was loaded; download or copy both files again"
            )
        return Recovery(self.file, self.sha256, content)

    def at_hand(self) -> bytes:
        """The bytes.

        Raises:
            ConfigError: there are none.
        """
        if self.content is None:
            raise ConfigError(
                f"this config names recovered values in {self.file!r}, and was read without that file: give the folder "
                "or repository that holds both, such as prune(model, folder); config.with_recovery(None) does without"
            )
        return self.content

    def tensors(self) -> dict[str, Tensor]:
        """The values by the names of their parameters, on the CPU.

        Raises:
            ConfigError: the bytes are not at hand, no safetensors, or hold something else than finite numbers.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        content = self.at_hand()
        try:
            values: dict[str, Tensor] = load(content)
        except SafetensorError as error:
            raise ConfigError(f"{self.file!r} cannot be read ({error}); write it again") from error
        for name, value in values.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise ConfigError(f"{shown(name)} in {self.file!r}: expected finite floating point numbers")
        return values


class Recoverable:
    """What a config has besides its fields: values that a few parameters were given by training with it."""

    @property
    def recovery(self) -> Recovery | None:
        """The values that a few parameters were given by training with this config, if any (docs/recovery.md).

        They are not compared by ``==``, and a config that is made from this one, by ``dataclasses.replace`` or
        ``scaled``, has none: they were trained for this one.
        """
        found: Recovery | None = self.__dict__.get("_recovery")
        return found

    def with_recovery(self: C, recovery: Recovery | None) -> C:
        """The same config with these values, or without any."""
        config = copy.copy(self)
        object.__setattr__(config, "_recovery", recovery)
        return config

    def completed(self: C, path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> C:
        """This config, which ``path_or_repo`` holds, with the bytes of the values that it names.

        Raises:
            ConfigError: their file is not there, too large, or another one than the config names.
        """
        if self.recovery is None:
            return self
        path, content = read_beside(path_or_repo, self.recovery.file, **hub_kwargs)
        return self.with_recovery(self.recovery.holding(content, path))


def fitting(model: nn.Module, recovery: Recovery) -> dict[str, Tensor]:
    """The values of a file, by their names in this model, which is not changed.

    Raises:
        ConfigError: see ``Recovery.tensors``; a name or shape is not that of a parameter.
        UnsupportedModelError: a parameter is offloaded or sharded.
    """
    parameters = named(model)
    values = recovery.tensors()
    for name, value in values.items():
        if name not in parameters:
            raise ConfigError(
                f"{recovery.file!r} has {shown(name)}, which this {type(model).__name__} has not"
                f"{did_you_mean(name, parameters)}; it was made for another model"
            )
        if parameters[name].shape != value.shape:
            raise ConfigError(
                f"{name} in {recovery.file!r} has shape {tuple(value.shape)}, that of this {type(model).__name__} "
                f"{tuple(parameters[name].shape)}; it was made for another model"
            )
    check_at_hand(model, values)
    return values


def check_at_hand(model: nn.Module, names: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a parameter whose values are not whole in this process."""
    parameters, owners = named(model), _owners(model)
    for name in names:
        if hasattr(parameters[name], "device_mesh"):
            raise UnsupportedModelError(f"{name} is sharded: prune the model, with its recovered values, before it is")
        if parameters[name].is_meta and hasattr(owners[name][0], "_hf_hook"):
            raise UnsupportedModelError(
                f"{name} is offloaded, so recovered values cannot be put in: load the model without offloading, or "
                "merge them into a checkpoint first (hf_tokenprune.merge_recovery)"
            )


def put_in(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into parameters, in the dtype of these, and keep what they were.

    Args:
        values: what ``fitting`` returned.
    """
    import torch

    parameters, owners = named(model), _owners(model)
    kept = {id(getattr(module, attribute)) for module, attribute in _kept(model)}
    with torch.no_grad():
        for name, value in values.items():
            parameter, (module, attribute) = parameters[name], owners[name]
            if id(parameter) not in kept:  # of tied ones, by the first of their names
                kept.add(id(parameter))
                module.register_buffer(ORIGINAL + attribute, parameter.detach().clone(), persistent=False)
            parameter.copy_(value)


def take_out(model: nn.Module) -> None:
    """Write back what parameters were before ``put_in``, bit for bit."""
    import torch

    with torch.no_grad():
        for module, attribute in _kept(model):
            getattr(module, attribute).copy_(module._buffers[ORIGINAL + attribute])
    forget(model)


def forget(model: nn.Module) -> None:
    """Let the values that are in be the model's own."""
    for module, attribute in _kept(model):
        delattr(module, ORIGINAL + attribute)


def values_in(model: nn.Module) -> dict[str, Tensor]:
    """Of parameters that have others kept beside them, the values now: by name, not copied."""
    kept = {id(getattr(module, attribute)) for module, attribute in _kept(model)}
    own = model.named_parameters() if kept else ()
    return {name.replace(OF_PEFT, ""): value.detach() for name, value in own if id(value) in kept}


def originals(model: nn.Module) -> dict[str, Tensor]:
    """What parameters were before ``put_in``, by all their names in the ``state_dict``."""
    kept = {id(getattr(module, name)): module.get_buffer(ORIGINAL + name) for module, name in _kept(model)}
    every = model.named_parameters(remove_duplicate=False)
    return {name: kept[id(parameter)] for name, parameter in every if id(parameter) in kept}


def recovery_in(model: nn.Module, known: Recovery | None) -> Recovery | None:
    """The file of the values that are in; ``known``, where these are still its own; None: the model has none."""
    import torch

    values = values_in(model)
    if known is not None and known.content is not None:
        own = known.tensors()
        if own.keys() == values.keys() and all(torch.equal(values[k].cpu(), own[k].to(values[k].dtype)) for k in own):
            return known
    return Recovery.of(values) if values else None


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names that they have without adapters of PEFT; tied ones by each of their names."""
    every = model.named_parameters(remove_duplicate=False)
    return {name.replace(OF_PEFT, ""): parameter for name, parameter in every}


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """By the names of ``named``: the module that a parameter is in, and what it is called there."""
    return {
        f"{path}.{attribute}".lstrip(".").replace(OF_PEFT, ""): (module, attribute)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute in module._parameters
    }


def _kept(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where values are kept: modules, and the names of their parameters."""
    return [
        (module, name.removeprefix(ORIGINAL))
        for module in model.modules()
        for name in list(module._buffers)
        if name.startswith(ORIGINAL)
    ]
