"""Checks for optional packages, which `pip install 'hf_flashcp[extra]'` installs."""

from __future__ import annotations

from importlib import import_module

from .errors import ConfigurationError


def require_extra(feature: str, extra: str, *packages: str) -> None:
    """Check that the packages of an optional dependency can be imported.

    Args:
        feature (`str`): name of the feature that needs the packages, in the plural: "Plots".
        extra (`str`): name of the optional dependency of this library that installs them.
        packages (`str`): names of the modules to import.

    Raises:
        ConfigurationError: a package cannot be imported. The message names it and the extra.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            name = package.partition(".")[0]
            raise ConfigurationError(f"{feature} need {name}: pip install 'hf_flashcp[{extra}]'.") from None
