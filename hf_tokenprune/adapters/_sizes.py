"""What adapters read off modules and configs to tell the sizes of a model."""

from torch import nn


def linear_macs(*modules: nn.Module | None) -> int:
    """Multiply-adds of applying the linear layers in ``modules`` to one token."""
    layers = [m for module in modules if module is not None for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(layer.in_features * layer.out_features for layer in layers)


def as_pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size in a config: one number stands for a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
