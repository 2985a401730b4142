"""Step "device": versions, and the highest speeds that the device reaches."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata

import torch

from ...attention.kernels import CAPABILITIES, Device, Layer, explain_kernels
from ..turns import median_seconds
from .settings import Found, Record, Settings


PACKAGES = (
    *("hf_flashcp", "torch", "transformers", "accelerate", "triton"),
    *("flash-attn", "flash-attn-3", "flash-attn-4", "kernels", "nvidia-cudnn-frontend"),
)


def device(settings: Settings) -> Found:
    """Report versions, speed limits of the device, and the attention kernels that run on it."""
    here, found = settings.prepare(), Found()
    found.add("Versions", *_versions())
    found.add("Device", _device(here) | _ceilings(here, settings))
    explained = explain_kernels(Device.here(here), Layer(torch.bfloat16, 128, 128))
    chosen = next(name for name, reason in explained.items() if reason is None)
    for name, reason in explained.items():
        runs = "yes" if reason is None else f"no, it {reason}"
        record = {"kernel": name, "chosen": "yes" if name == chosen else "", "runs here": runs}
        record["status"] = CAPABILITIES[name].status
        found.add("Kernels for bf16 heads of 128, in the order in which they are considered", record)
    if settings.kernel_library is not None:
        reason = explained["flash_attn_3"]
        found.require(reason is None, f"the kernel library was loaded, but flash_attn_3 {reason}")
    return found


def _versions() -> list[Record]:
    found = [{"package": "Python", "version": platform.python_version()}]
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found.append({"package": name, "version": metadata.version(name)})
    if torch.version.cuda:
        found.append({"package": "CUDA of PyTorch", "version": torch.version.cuda})
        found.append({"package": "cuDNN", "version": str(torch.backends.cudnn.version())})
    return found


def _device(chosen: torch.device) -> Record:
    if chosen.type == "cpu":
        return {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(chosen)
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": properties.total_memory / 2**30,
    }


def _ceilings(chosen: torch.device, settings: Settings) -> Record:
    size = settings.sized(2**30, 2**22)
    width = settings.sized(8192, 256)
    source = torch.zeros(size, dtype=torch.uint8, device=chosen)
    target = torch.empty_like(source)
    left, right = (torch.randn(width, width, device=chosen).bfloat16() for _ in range(2))
    seconds = median_seconds(5, chosen, copy=lambda: target.copy_(source), matmul=lambda: left @ right)
    return {
        "copy TB/s": 2 * size / seconds["copy"] / 1e12,
        f"bf16 matmul of {width} TFLOP/s": 2 * width**3 / seconds["matmul"] / 1e12,
    }
