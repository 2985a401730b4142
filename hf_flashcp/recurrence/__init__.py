"""Recurrent and convolutional layers on plans that cut documents: states and tokens pass from slice to slice."""

from .convolution import short_convolution
from .delta_rule import delta_rule
from .mamba2 import mamba2


__all__ = ["delta_rule", "mamba2", "short_convolution"]
