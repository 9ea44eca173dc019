"""What pruning costs where tensors are small: operations, counted, which has no noise; and the memory it holds."""

import pytest
import torch
from torch import Tensor
from transformers import DeiTConfig, DeiTForImageClassification

from hf_tokenprune import PruneConfig, pruned
from hf_tokenprune.benchmark.operations import count_operations
from hf_tokenprune.benchmark.timing import peak_bytes

MOST = {"tome": 1.92, "salience_merge": 2.6, "zero_tprune": 3.05, "pitome": 3.1, "evit": 1.4, "ats": 1.25}
"""Operations of a forward, of those of the dense one, at the sizes of DeiT-S and a speed-up of 1.5."""


@pytest.fixture(scope="module")
def deit_small() -> DeiTForImageClassification:
    torch.manual_seed(0)
    sizes = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    return DeiTForImageClassification(sizes).eval()


@pytest.mark.parametrize("inference", [False, True])
def test_operations_counted_by_hand(inference: bool) -> None:
    linear = torch.nn.Linear(4, 6)

    def forward(states: Tensor, labels: Tensor) -> Tensor:
        states = linear(states).relu()  # 2: product with bias, and activation
        products = torch.bmm(states[:, 1:], states[:, 1:].mT)  # 1: slices and a transpose are views
        products += 1  # 1, in place
        return torch.nn.functional.cross_entropy(products.flatten(0, 1), labels)  # 2: softmax, and loss

    with torch.inference_mode(inference):
        inputs = {"states": torch.randn(3, 5, 4), "labels": torch.arange(12) % 4}
        assert count_operations(forward, inputs) == 6


@pytest.mark.parametrize("method", MOST)
def test_a_decision_is_few_operations(deit_small: DeiTForImageClassification, method: str) -> None:
    inputs = {"pixel_values": torch.randn(2, 3, 224, 224)}
    dense = count_operations(deit_small, inputs)
    with pruned(deit_small, PruneConfig.for_method(method).for_budget(deit_small, speedup=1.5)):
        assert count_operations(deit_small, inputs) <= MOST[method] * dense


@pytest.mark.parametrize("method", MOST)
def test_nothing_is_held_longer_than_it_is_read(deit_small: DeiTForImageClassification, method: str) -> None:
    """Attention and keys are gone when the MLP runs, whose states are the most that a dense model holds."""
    pixels = torch.randn(4, 3, 224, 224)

    def forward() -> None:
        with torch.no_grad():
            deit_small(pixels)

    dense = peak_bytes(forward)
    with pruned(deit_small, PruneConfig.for_method(method).for_budget(deit_small, speedup=1.5)):
        assert peak_bytes(forward) <= 1.05 * dense
