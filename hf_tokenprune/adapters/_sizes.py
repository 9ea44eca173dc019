"""What adapters read off modules and configs to tell the sizes of a model."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def linear_macs(*modules: nn.Module | None) -> int:
    """Multiply-adds of applying the linear layers in ``modules`` to one token.

    A convolution is one where it makes a token of a square of patches. What adapters of PEFT add does not count.
    """
    layers = [m for module in modules if module is not None for m in _stock_modules(module)]
    linear = sum(layer.in_features * layer.out_features for layer in layers if isinstance(layer, nn.Linear))
    return linear + sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Conv2d))


def _stock_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Like ``module.modules()``, with what PEFT has wrapped in place of its wrappers and what these add."""
    children = dict(module.named_children())
    wrapped = children.get("base_layer") or children.get("original_module")  # of a tuner; of modules_to_save
    if wrapped is not None:
        yield from _stock_modules(wrapped)
        return
    yield module
    for child in children.values():
        yield from _stock_modules(child)


def as_pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size in a config: one number stands for a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def in_rows(size: tuple[int, int], largest: tuple[int, int], side: int) -> tuple[int, int]:
    """(height, width) that the processor of a Pixtral tower gives an image of ``size`` pixels.

    A larger one than ``largest`` is scaled down; tokens of ``side`` by ``side`` pixels cover all of it.
    """
    ratio = max(size[0] / largest[0], size[1] / largest[1], 1)
    height, width = (side * -(int(pixels / ratio) // -side) for pixels in size)
    return height, width


def head_dim(config: Any) -> int:
    """Width of an attention head."""
    own: int | None = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def projection_macs(config: Any, gated: bool = False) -> int:
    """Multiply-adds of one token for queries, keys, values and output of its attention; ``gated``: and for a gate."""
    queries = config.num_attention_heads * head_dim(config)
    keys = config.num_key_value_heads * head_dim(config)
    return int(config.hidden_size * ((2 + gated) * queries + 2 * keys))


def mlp_matrices(block: nn.Module) -> int:
    """Matrices of the MLP of a transformer block: 3 where it is gated, else 2."""
    return 2 + any(name.endswith("gate_proj") for name, _ in block.named_modules())
