"""Packages that only some features need, and that `pip install 'hf_flashcp[extra]'` installs."""

from __future__ import annotations

from importlib import import_module

from .errors import ConfigurationError


def require_extra(feature: str, extra: str, *packages: str) -> None:
    """Raises a `ConfigurationError` that names the extra, unless all packages can be imported.

    Args:
        feature: what needs the packages, in the plural: "Plots".
        extra: the optional dependency of this library that has them.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            name = package.partition(".")[0]
            raise ConfigurationError(f"{feature} need {name}: pip install 'hf_flashcp[{extra}]'.") from None
