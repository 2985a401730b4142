"""Finds the operators of FlashAttention-3, which come from one of several packages."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch


HUB_KERNEL, HUB_VERSION = "kernels-community/flash-attn3", 1
_MODULE = "flash_attn_3._C"  # what `flash_attn_interface` imports to register the operators


def operators() -> Any | None:
    """Return the namespace of the operators `fwd` and `bwd`, or `None` if they are not registered.

    They are registered as `torch.ops.flash_attn_3` by PyTorch's `activate_flash_attention_impl("FA3")`, by importing
    `flash_attn_interface`, by [`load_kernel_library`] and by [`load`].
    """
    return torch.ops.flash_attn_3 if hasattr(torch.ops.flash_attn_3, "bwd") else _from_hub.get("operators")


_from_hub: dict[str, Any] = {}


@cache
def load(download: bool = False) -> str | None:
    """Register the operators from an installed package, if they are not registered yet.

    The packages are flash-attn-3 and `kernels`. The latter's kernel is used if it is in the local cache; with
    `download`, it is fetched from the Hugging Face Hub otherwise.

    Returns:
        `str`, *optional*: why the operators are not available, `None` if they are.
    """
    if operators() is not None:
        return None
    failures = []
    for installed, find in (("flash_attn_3", _import), ("kernels", lambda: _load_from_hub(download))):
        if find_spec(installed) is not None:
            try:
                find()
            except Exception as error:  # missing files, another CUDA version, another API, no network
                failures.append(f"{installed} does not load: {' '.join(str(error).split())[:200]}")
            if operators() is not None:
                return None
    return "; ".join(failures) or "is not installed"


def ignores_deterministic() -> bool:
    """Return whether the operators take the argument `deterministic` but ignore it.

    This holds up to flash-attn 2.8.3, where the switch in hopper/flash_bwd_launch_template.h is commented out. `bwd`
    returns eight tensors there and five in later versions.
    """
    return len(operators().bwd.default._schema.returns) > 5


def _import() -> None:
    importlib.import_module(_MODULE)


def _load_from_hub(download: bool) -> None:
    import kernels

    if not download:
        kernels.install_kernel(HUB_KERNEL, version=HUB_VERSION, local_files_only=True)  # raises if it is not cached
    _from_hub["operators"] = kernels.get_kernel(HUB_KERNEL, version=HUB_VERSION).ops
