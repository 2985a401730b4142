"""Loading kernels from a library file, for machines without access to a package index."""

from __future__ import annotations

import ctypes
import lzma
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from ...errors import ConfigurationError


_RUNTIME = "libcudart.so.12"


def load_kernel_library(file: str | Path) -> Path:
    """Register the operators of FlashAttention-3 from a library file.

    The library needs `libcudart.so.12`, which PyTorch builds for CUDA 13 do not include. It is looked up in the folder
    of the file and in the package nvidia-cuda-runtime-cu12.

    Args:
        file (`str` or `Path`): `flash_attn_3/_C.so` of xformers 0.0.34, or that file compressed as .xz. docs/gpu.md
            describes how to make it.

    Returns:
        `Path`: the library that was loaded. For a compressed file this is a temporary file, which other processes can
        load.

    Raises:
        ConfigurationError: the file does not exist, cannot be loaded, or does not contain FlashAttention-3.
    """
    file = Path(file)
    if not file.is_file():
        raise ConfigurationError(
            f"The kernel library {file} does not exist: pass the path of FlashAttention-3's _C.so."
        )
    if not torch.version.cuda:
        raise ConfigurationError(
            f"The kernel library {file} needs a PyTorch build with CUDA; this one is {torch.__version__}."
        )
    library = _unpacked(file) if file.suffix == ".xz" else file
    try:
        _load_runtime(file.parent)
        torch.ops.load_library(str(library.resolve()))
    except OSError as error:
        raise ConfigurationError(
            f"The kernel library {file} cannot be loaded: {' '.join(str(error).split())[:300]}. If {_RUNTIME} is "
            "missing, run pip install nvidia-cuda-runtime-cu12, or put that file beside the library."
        ) from None
    if not hasattr(torch.ops.flash_attn_3, "bwd"):
        raise ConfigurationError(
            f"The kernel library {file} does not register the operator flash_attn_3::bwd: pass the path of "
            "FlashAttention-3's _C.so."
        )
    return library


def _unpacked(file: Path) -> Path:
    library = Path(tempfile.mkdtemp(prefix="flashcp-kernels-")) / file.stem
    try:
        with lzma.open(file) as packed, library.open("wb") as target:
            shutil.copyfileobj(packed, target, 2**20)
    except (lzma.LZMAError, EOFError) as error:
        raise ConfigurationError(
            f"The kernel library {file} is not a complete .xz file: {error}. Copy or compress it again."
        ) from None
    return library


def _load_runtime(folder: Path) -> None:
    """Load the CUDA 12 runtime if it is outside the linker's path, so that the library finds it already loaded."""
    spec = find_spec("nvidia.cuda_runtime") if find_spec("nvidia") else None
    packages = [Path(place) / "lib" for place in spec.submodule_search_locations or ()] if spec else []
    for place in (folder, *packages):
        if (place / _RUNTIME).is_file():
            ctypes.CDLL(str(place / _RUNTIME), mode=ctypes.RTLD_GLOBAL)
            return
