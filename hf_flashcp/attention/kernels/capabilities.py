"""Which kernel runs a layer, why the others cannot, and what has been tested."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from typing import Any

import torch

from ...errors import ConfigurationError, UnsupportedModelError
from .base import AttentionKernel
from .cpu_flash import CPUFlashKernel
from .eager import EagerKernel
from .flash_attention import FlashAttn2Kernel, FlashAttn3Kernel, FlashAttn4Kernel, TorchFlashKernel


TESTED = "tested"
EXPERIMENTAL = "experimental, see docs/gpu.md"

_HALF = (torch.float16, torch.bfloat16)
_ALL = (*_HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Capability:
    """What a kernel can do. All of them take windows, and value heads of another width than key heads. Sinks are not
    their concern: they enter the logsumexp after the merge."""

    make: Callable[[bool], AttentionKernel]  # given whether its gradients must be bitwise reproducible
    devices: tuple[str, ...] = ()  # device types; empty for all
    dtypes: tuple[torch.dtype, ...] = _ALL
    max_head_dim: int | None = None  # of keys and values
    softcap: bool = False
    status: str = TESTED  # whether the test suite has passed on the device
    missing: Callable[[], str | None] = lambda: None  # why it cannot run on this machine, `None` if it can
    max_deterministic_head_dim: int | None = None  # the widest head whose gradients can be bitwise reproducible
    max_head_dim_by_gpu: Mapping[int, int] = field(default_factory=dict)  # where it is less, by compute capability

    def reason_against(
        self,
        device_type: str,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        deterministic: bool = False,
    ) -> str | None:
        """Why it cannot run such a layer, as the rest of a sentence that begins with its name; `None` if it can. Dtype
        and dims of `None` are unknown and no reason against it; a softcap of `None` means that the layer has none."""
        if self.devices and device_type not in self.devices:
            return f"runs on {' and '.join(_DEVICE_NAMES.get(device, device) for device in self.devices)} only"
        if softcap is not None and not self.softcap:
            return "has no softcap"
        if dtype is not None and dtype not in self.dtypes:
            return f"takes {', '.join(_name(x) for x in self.dtypes)}, not {_name(dtype)}"
        widest, limit = max(key_dim or 0, value_dim or 0), self.max_head_dim
        if self.max_head_dim_by_gpu and torch.cuda.is_available():
            limit = self.max_head_dim_by_gpu.get(torch.cuda.get_device_capability()[0], limit)
        if limit is not None and widest > limit:
            return f"takes heads up to {limit} wide, not {widest}"
        most = self.max_deterministic_head_dim
        if deterministic and most is not None and widest > most:
            return f"has deterministic gradients for heads up to {most} wide, not {widest}"
        return self.missing()


_DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wrong_gpu(*generations: tuple[int, str]) -> str | None:
    """Why this machine's GPU is none of the `(major compute capability, name)`; `None` on a machine without a GPU,
    which says nothing about the machine that is asked about."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if major in (wanted for wanted, _ in generations):
        return None
    names = " or ".join(f"{wanted}.x ({name})" for wanted, name in generations)
    return f"needs a GPU of compute capability {names}; this one has {major}.{minor}"


def _old_gpu() -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or later"
    return None


def _activated() -> str | None:
    """What the user has put in the place of PyTorch's own FlashAttention-2: "FA3", "FA4" or `None`."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()


def _no_flash_in_torch() -> str | None:
    if _activated() is not None:
        return f"is replaced by {_activated()}, which was activated in PyTorch"
    # On a machine without a GPU it says nothing of the machine that is asked about.
    if torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
        return "is not part of this build of PyTorch"
    return _old_gpu()


def _no_flash_attn() -> str | None:
    installed = _installed_flash_attn()
    if installed is None:
        return "needs the package flash-attn, which is not installed here"
    major, minor = (int(part) for part in installed.split(".")[:2])
    if major != 2 or minor < 7:
        return f"needs flash-attn 2.7 or a later 2, not {installed}"
    return _old_gpu()


def _no_flash_attn_3() -> str | None:
    if not hasattr(torch.ops.flash_attn_3, "bwd"):
        return 'needs its library: install it and call torch.nn.attention.activate_flash_attention_impl("FA3")'
    return _wrong_gpu((9, "Hopper"))


def _no_flash_attn_4() -> str | None:
    if _activated() != "FA4":
        return 'needs flash-attn-4: install it and call torch.nn.attention.activate_flash_attention_impl("FA4")'
    return _wrong_gpu((9, "Hopper"), (10, "Blackwell"))


@cache
def _installed_flash_attn() -> str | None:
    try:
        return metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return None


_fused = partial(Capability, devices=("cuda",), dtypes=_HALF, max_head_dim=256, status=EXPERIMENTAL)

CAPABILITIES: dict[str, Capability] = {
    "cpu_flash": Capability(lambda deterministic: CPUFlashKernel(), devices=("cpu",)),
    # Keys and values are padded to one width; of 256 Blackwell's kernels have no window.
    "flash_attn_4": _fused(FlashAttn4Kernel, missing=_no_flash_attn_4, max_head_dim_by_gpu={10: 128}),
    "flash_attn_3": _fused(FlashAttn3Kernel, missing=_no_flash_attn_3, max_deterministic_head_dim=192),
    "flash_attn_2": _fused(FlashAttn2Kernel, missing=_no_flash_attn, softcap=True),
    "torch_flash": _fused(TorchFlashKernel, missing=_no_flash_in_torch),
    "eager": Capability(lambda deterministic: EagerKernel(), softcap=True),
}
"""The kernels, best first."""


def explain_kernels(device_type: str, *layer: Any, **known: Any) -> list[tuple[str, str | None]]:
    """Returns `(name, reason)` of every kernel, best first, for what [`Capability.reason_against`] takes. The
    device type is "cpu" or "cuda"; this machine need not have it."""
    return [(name, each.reason_against(device_type, *layer, **known)) for name, each in CAPABILITIES.items()]


def select_kernel(device: torch.device, *layer: Any, **known: Any) -> AttentionKernel:
    """Returns the best kernel for a layer on `device`, see [`explain_kernels`]. Its gradients are deterministic if
    `torch.are_deterministic_algorithms_enabled()`, which makes the fused kernels of CUDA slower. Logs once why a GPU
    has to do without a fused kernel.

    Raises:
        UnsupportedModelError: no kernel can.
        ConfigurationError: what was activated in PyTorch cannot run on this machine's GPU.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    explained = explain_kernels(device.type, *layer, deterministic=deterministic, **known)
    if device.type == "cuda":
        check_activated_kernel()
    for name, reason in explained:
        if reason is None:
            if name == "eager" and device.type == "cuda":
                _say_why_slow(tuple(f"{other} {why}" for other, why in explained if why is not None))
            return _kernel(name, deterministic)
    reasons = ", ".join(f"{name} {reason}" for name, reason in explained)
    raise UnsupportedModelError(
        f"No attention kernel of flashcp runs this layer on {device.type}: {reasons}. Train in bfloat16, float16 or "
        "float32."
    )


def check_activated_kernel() -> None:
    """Raises a `ConfigurationError` if what the user activated in PyTorch does not run on this machine's GPU."""
    name = {"FA3": "flash_attn_3", "FA4": "flash_attn_4"}.get(_activated() or "")
    reason = name and CAPABILITIES[name].missing()
    if reason:
        raise ConfigurationError(
            f"{_activated()} was activated in PyTorch, but it {reason}. Call "
            "torch.nn.attention.restore_flash_attention_impl() to use PyTorch's own FlashAttention-2."
        )


@cache
def _say_why_slow(reasons: tuple[str, ...]) -> None:
    logging.getLogger(__name__).warning(
        f"Attention runs through the formulas, which are exact but slow on a GPU: {'; '.join(reasons)}. docs/gpu.md "
        "says what each kernel takes and how to install it."
    )


@cache
def _kernel(name: str, deterministic: bool) -> AttentionKernel:
    return CAPABILITIES[name].make(deterministic)
