"""Pruned encoders on a device never make the host wait for it, and send it nothing: CUDA graphs need that, and speed.

The device is "meta", which has no values: reading one raises, and whatever comes from the CPU is seen.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hf_tokenprune import prune

from .families import images, inputs_for, tiny_model
from .test_contract_families import PAIRS, name_of

READS_MASKS = ("siglip2", "siglip2_vision_model")
"""Whether images are padded is read in every forward, of the dense model too."""


class FromTheHost(TorchDispatchMode):
    """Names of operations that read or make tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.seen.append(func._schema.name)
        return result


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0][0] not in READS_MASKS], ids=name_of)
def test_the_host_neither_waits_nor_sends(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family, config = pair
    model = tiny_model(*family)
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs_for(model, images()))
    inputs.pop("noise", None)  # ViT-MAE: patches that the caller has put in order are checked
    model = prune(model, config).to("meta")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    with torch.no_grad(), FromTheHost() as host:
        model(**inputs)
    assert not host.seen


def test_the_watcher_sees_both() -> None:
    there = torch.ones(3, device="meta")
    with FromTheHost() as host:
        there + torch.arange(3).to("meta")
    assert host.seen
    with pytest.raises(RuntimeError, match="meta"):
        bool(there.any())
