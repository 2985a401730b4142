"""The table of kernels: which layers and devices each supports, and why it may be missing on a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata

import torch

from . import flash_attention_3
from .base import AttentionKernel
from .cpu_flash import CPUFlashKernel
from .cudnn import CudnnKernel
from .devices import Device, Layer
from .eager import EagerKernel
from .flash_attention import FlashAttn2Kernel, FlashAttn3Kernel, FlashAttn4Kernel, TorchFlashKernel


TESTED = "tested"
EXPERIMENTAL = "experimental, see docs/gpu.md"

AMPERE, HOPPER, BLACKWELL, WORKSTATION = 8, 9, 10, 12  # major compute capabilities
_GENERATIONS = {AMPERE: "Ampere", HOPPER: "Hopper", BLACKWELL: "Blackwell", WORKSTATION: "Blackwell for workstations"}
_HALF = (torch.float16, torch.bfloat16)
_ALL = (*_HALF, torch.float32, torch.float64)
_LEAST_CUDNN = 91002


@dataclass(frozen=True)
class Capability:
    """The layers and devices that a kernel supports.

    All kernels support grouped queries and sliding windows. Kernels do not handle attention sinks, which are added to
    the logsumexp after merging.
    """

    make: Callable[[Device, bool], AttentionKernel]  # the bool: whether gradients must be bitwise reproducible
    devices: tuple[str, ...] = ()  # device types; empty for all
    generations: tuple[int, ...] = ()  # major compute capabilities; empty for all
    dtypes: tuple[torch.dtype, ...] = _ALL
    softcap: bool = True
    refuses: Callable[[Device, Layer], str | None] = lambda device, layer: None  # other reasons why it cannot run
    missing: Callable[[], str | None] = lambda: None  # why it cannot run on this machine
    install: str = ""  # how to get it
    status: str = TESTED  # whether the test suite has passed on the device

    def reason_against(self, device: Device, layer: Layer) -> str | None:
        """Return why the kernel does not support a layer on a device, or `None` if it does.

        The reason completes a sentence that begins with the kernel's name.
        """
        if self.devices and device.type not in self.devices:
            return f"runs on {' and '.join(_DEVICE_NAMES.get(name, name) for name in self.devices)} only"
        if self.generations and device.capability and device.major not in self.generations:
            names = " or ".join(f"{major}.x ({_GENERATIONS[major]})" for major in self.generations)
            return "needs a GPU of compute capability {}; this one has {}.{}".format(names, *device.capability)
        if layer.softcap and not self.softcap:
            return "does not support softcap"
        if layer.dtype is not None and layer.dtype not in self.dtypes:
            return f"takes {', '.join(_name(each) for each in self.dtypes)}, not {_name(layer.dtype)}"
        return self.refuses(device, layer)


_DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _wider_than(limit: int, layer: Layer) -> str | None:
    return f"takes heads up to {limit} wide, not {layer.widest}" if layer.widest > limit else None


def _refused_by_flash_attn_3(device: Device, layer: Layer) -> str | None:
    if layer.deterministic and layer.widest > 192:
        return f"has deterministic gradients for heads up to 192 wide, not {layer.widest}"
    if layer.deterministic and flash_attention_3.operators() and flash_attention_3.ignores_deterministic():
        return "has no deterministic gradients in this version; they need a version after 2.8.3"
    return _wider_than(256, layer)


def _refused_by_flash_attn_4(device: Device, layer: Layer) -> str | None:
    wide = device.major == BLACKWELL and layer.widest > 128
    if wide and not _fits_192_128(layer):
        for what, asked in (("sliding windows", layer.window), ("softcap", layer.softcap)):
            if asked:
                return f"supports {what} on Blackwell for heads up to 128 wide, not {layer.widest}"
    return _wider_than(256, layer)


def _refused_by_cudnn(device: Device, layer: Layer) -> str | None:
    if layer.deterministic and device.major != BLACKWELL:
        return "has no deterministic gradients whose memory does not grow with the square of the sequence"
    if device.major == BLACKWELL and not _fits_192_128(layer):
        return _wider_than(128, layer)
    return _wider_than(256, layer)


def _fits_192_128(layer: Layer) -> bool:
    """Return whether keys up to 192 wide and values up to 128 wide suffice, as in DeepSeek's models."""
    return (layer.key_dim or 0) <= 192 and (layer.value_dim or layer.key_dim or 0) <= 128


def activated() -> str | None:
    """Return what the user activated in place of PyTorch's own FlashAttention-2: "FA3", "FA4" or `None`."""
    return getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()


def _not_installed(package: str) -> str | None:
    missing = installed_version(package) is None
    return f"needs the package {package}, which is not installed here" if missing else None


def _no_flash_in_torch() -> str | None:
    if activated() is not None:
        return f"is replaced by {activated()}, which was activated in PyTorch"
    # A machine without a GPU cannot tell, and training may run on another machine.
    if torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
        return "is not part of this build of PyTorch"
    return None


def _no_flash_attn() -> str | None:
    installed = installed_version("flash-attn")
    if installed is None:
        return _not_installed("flash-attn")
    major, minor = (int(part) for part in installed.split(".")[:2])
    if major != 2 or minor < 7:
        return f"needs flash-attn 2.7 or a later 2.x, not {installed}"
    return None


def _no_flash_attn_3() -> str | None:
    if flash_attention_3.operators() is not None:
        return None
    if Device.here("cuda").major == HOPPER:
        reason = flash_attention_3.load()
        return reason and f"needs its library, which {reason}"
    # Elsewhere its library cannot be loaded, but training may run on another machine.
    return _not_installed("flash-attn-3")


def _no_flash_attn_4() -> str | None:
    return _not_installed("flash-attn-4")


def _no_cudnn() -> str | None:
    if reason := _not_installed("nvidia-cudnn-frontend"):
        return reason
    if torch.cuda.is_available() and (torch.backends.cudnn.version() or 0) < _LEAST_CUDNN:
        return f"needs cuDNN 9.10.2 or later, not {torch.backends.cudnn.version()}"
    return None


@cache
def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or `None`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


_fused = partial(Capability, devices=("cuda",), dtypes=_HALF, status=EXPERIMENTAL)
_any_from_ampere = (AMPERE, HOPPER, BLACKWELL, WORKSTATION)

CAPABILITIES: dict[str, Capability] = {
    "cpu_flash": Capability(lambda device, deterministic: CPUFlashKernel(), devices=("cpu",), softcap=False),
    "flash_attn_4": _fused(
        lambda device, deterministic: FlashAttn4Kernel(deterministic, blackwell=device.major == BLACKWELL),
        generations=(HOPPER, BLACKWELL),
        refuses=_refused_by_flash_attn_4,
        missing=_no_flash_attn_4,
        install="pip install --pre flash-attn-4",
    ),
    "flash_attn_3": _fused(
        lambda device, deterministic: FlashAttn3Kernel(deterministic),
        generations=(HOPPER,),
        refuses=_refused_by_flash_attn_3,
        missing=_no_flash_attn_3,
        install="see docs/gpu.md",
    ),
    "cudnn": _fused(
        lambda device, deterministic: CudnnKernel(deterministic),
        generations=(HOPPER, BLACKWELL),
        softcap=False,
        refuses=_refused_by_cudnn,
        missing=_no_cudnn,
        install="pip install hf_flashcp[cudnn]",
    ),
    "flash_attn_2": _fused(
        lambda device, deterministic: FlashAttn2Kernel(deterministic),
        generations=_any_from_ampere,
        refuses=lambda device, layer: _wider_than(256, layer),
        missing=_no_flash_attn,
        install="pip install flash-attn --no-build-isolation",
    ),
    "torch_flash": _fused(
        lambda device, deterministic: TorchFlashKernel(deterministic),
        generations=_any_from_ampere,
        softcap=False,
        refuses=lambda device, layer: _wider_than(256, layer),
        missing=_no_flash_in_torch,
    ),
    "eager": Capability(lambda device, deterministic: EagerKernel()),
}
"""All kernels by name."""

FASTEST_FIRST: dict[int, tuple[str, ...]] = {
    HOPPER: ("flash_attn_3", "cudnn", "flash_attn_4", "flash_attn_2", "torch_flash"),
    BLACKWELL: ("flash_attn_4", "cudnn", "flash_attn_2", "torch_flash"),
}
"""The order of GPU kernels by published speed, fastest first, for the generations on which several generations of
kernels run. docs/gpu.md has the figures."""
