"""The rule by which a layer's kernel is chosen: the fastest one that computes it exactly on its device."""

from __future__ import annotations

import logging
from functools import cache

import torch

from ...errors import ConfigurationError, UnsupportedModelError
from . import flash_attention_3
from .base import AttentionKernel
from .capabilities import CAPABILITIES, FASTEST_FIRST, HOPPER, activated
from .devices import ANY_LAYER, Device, Layer


def kernels_in_order(device: Device) -> tuple[str, ...]:
    """Return the names of all kernels in the order in which they are considered for a device.

    An unknown GPU is taken for a Hopper GPU.
    """
    order = FASTEST_FIRST.get(HOPPER if device.major is None else device.major, ())
    return ("cpu_flash", *order, *(name for name in CAPABILITIES if name not in ("cpu_flash", *order)))


def explain_kernels(device: Device, layer: Layer = ANY_LAYER) -> dict[str, str | None]:
    """Return why each kernel cannot run a layer on a device, in the order in which kernels are considered.

    The reason is `None` if the kernel can run the layer. The device need not be part of this machine, but packages
    are looked up on this machine.
    """
    return {name: _reason_against(name, device, layer) for name in kernels_in_order(device)}


def faster_kernels(device: Device, layer: Layer = ANY_LAYER) -> list[str]:
    """Return the kernels that are faster than the chosen one and support the layer, but are missing here."""
    found = []
    for name, reason in explain_kernels(device, layer).items():
        if reason is None:
            break
        if CAPABILITIES[name].reason_against(device, layer) is None:
            found.append(name)
    return found


def select_kernel(device: torch.device, layer: Layer, name: str | None = None) -> AttentionKernel:
    """Return the kernel for a layer on a device of this machine, see [`explain_kernels`].

    If `torch.are_deterministic_algorithms_enabled()`, its gradients are deterministic, which makes the fused CUDA
    kernels slower. If no fused kernel can run the layer on a GPU, a warning gives the reasons once.

    Args:
        device (`torch.device`): device of the tensors.
        layer (`Layer`): what the layer needs.
        name (`str`, *optional*): the kernel that the user asked for. By default the first one that can run the layer.

    Raises:
        UnsupportedModelError: no kernel can run the layer.
        ConfigurationError: the kernel that the user asked for cannot run the layer, or the implementation that was
            activated in PyTorch cannot run on this machine's GPU.
    """
    here = Device.here(device)
    layer = layer._replace(deterministic=torch.are_deterministic_algorithms_enabled())
    if device.type == "cuda":
        check_activated_kernel()
    if name is not None:
        require_kernel(name, here, layer)
        return _made(name, here, layer.deterministic)
    chosen = next((each for each in kernels_in_order(here) if _reason_against(each, here, layer) is None), None)
    if chosen is None or (chosen == "eager" and device.type == "cuda"):
        against = [f"{each} {reason}" for each, reason in explain_kernels(here, layer).items() if reason is not None]
        if chosen is None:
            raise UnsupportedModelError(
                f"No attention kernel of flashcp runs this layer on {device.type}: {', '.join(against)}. Train in "
                "bfloat16, float16 or float32."
            )
        _say_why_slow(tuple(against))
    return _made(chosen, here, layer.deterministic)


def make_kernel(name: str, device: torch.device, deterministic: bool = False) -> AttentionKernel:
    """Return a kernel by its name, whether or not it can run."""
    return _made(name, Device.here(device), deterministic)


def _reason_against(name: str, device: Device, layer: Layer) -> str | None:
    capability = CAPABILITIES[name]
    return capability.reason_against(device, layer) or capability.missing()


def require_kernel(name: str, device: Device, layer: Layer = ANY_LAYER) -> None:
    """Raise a `ConfigurationError` if the kernel that the user asked for cannot run a layer on a device."""
    check_kernel_name(name)
    capability = CAPABILITIES[name]
    advice = "Leave kernel out to use the fastest kernel that can run"
    reason = capability.reason_against(device, layer)
    if reason is None:
        if name == "flash_attn_3" and Device.here("cuda").major == HOPPER:
            flash_attention_3.load(download=True)
        reason = capability.missing()
        advice = f"Install it ({capability.install}), or leave kernel out" if capability.install else advice
    if reason is not None:
        raise ConfigurationError(f'FlashCPPlugin has kernel="{name}", but {name} {reason}. {advice}.')


def check_kernel_name(name: str) -> None:
    """Raise a `ConfigurationError` if there is no kernel of that name."""
    if not isinstance(name, str) or name not in CAPABILITIES:
        raise ConfigurationError(f"There is no kernel {name!r}. Choose one of {', '.join(CAPABILITIES)}.")


def check_activated_kernel() -> None:
    """Raise a `ConfigurationError` if the implementation activated in PyTorch cannot run on this machine's GPU."""
    name = {"FA3": "flash_attn_3", "FA4": "flash_attn_4"}.get(activated() or "")
    if name is None:
        return
    here = Device.here("cuda")
    reason = _reason_against(name, here, ANY_LAYER)
    if reason:
        raise ConfigurationError(
            f"{activated()} was activated in PyTorch, but it {reason}. Call "
            "torch.nn.attention.restore_flash_attention_impl() to use PyTorch's own FlashAttention-2."
        )


@cache
def _say_why_slow(reasons: tuple[str, ...]) -> None:
    logging.getLogger(__name__).warning(
        f"Attention runs with the eager kernel, which is exact but slow on a GPU: {'; '.join(reasons)}. docs/gpu.md "
        "lists what each kernel supports and how to install it."
    )


@cache
def _made(name: str, device: Device, deterministic: bool) -> AttentionKernel:
    return CAPABILITIES[name].make(device, deterministic)
