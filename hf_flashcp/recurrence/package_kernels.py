"""What is behind the functions that transformers' recurrent layers call.

A modeling file calls a kernel through a wrapper that picks the function of a package (fla, mamba_ssm, causal_conv1d)
if that is installed, or else one in PyTorch (integrations/hub_kernels.py, `use_kernel_func_from_hub_with_fallback`).
If the package kernels is installed, the wrapper is a module, whose forward a kernel from the hub may replace.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version

from ..errors import ConfigurationError


_OLDEST = {
    "fla": ("0.5.0", "flash-linear-attention", "is wrong where value heads outnumber key heads"),
    "mamba_ssm": ("2.2.5", "mamba-ssm", "has wrong gradients for packed documents"),
}


def takes(function: Callable, argument: str) -> bool:
    """Return whether the kernel behind `function` has an argument of this name.

    The answer is `False` for transformers' own functions, and if the kernel cannot be found.
    """
    kernel = _variables_of(function).get("implementation")
    return kernel is not None and argument in inspect.signature(kernel).parameters


def refuse_old_package(function: Callable) -> None:
    """Raise a `ConfigurationError` if the kernel behind `function` is of a version that computes wrong gradients."""
    variables = _variables_of(function)
    package = variables.get("package")
    if package not in _OLDEST or not variables.get("is_new_implementation"):
        return
    oldest, distribution, fault = _OLDEST[package]
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is not None and Version(version) < Version(oldest):
        raise ConfigurationError(
            f"{package} {version} {fault}. Install {distribution}>={oldest}, or uninstall it to use transformers' own "
            "functions."
        )


def _variables_of(function: Callable) -> dict[str, Any]:
    """Return the variables of the enclosing function that a wrapper uses, unless a kernel from the hub replaced it."""
    if isinstance(function, torch.nn.Module):
        if "forward" in vars(function):
            return {}
        function = _closure(type(function).forward).get("func")
    return _closure(function)


def _closure(function: Any) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}
