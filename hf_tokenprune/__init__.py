"""Training-free token pruning for Hugging Face Transformers.

>>> from hf_tokenprune import prune, unprune
>>> prune(model)  # in place, by what is best to begin with  # doctest: +SKIP
>>> unprune(model)  # and back, bit for bit  # doctest: +SKIP
>>> prune(model, "tome")  # or by any other of list_methods(), or a config of it  # doctest: +SKIP

Names are imported when they are first used: importing the package alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PruneConfig
    from .engine import prune, pruned, unprune
    from .errors import ConfigError, PruneStateError, TokenPruneError, UnsupportedModelError
    from .methods.ats import ATSConfig
    from .methods.cdpruner import CDPrunerConfig
    from .methods.cls_attention import ClsAttentionConfig
    from .methods.dart import DARTConfig
    from .methods.divprune import DivPruneConfig
    from .methods.evit import EViTConfig
    from .methods.evs import EvsConfig
    from .methods.exact import ExactConfig
    from .methods.fastv import FastVConfig
    from .methods.hiprune import HiPruneConfig
    from .methods.mmtok import MMTokConfig
    from .methods.pitome import PiToMeConfig
    from .methods.pyramiddrop import PyramidDropConfig
    from .methods.random import RandomConfig
    from .methods.salience_merge import SalienceMergeConfig
    from .methods.scope import ScopeConfig
    from .methods.sparsevlm import SparseVLMConfig
    from .methods.stack import StackConfig
    from .methods.tome import ToMeConfig
    from .methods.transprune import TransPruneConfig
    from .methods.uniform import UniformConfig
    from .methods.vidcom2 import VidCom2Config
    from .methods.visionzip import VisionZipConfig
    from .methods.vispruner import VisPrunerConfig
    from .methods.zero_tprune import ZeroTPruneConfig
    from .presets import Preset, get_preset, list_presets
    from .recording import record
    from .recovery import merge_recovery, recover
    from .registry import list_adapters, list_methods, register_adapter, register_method
    from .sharing import disable_auto, enable_auto, from_pretrained, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "ATSConfig",
    "CDPrunerConfig",
    "ClsAttentionConfig",
    "ConfigError",
    "DARTConfig",
    "DivPruneConfig",
    "EViTConfig",
    "EvsConfig",
    "ExactConfig",
    "FastVConfig",
    "HiPruneConfig",
    "MMTokConfig",
    "PiToMeConfig",
    "Preset",
    "PruneConfig",
    "PruneStateError",
    "PyramidDropConfig",
    "RandomConfig",
    "SalienceMergeConfig",
    "ScopeConfig",
    "SparseVLMConfig",
    "StackConfig",
    "ToMeConfig",
    "TokenPruneError",
    "TransPruneConfig",
    "UniformConfig",
    "UnsupportedModelError",
    "VidCom2Config",
    "VisPrunerConfig",
    "VisionZipConfig",
    "ZeroTPruneConfig",
    "disable_auto",
    "enable_auto",
    "from_pretrained",
    "get_preset",
    "list_adapters",
    "list_methods",
    "list_presets",
    "merge_recovery",
    "prune",
    "pruned",
    "record",
    "recover",
    "register_adapter",
    "register_method",
    "save_pretrained",
    "unprune",
]

_NAMES = {
    "config": ("PruneConfig",),
    "engine": ("prune", "pruned", "unprune"),
    "errors": ("ConfigError", "PruneStateError", "TokenPruneError", "UnsupportedModelError"),
    "methods.ats": ("ATSConfig",),
    "methods.cdpruner": ("CDPrunerConfig",),
    "methods.cls_attention": ("ClsAttentionConfig",),
    "methods.dart": ("DARTConfig",),
    "methods.divprune": ("DivPruneConfig",),
    "methods.evit": ("EViTConfig",),
    "methods.evs": ("EvsConfig",),
    "methods.exact": ("ExactConfig",),
    "methods.fastv": ("FastVConfig",),
    "methods.hiprune": ("HiPruneConfig",),
    "methods.mmtok": ("MMTokConfig",),
    "methods.pitome": ("PiToMeConfig",),
    "methods.pyramiddrop": ("PyramidDropConfig",),
    "methods.random": ("RandomConfig",),
    "methods.salience_merge": ("SalienceMergeConfig",),
    "methods.scope": ("ScopeConfig",),
    "methods.sparsevlm": ("SparseVLMConfig",),
    "methods.stack": ("StackConfig",),
    "methods.tome": ("ToMeConfig",),
    "methods.transprune": ("TransPruneConfig",),
    "methods.uniform": ("UniformConfig",),
    "methods.vidcom2": ("VidCom2Config",),
    "methods.visionzip": ("VisionZipConfig",),
    "methods.vispruner": ("VisPrunerConfig",),
    "methods.zero_tprune": ("ZeroTPruneConfig",),
    "presets": ("Preset", "get_preset", "list_presets"),
    "recording": ("record",),
    "recovery": ("merge_recovery", "recover"),
    "registry": ("list_adapters", "list_methods", "register_adapter", "register_method"),
    "sharing": ("disable_auto", "enable_auto", "from_pretrained", "save_pretrained"),
}
"""The same as above for those who run it: public names by the module that has them."""
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, or a module that has some, imported at its first use (PEP 562)."""
    if name in _MODULES:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value  # from now on without this function
        return value
    if name in {module.partition(".")[0] for module in _NAMES}:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
