"""Two dictionaries, of methods and of model-family adapters, and how names get into them.

Modules of ``hf_tokenprune.methods`` and ``hf_tokenprune.adapters`` register on import and are discovered; another
package names a module in the entry point group ``hf_tokenprune`` and it is imported before the first look-up.
"""

import importlib
import pkgutil
import re
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import DOCS, ConfigError, TokenPruneError, UnsupportedModelError, did_you_mean, shown

T = TypeVar("T", bound=type[Any])

_METHODS: dict[str, Any] = {}
_ADAPTERS: dict[str, Any] = {}
_discovered: set[str] = set()


def register_method(name: str) -> Callable[[T], T]:
    """Class decorator: make a config class known as ``method: name`` (lower case, digits, underscores)."""

    _check_name("method", name)

    def register(config_class: T) -> T:
        _add(_METHODS, "method", name, config_class)
        config_class.method = name
        return config_class

    return register


def register_adapter(name: str) -> Callable[[T], T]:
    """Class decorator: make an adapter class responsible for models whose ``config.model_type`` is ``name``."""

    _check_name("adapter", name)

    def register(adapter_class: T) -> T:
        _add(_ADAPTERS, "adapter", name, adapter_class())
        return adapter_class

    return register


def get_method(name: str) -> Any:
    """The config class of a method; an unknown name raises ``ConfigError`` that lists the known ones."""
    if name not in list_methods():
        hint = did_you_mean(name, list_methods())
        raise ConfigError(f"method={shown(name)}: no such method (have: {', '.join(list_methods())}){hint}")
    return _METHODS[name]


def get_adapter(model_type: str) -> Any:
    """The adapter of a model family; an unknown one raises ``UnsupportedModelError`` that lists the known ones."""
    if model_type not in list_adapters():
        raise UnsupportedModelError(
            f"no adapter for model_type={model_type!r} (have: {', '.join(list_adapters())}). "
            f"Write one: {DOCS}/add_a_family.md"
        )
    return _ADAPTERS[model_type]


def list_methods(kind: str | None = None) -> list[str]:
    """Names of all registered methods, sorted; with ``kind`` of those that prune "vision" encoders, or the "decoder" of
    vision-language models."""
    _discover("methods")
    return sorted(name for name, config in _METHODS.items() if kind is None or kind in config.prunes)


def list_adapters() -> list[str]:
    """Names (``config.model_type``) of all registered model families, sorted."""
    _discover("adapters")
    return sorted(_ADAPTERS)


def _check_name(kind: str, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise TokenPruneError(f"{kind} name {name!r}: use lower-case letters, digits and underscores")


def _add(table: dict[str, Any], kind: str, name: str, entry: Any) -> None:
    if name in table:
        raise TokenPruneError(f"{kind} {name!r} is already registered ({table[name]!r}); choose another name")
    table[name] = entry


def _discover(kind: str) -> None:
    if kind in _discovered:
        return
    package = importlib.import_module(f"{__package__}.{kind}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.rpartition(".")[2].startswith("_"):
            importlib.import_module(module.name)
    _discovered.add(kind)
    if "plugins" in _discovered:
        return
    _discovered.add("plugins")
    for plugin in entry_points(group="hf_tokenprune"):
        try:
            plugin.load()
        except Exception as error:  # somebody else's package must not take this one down
            warnings.warn(f"plugin {plugin.value!r} of hf_tokenprune did not load: {error!r}", stacklevel=3)
