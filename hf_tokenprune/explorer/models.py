"""The models that the page has loaded, which all who look at it share."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from PIL import Image

from ..config import PruneConfig
from ..demo.digits import MODEL_DIR, load_digits_split
from ..demo.mosaics import CLIP_DIR, LLAVA_DIR, Mosaics, digit_pictures
from ..demo.run import on_mini_llava
from ..engine import default_config, find_adapter
from ..errors import TokenPruneError
from ..registry import get_method, list_methods

KEPT = 2
"""Models in memory at a time."""
AGAIN = 60
"""Seconds for which a model that could not be loaded is not tried again: the Hub may take half a minute to say no."""


@dataclass(frozen=True)
class Packaged:
    """A model that comes with the package, with images that it was made for."""

    folder: str
    images: Callable[[], Sequence[Image.Image]]
    question: str = ""
    class_names: tuple[str, ...] = ()
    fit: Callable[[PruneConfig], PruneConfig] = lambda config: config  # a default config, for so few layers


def digits() -> list[Image.Image]:
    """Of the test split."""
    split = load_digits_split("test")
    return [split[i]["image"] for i in (0, 3, 5, 11)]


def mosaics() -> list[Image.Image]:
    """Of test digits, crowded and sparse."""
    pictures = digit_pictures("test")
    return [Mosaics(pictures, 2, seed=0, layout=layout)[i].image for layout in ("crowded", "sparse") for i in (0, 1)]


PACKAGED = {
    "digits ViT": Packaged(str(MODEL_DIR), digits),
    "mini CLIP": Packaged(str(CLIP_DIR), mosaics, class_names=tuple(f"the {digit}" for digit in range(10))),
    "mini LLaVA": Packaged(str(LLAVA_DIR), mosaics, question="where is the 7 ?", fit=on_mini_llava),
}


@dataclass(frozen=True)
class Loaded:
    """A model with its processor. It is pruned in place for every look, so only who holds ``lock`` may run it."""

    model: Any
    processor: Any
    fit: Callable[[PruneConfig], PruneConfig]
    lock: Lock = field(default_factory=Lock, compare=False)

    @property
    def kind(self) -> str:
        """ "vision" or "decoder"."""
        return str(find_adapter(self.model).shape(self.model).kind)

    @property
    def methods(self) -> list[str]:
        """Those for models of its kind."""
        return [name for name in list_methods() if self.kind in get_method(name).prunes]

    @property
    def default(self) -> PruneConfig:
        """What ``prune`` takes by itself."""
        return default_config(self.model)

    def start(self, method: str) -> PruneConfig:
        """The config that somebody who chooses ``method`` starts from.

        Raises:
            ConfigError: there is no such method.
        """
        return self.fit(self.default if method == self.default.method else PruneConfig.for_method(method))

    @property
    def reads_names(self) -> bool:
        """Whether it says which of some texts fits an image."""
        return hasattr(self.model, "get_text_features")


class Models:
    """Loads a model when it is first asked for, and keeps the ``KEPT`` that were asked for last."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._device = device
        self._loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._failed: dict[str, tuple[float, str]] = {}
        self._lock = Lock()
        self._loading = Lock()  # another one: models that are there are given while one loads

    def __getitem__(self, name: str) -> Loaded:
        """The model called ``name``: a packaged one, a folder, or owner/name on the Hub.

        Raises:
            TokenPruneError: there is none, no adapter fits, or so it was less than ``AGAIN`` seconds ago.
        """
        if (found := self._at_hand(name)) is not None:
            return found
        with self._loading:
            if (found := self._at_hand(name)) is not None:  # it was loaded meanwhile
                return found
            try:
                found = self._load(name)
            except (TokenPruneError, ImportError, OSError, ValueError) as error:
                with self._lock:
                    self._failed[name] = time.monotonic(), str(error)
                raise
            with self._lock:
                self._loaded[name] = found
                while len(self._loaded) > KEPT:
                    self._loaded.popitem(last=False)
            return found

    def _at_hand(self, name: str) -> Loaded | None:
        with self._lock:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            when, reason = self._failed.get(name, (-math.inf, ""))
        if time.monotonic() - when < AGAIN:
            raise TokenPruneError(reason)
        return None

    def _load(self, name: str) -> Loaded:
        from ..cli.options import load_dense
        from ..evaluation.run import processor_of

        packaged = PACKAGED.get(name, Packaged(name, list))
        model = load_dense(packaged.folder, self._device).eval()
        find_adapter(model)
        return Loaded(model, processor_of(packaged.folder, model), packaged.fit)
