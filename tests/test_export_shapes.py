"""Graphs of pruned encoders: of any batch size, without a stable sort, and compiled in reasonable time."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import ViTForImageClassification

from hf_tokenprune import ATSConfig, EViTConfig, PruneConfig, ToMeConfig, ZeroTPruneConfig, prune
from hf_tokenprune import tokens as tokens_module
from hf_tokenprune.tokens import stable_order, top_tokens

from .families import images, methods_for, tiny_model

CONFIGS = [
    *(PruneConfig.for_method(name) for name in methods_for("vision")),
    ToMeConfig(restore=True),
    ZeroTPruneConfig(partition="random"),
    ATSConfig(sampling="inverse_transform"),
]


def classifier(config: PruneConfig | None, depth: int) -> Any:
    """Few blocks: the compiler takes seconds for each that prunes."""
    model = tiny_model("vit", ViTForImageClassification, num_hidden_layers=depth)
    return model if config is None else prune(model, config)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_a_graph_of_any_batch_size_has_no_stable_sort_and_no_search(config: PruneConfig) -> None:
    """ONNX has no operator for them."""
    model = classifier(config, depth=2)
    sizes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad():
        exported = torch.export.export(model, (), {"pixel_values": images(2)}, dynamic_shapes=sizes)
        for batch in (1, 5):
            found, expected = (run(pixel_values=images(batch)).logits for run in (exported.module(), model))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    called = {str(node.target) for node in exported.graph.nodes}
    refused = ("aten.argsort", "aten.searchsorted", "aten.sort.stable")
    assert not {name for name in called if name.startswith(refused)}


class UnstableSort(TorchFunctionMode):
    """Sorts as a device may: equal values in any order, here from the last one to the first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (Tensor.sort, Tensor.argsort) or kwargs.get("stable"):
            return func(*args, **kwargs)
        result = func(args[0].flip(1), stable=True, **kwargs)
        if func is Tensor.argsort:
            return args[0].shape[1] - 1 - result
        return torch.return_types.sort((result.values, args[0].shape[1] - 1 - result.indices))


@pytest.mark.parametrize("exporting", [False, True], ids=["eager", "exported"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("descending", [False, True])
def test_ties_go_to_the_lower_position(
    exporting: bool, dtype: torch.dtype, descending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randint(-3, 4, (5, 60)).to(dtype)
    values[1] = 0
    if dtype.is_floating_point:
        values[2, ::2] = -torch.inf
        values[3, ::3] = -0.0
    sign = -1 if descending else 1
    expected = [sorted(range(60), key=lambda i, row=row: (sign * row[i], i)) for row in values.tolist()]
    monkeypatch.setattr(tokens_module, "is_exporting", lambda: exporting)
    with UnstableSort():
        assert stable_order(values, descending).tolist() == expected
        if descending:
            assert top_tokens(values, 7).tolist() == [sorted(row[:7]) for row in expected]
        assert stable_order(values[:, :0]).shape == (5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("config", [EViTConfig(), ZeroTPruneConfig()], ids=lambda config: config.method)
def test_counts_are_numbers_to_a_compiler_of_dynamic_shapes(config: PruneConfig) -> None:
    """As formulas of symbolic ratios they are nested floors, which it did not come back from simplifying."""
    model, shapes = classifier(config, depth=3), []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> torch.fx.GraphModule:
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        shapes.extend(str(tuple(value.shape)) for value in values if isinstance(value, Tensor))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5):
            torch.testing.assert_close(compiled(images(batch)).logits, model(images(batch)).logits)
    assert shapes and not [shape for shape in shapes if "Floor" in shape]
