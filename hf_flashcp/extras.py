"""Packages that only some features need, and that `pip install 'hf_flashcp[extra]'` installs."""

from __future__ import annotations

from importlib import import_module

from .errors import ConfigurationError


def require_extra(feature: str, extra: str, *packages: str) -> None:
    """Raises a `ConfigurationError` that names the optional dependency `extra` of this library, unless all packages
    can be imported. `feature` needs them, in the plural: "Plots"."""
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            name = package.partition(".")[0]
            raise ConfigurationError(f"{feature} need {name}: pip install 'hf_flashcp[{extra}]'.") from None
