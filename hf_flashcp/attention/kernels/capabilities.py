"""The choice of a layer's kernel, the reasons why other kernels cannot run it, and which kernels are tested."""

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
    """The layers and devices that a kernel supports.

    All kernels support sliding windows, and value heads that differ in width from key heads. Kernels do not handle
    attention sinks, which are added to the logsumexp after merging.
    """

    make: Callable[[bool], AttentionKernel]  # takes whether gradients must be bitwise reproducible
    devices: tuple[str, ...] = ()  # device types; empty for all
    dtypes: tuple[torch.dtype, ...] = _ALL
    max_head_dim: int | None = None  # largest head dimension of keys and values
    softcap: bool = False
    status: str = TESTED  # whether the test suite has passed on the device
    missing: Callable[[], str | None] = lambda: None  # returns why it cannot run on this machine, `None` if it can
    max_deterministic_head_dim: int | None = None  # largest head dimension with bitwise reproducible gradients
    max_head_dim_by_gpu: Mapping[int, int] = field(default_factory=dict)  # lower limits, by major compute capability

    def reason_against(
        self,
        device_type: str,
        softcap: float | None = None,
        dtype: torch.dtype | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        deterministic: bool = False,
    ) -> str | None:
        """Return why the kernel cannot run a layer, or `None` if it can.

        The reason completes a sentence that begins with the kernel's name. A dtype or head dimension of `None` is
        unknown and not checked. A softcap of `None` means that the layer has no softcap.
        """
        if self.devices and device_type not in self.devices:
            return f"runs on {' and '.join(_DEVICE_NAMES.get(device, device) for device in self.devices)} only"
        if softcap is not None and not self.softcap:
            return "does not support softcap"
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
    """Return a reason if this machine's GPU is not of one of the `generations`, (major compute capability, name).

    Returns `None` on a machine without a GPU, because training may run on another machine.
    """
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
    """Return what the user activated in place of PyTorch's own FlashAttention-2: "FA3", "FA4" or `None`."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()


def _no_flash_in_torch() -> str | None:
    if _activated() is not None:
        return f"is replaced by {_activated()}, which was activated in PyTorch"
    # A machine without a GPU cannot tell, and training may run on another machine.
    if torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
        return "is not part of this build of PyTorch"
    return _old_gpu()


def _no_flash_attn() -> str | None:
    installed = _installed_flash_attn()
    if installed is None:
        return "needs the package flash-attn, which is not installed here"
    major, minor = (int(part) for part in installed.split(".")[:2])
    if major != 2 or minor < 7:
        return f"needs flash-attn 2.7 or a later 2.x, not {installed}"
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
    # Keys and values are padded to the same width. On Blackwell, the kernels for 256 do not support windows.
    "flash_attn_4": _fused(FlashAttn4Kernel, missing=_no_flash_attn_4, max_head_dim_by_gpu={10: 128}),
    "flash_attn_3": _fused(FlashAttn3Kernel, missing=_no_flash_attn_3, max_deterministic_head_dim=192),
    "flash_attn_2": _fused(FlashAttn2Kernel, missing=_no_flash_attn, softcap=True),
    "torch_flash": _fused(TorchFlashKernel, missing=_no_flash_in_torch),
    "eager": Capability(lambda deterministic: EagerKernel(), softcap=True),
}
"""All kernels by name, best first."""


def explain_kernels(device_type: str, *layer: Any, **known: Any) -> list[tuple[str, str | None]]:
    """Return `(name, reason)` for every kernel, best first. The reason is `None` if the kernel can run the layer.

    Takes the arguments of [`Capability.reason_against`]. The device type is "cpu" or "cuda", and need not be available
    on this machine.
    """
    return [(name, each.reason_against(device_type, *layer, **known)) for name, each in CAPABILITIES.items()]


def select_kernel(device: torch.device, *layer: Any, **known: Any) -> AttentionKernel:
    """Return the best kernel for a layer on `device`, see [`explain_kernels`].

    If `torch.are_deterministic_algorithms_enabled()`, its gradients are deterministic, which makes the fused CUDA
    kernels slower. If no fused kernel can run the layer on a GPU, a warning gives the reasons once.

    Raises:
        UnsupportedModelError: no kernel can run the layer.
        ConfigurationError: the implementation that was activated in PyTorch cannot run on this machine's GPU.
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
    """Raise a `ConfigurationError` if the implementation activated in PyTorch cannot run on this machine's GPU."""
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
        f"Attention runs with the eager kernel, which is exact but slow on a GPU: {'; '.join(reasons)}. docs/gpu.md "
        "lists what each kernel supports and how to install it."
    )


@cache
def _kernel(name: str, deterministic: bool) -> AttentionKernel:
    return CAPABILITIES[name].make(deterministic)
