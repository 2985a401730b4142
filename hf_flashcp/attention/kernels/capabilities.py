"""Which kernel runs a layer, why the others cannot, and what has been tested."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch

from ...errors import UnsupportedModelError
from .base import AttentionKernel
from .cpu_flash import CPUFlashKernel
from .eager import EagerKernel
from .flash_attn2 import FlashAttn2Kernel
from .torch_flash import TorchFlashKernel


TESTED = "tested"
EXPERIMENTAL = "experimental: not yet run on a GPU"

_HALF = (torch.float16, torch.bfloat16)
_ALL = (*_HALF, torch.float32, torch.float64)


@dataclass(frozen=True)
class Capability:
    """What a kernel can do. Windows, and value heads of another width than key heads, all of them can; sinks are no
    matter of theirs, because they enter the logsumexp after the merge.

    Attributes:
        make (`Callable`): the kernel, from `deterministic`.
        devices (`tuple[str, ...]`): device types; empty for all.
        dtypes (`tuple[torch.dtype, ...]`): of queries, keys and values.
        max_head_dim (`int`, *optional*): of keys and values.
        softcap (`bool`): whether it has one.
        status (`str`): whether the test suite has passed on the device.
        missing (`Callable`, *optional*): why it cannot run on this machine, `None` if it can.
    """

    make: Callable[[bool], AttentionKernel]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int | None
    softcap: bool
    status: str
    missing: Callable[[], str | None] = lambda: None

    def reason_against(
        self,
        device_type: str,
        softcap: float | None,
        dtype: torch.dtype | None,
        key_dim: int | None,
        value_dim: int | None,
    ) -> str | None:
        """Why it cannot run such a layer, as the rest of a sentence that begins with its name; `None` if it can. What
        is `None` is not known and not held against it, but for the softcap."""
        if self.devices and device_type not in self.devices:
            return f"runs on {' and '.join(_DEVICE_NAMES.get(device, device) for device in self.devices)} only"
        if softcap is not None and not self.softcap:
            return "has no softcap"
        if dtype is not None and dtype not in self.dtypes:
            return f"takes {', '.join(_name(x) for x in self.dtypes)}, not {_name(dtype)}"
        widest = max(key_dim or 0, value_dim or 0)
        if self.max_head_dim is not None and widest > self.max_head_dim:
            return f"takes heads up to {self.max_head_dim} wide, not {widest}"
        return self.missing()


_DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _old_gpu() -> str | None:
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 (Ampere) or later"
    return None


def _no_flash_in_torch() -> str | None:
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
    # FA3 and FA4 take the place of PyTorch's own kernel behind the calls of torch_flash.
    activated = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if activated is not None:
        return f"gives way to {activated}, which was activated in PyTorch"
    return _old_gpu()


@cache
def _installed_flash_attn() -> str | None:
    try:
        return metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return None


# Best first.
CAPABILITIES: dict[str, Capability] = {
    "cpu_flash": Capability(lambda deterministic: CPUFlashKernel(), ("cpu",), _ALL, None, False, TESTED),
    "flash_attn_2": Capability(FlashAttn2Kernel, ("cuda",), _HALF, 256, True, EXPERIMENTAL, _no_flash_attn),
    "torch_flash": Capability(TorchFlashKernel, ("cuda",), _HALF, 256, False, EXPERIMENTAL, _no_flash_in_torch),
    "eager": Capability(lambda deterministic: EagerKernel(), (), _ALL, None, True, TESTED),
}


def explain_kernels(
    device_type: str,
    softcap: float | None = None,
    *,
    dtype: torch.dtype | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
) -> list[tuple[str, str | None]]:
    """`(name, reason)` of every kernel, best first: why it cannot run such a layer, or `None` for those that can.

    Args:
        device_type (`str`): `"cpu"` or `"cuda"`; this machine need not have it.
        softcap (`float`, *optional*): of the layer.
        dtype (`torch.dtype`, *optional*): of queries, keys and values; `None` if not known, like the sizes.
        key_dim (`int`, *optional*), value_dim (`int`, *optional*): width of their heads.
    """
    return [
        (name, capability.reason_against(device_type, softcap, dtype, key_dim, value_dim))
        for name, capability in CAPABILITIES.items()
    ]


def select_kernel(
    device: torch.device,
    softcap: float | None = None,
    *,
    dtype: torch.dtype | None = None,
    key_dim: int | None = None,
    value_dim: int | None = None,
    deterministic: bool | None = None,
) -> AttentionKernel:
    """The best kernel for such a layer on `device`: see [`explain_kernels`]. Says once, in the log, where a GPU has to
    do without a fused one.

    Args:
        deterministic (`bool`, *optional*): gradients bitwise equal from run to run, which every kernel can give; the
            fused ones of CUDA are slower with it. Defaults to `torch.are_deterministic_algorithms_enabled()`.

    Raises:
        UnsupportedModelError: none can.
    """
    explained = explain_kernels(device.type, softcap, dtype=dtype, key_dim=key_dim, value_dim=value_dim)
    for name, reason in explained:
        if reason is None:
            if name == "eager" and device.type == "cuda":
                _say_why_slow(tuple(f"{other} {why}" for other, why in explained if why is not None))
            wanted = torch.are_deterministic_algorithms_enabled() if deterministic is None else deterministic
            return _kernel(name, wanted)
    reasons = ", ".join(f"{name} {reason}" for name, reason in explained)
    raise UnsupportedModelError(
        f"No attention kernel of flashcp runs this layer on {device.type}: {reasons}. Train in bfloat16, float16 or "
        "float32."
    )


@cache
def _say_why_slow(reasons: tuple[str, ...]) -> None:
    logging.getLogger(__name__).warning(
        f"Attention runs through the formulas, right but slow and memory hungry: {'; '.join(reasons)}."
    )


@cache
def _kernel(name: str, deterministic: bool) -> AttentionKernel:
    return CAPABILITIES[name].make(deterministic)
