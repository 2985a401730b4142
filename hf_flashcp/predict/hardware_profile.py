"""Hardware profiles: the speeds of kernels and links. The data files are in `hardware/*.json` beside this module."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError


_FOLDER = Path(__file__).with_name("hardware")

HARDWARE = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))
"""The names of the profiles that come with the library."""

_MAY_BE_LEFT_OUT = ("memory_bytes", "peak_flops_per_second", "host_bandwidth", "causal_tile_overhead_keys")
_MAY_BE_ZERO = (
    "call_seconds",
    "block_seconds",
    "latency_seconds",
    "tile_overhead_keys",
    "causal_tile_overhead_keys",
)
_WHOLE = ("tile", "units", "ranks_per_node")
_LARGEST = 2**31 - 1
_LEAST, _MOST = 1e-30, 1e30  # products of values outside this range might not be finite


@dataclass(frozen=True)
class Pass:
    """The speed of the attention kernel in one direction, forward or backward.

    Args:
        flops_per_second (`float`): speed on long rectangles without a mask.
        tile_overhead_keys (`float`): time to start and end a tile of queries, expressed as the number of keys that the
            tile could attend to in that time.
        causal_tile_overhead_keys (`float`, *optional*): the same under a causal mask, if it differs there.
    """

    flops_per_second: float
    tile_overhead_keys: float
    causal_tile_overhead_keys: float | None = None

    def overhead_keys(self, causal: bool) -> float:
        """Return the overhead of a tile, in keys."""
        if causal and self.causal_tile_overhead_keys is not None:
            return self.causal_tile_overhead_keys
        return self.tile_overhead_keys


@dataclass(frozen=True)
class Kernel:
    """The speed of a flash-attention kernel, which computes tiles of queries in parallel on the device's units.

    Args:
        tile (`int`): number of queries in a tile. A tile with fewer queries takes as long. Under a causal mask, a tile
            processes keys in blocks of the same size.
        units (`int`): number of tiles (of one head) that run at the same time.
        call_seconds (`float`): seconds per call in addition to its tiles.
        causal_efficiency (`float`): ratio of the speed under a causal mask to that without one, on the same tiles.
        forward (`Pass`): speed in forward.
        backward (`Pass`): speed in backward.
        block_seconds (`float`, *optional*, defaults to 0): seconds per empty thread block, for a kernel that starts as
            many blocks for every sequence of a call as its longest one needs (see [`~plan.kernel_calls`]). 0 if it
            does not.
    """

    tile: int
    units: int
    call_seconds: float
    causal_efficiency: float
    forward: Pass
    backward: Pass
    block_seconds: float = 0.0


@dataclass(frozen=True)
class Link:
    """The speed of a rank's link to other ranks.

    Args:
        bytes_per_second (`float`): bandwidth in each direction, when sending and receiving at the same time.
        latency_seconds (`float`): time until the first byte arrives.
    """

    bytes_per_second: float
    latency_seconds: float

    def seconds(self, bytes_moved: np.ndarray) -> np.ndarray:
        """Return the seconds of transfers of some numbers of bytes. Nothing takes no time."""
        return np.where(bytes_moved > 0, self.latency_seconds + bytes_moved / self.bytes_per_second, 0.0)


@dataclass(frozen=True)
class HardwareProfile:
    """The speeds of one kind of device and of its links.

    Args:
        linear_flops_per_second (`float`): speed of large matrix products in the training dtype.
        memory_bytes_per_second (`float`): bytes that operations which only copy or add can read and write per second.
        kernel (`Kernel`): the attention kernel.
        intra_node (`Link`): each rank's link to other ranks of its node.
        inter_node (`Link`): each rank's link to ranks of other nodes.
        ranks_per_node (`int`): number of ranks on a node; ranks r with equal r // ranks_per_node share a node.
        description (`str`): description of the device and its links.
        memory_bytes (`float`, *optional*): memory of a device.
        peak_flops_per_second (`float`, *optional*): peak speed of dense matrix products in the training dtype, from
            the data sheet. A model's FLOPs utilization (MFU) is relative to it.
        host_bandwidth (`float`, *optional*): bytes per second between a device and pinned memory of its host, in one
            direction. Offloaded activations take this way twice.
    """

    linear_flops_per_second: float
    memory_bytes_per_second: float
    kernel: Kernel
    intra_node: Link
    inter_node: Link
    ranks_per_node: int
    description: str = ""
    memory_bytes: float | None = None
    peak_flops_per_second: float | None = None
    host_bandwidth: float | None = None

    def wire_seconds(self, bytes_moved: np.ndarray) -> np.ndarray:
        """Return the seconds of each rank's transfers, (cp_size,), inside and between nodes at the same time.

        `bytes_moved` is (2, cp_size): bytes inside nodes and between nodes.
        """
        inside, between = bytes_moved
        return np.maximum(self.intra_node.seconds(inside), self.inter_node.seconds(between))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HardwareProfile:
        """Read a profile in the form of the data files.

        Raises:
            ConfigurationError: a key is missing or unknown, or a value is not a positive number.
        """
        try:
            kernel = dict(data["kernel"])
            passes: dict[str, Any] = {name: Pass(**kernel.pop(name)) for name in ("forward", "backward")}
            links: dict[str, Any] = {name: Link(**data["links"][name]) for name in ("intra_node", "inter_node")}
            given = {field.name: data[field.name] for field in fields(cls) if field.name in data}
            profile = cls(**{**given, **links, "kernel": Kernel(**kernel, **passes)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(
                f"The hardware profile cannot be read: {error}. hf_flashcp/predict/hardware/h100.json shows the form."
            ) from None
        for part in (profile, profile.kernel, profile.kernel.forward, profile.kernel.backward, *links.values()):
            for name, value in vars(part).items():
                if isinstance(value, (Kernel, Pass, Link)):
                    continue
                if not _is_sound(name, value):
                    raise ConfigurationError(
                        f"The hardware profile has {name} = {reprlib.repr(value)}: give a positive number (for "
                        f"{', '.join(_WHOLE)} a whole one; for the description, text)."
                    )
        return profile

    @classmethod
    def load(cls, hardware: str | Path | HardwareProfile) -> HardwareProfile:
        """Return the profile with a name in `HARDWARE`, or the one in a JSON file. A profile is returned unchanged.

        Raises:
            ConfigurationError: there is no such name or file, or the file is not a profile.
        """
        return hardware if isinstance(hardware, HardwareProfile) else _loaded(str(hardware))


def _is_sound(name: str, value: Any) -> bool:
    if name == "description":
        return isinstance(value, str)
    if value is None:
        return name in _MAY_BE_LEFT_OUT
    if name in _WHOLE:
        return type(value) is int and 1 <= value <= _LARGEST
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and (0 if name in _MAY_BE_ZERO else _LEAST) <= value <= _MOST


@cache
def _loaded(hardware: str) -> HardwareProfile:
    path = _FOLDER / f"{hardware}.json" if hardware in HARDWARE else Path(hardware)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"There is no hardware profile {hardware!r} ({error.strerror}): choose one of {', '.join(HARDWARE)}, or "
            "give the path of a profile's JSON file."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"The hardware profile {hardware!r} is not valid JSON: {error}. Correct the file."
        ) from None
    return HardwareProfile.from_dict(data)
