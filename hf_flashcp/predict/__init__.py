"""Predictions from a model's config and a hardware profile: step times and memory. Pure Python and NumPy."""

from .cost_model import CostModel, StepTime
from .hardware_profile import HARDWARE, HardwareProfile


__all__ = ["HARDWARE", "CostModel", "HardwareProfile", "StepTime"]
