"""Multiply-adds in the place of seconds, for tests of what is timed."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hf_tokenprune.search import latency


def work(forward: Any) -> float:
    """Multiply-adds instead of seconds: a clock that does not depend on the machine."""

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    kernel = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    # A counter does not look into inference mode.
    with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False, custom_mapping=kernel) as counter:
        forward()
    return counter.get_total_flops() / 2


def count_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for time counts; every round says the same."""
    monkeypatch.setattr(latency, "seconds", work)
    monkeypatch.setattr(latency, "WARMUP", 0)
    monkeypatch.setattr(latency, "ROUNDS", 1)
