"""Multiply-adds (MACs) and bytes, counted from sizes; and schedules that meet a budget of them."""

from .budget import config_for_macs, config_within
from .decoder import GenerationCost, GenerationCostReport
from .model import cost
from .vision import BlockCost, CostReport, ModelCost

__all__ = [
    "BlockCost",
    "CostReport",
    "GenerationCost",
    "GenerationCostReport",
    "ModelCost",
    "config_for_macs",
    "config_within",
    "cost",
]
