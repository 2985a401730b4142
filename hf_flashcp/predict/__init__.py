"""Predicts step times and memory from a model's config and a hardware profile. Pure Python and NumPy."""

from .cost_model import CostModel, StepTime
from .hardware_profile import HARDWARE, HardwareProfile


__all__ = ["HARDWARE", "CostModel", "HardwareProfile", "StepTime"]
