"""Training-free token pruning for Hugging Face Transformers.

>>> from hf_tokenprune import ZeroTPruneConfig, prune, unprune
>>> prune(model, ZeroTPruneConfig())  # in place  # doctest: +SKIP
>>> unprune(model)  # and back, bit for bit  # doctest: +SKIP
"""

from .config import PruneConfig
from .engine import prune, pruned, unprune
from .errors import ConfigError, PruneStateError, TokenPruneError, UnsupportedModelError
from .methods.ats import ATSConfig
from .methods.cls_attention import ClsAttentionConfig
from .methods.divprune import DivPruneConfig
from .methods.evit import EViTConfig
from .methods.exact import ExactConfig
from .methods.fastv import FastVConfig
from .methods.pitome import PiToMeConfig
from .methods.pyramiddrop import PyramidDropConfig
from .methods.random import RandomConfig
from .methods.salience_merge import SalienceMergeConfig
from .methods.stack import StackConfig
from .methods.tome import ToMeConfig
from .methods.transprune import TransPruneConfig
from .methods.uniform import UniformConfig
from .methods.visionzip import VisionZipConfig
from .methods.zero_tprune import ZeroTPruneConfig
from .presets import Preset, get_preset, list_presets
from .recording import record
from .registry import list_adapters, list_methods, register_adapter, register_method
from .sharing import disable_auto, enable_auto, from_pretrained, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "ATSConfig",
    "ClsAttentionConfig",
    "ConfigError",
    "DivPruneConfig",
    "EViTConfig",
    "ExactConfig",
    "FastVConfig",
    "PiToMeConfig",
    "Preset",
    "PruneConfig",
    "PruneStateError",
    "PyramidDropConfig",
    "RandomConfig",
    "SalienceMergeConfig",
    "StackConfig",
    "ToMeConfig",
    "TokenPruneError",
    "TransPruneConfig",
    "UniformConfig",
    "UnsupportedModelError",
    "VisionZipConfig",
    "ZeroTPruneConfig",
    "disable_auto",
    "enable_auto",
    "from_pretrained",
    "get_preset",
    "list_adapters",
    "list_methods",
    "list_presets",
    "prune",
    "pruned",
    "record",
    "register_adapter",
    "register_method",
    "save_pretrained",
    "unprune",
]
