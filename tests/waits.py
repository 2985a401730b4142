"""Counts the calls at which the host would wait for a device, if all tensors were on one."""

import sys
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "bincount")
_UNIQUE = ("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive")
_METHODS = ("cpu", "numpy", "tolist", "__array__")  # on a CPU these are no operations of their own
_ON_THE_HOST = ("_MapDatasetFetcher", "_IterableDatasetFetcher")  # batches are on the host until they are collated


class Waits:
    """A context that records where the host would wait, as `(file, function, operation)`, outermost frame of `inside`.

    Calls are listed by the innermost frame whose file is in one of the packages `inside`. What runs in the collate
    function of a data loader is left out: its tensors are on the host.
    """

    def __init__(self, inside=("hf_flashcp", "transformers", "trl", "accelerate")):
        self.places, self._inside = Counter(), inside
        self._modes = _Operations(self._record), _Methods(self._record)

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def clear(self):
        self.places.clear()

    def _record(self, operation):
        frame, place = sys._getframe(1), None
        while frame is not None:
            if type(frame.f_locals.get("self")).__name__ in _ON_THE_HOST:
                return
            parts = frame.f_code.co_filename.split("/")
            if place is None and any(package in parts for package in self._inside):
                place = "/".join(parts[-2:]), frame.f_code.co_name
            frame = frame.f_back
        self.places[(*(place or ("", "")), operation)] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, record):
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(function, args, kwargs):
            self._record(function.overloadpacket.__name__)
        return function(*args, **kwargs)


class _Methods(TorchFunctionMode):
    def __init__(self, record):
        super().__init__()
        self._record = record

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in _METHODS:
            self._record(function.__name__)
        return function(*args, **(kwargs or {}))


def waits(function, args, kwargs):
    """Return whether an operation makes the host wait for the device of its tensors."""
    name = function.overloadpacket.__name__
    if name in _READS or name in _UNIQUE:
        return True
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name == "_to_copy":
        device = torch.device(kwargs.get("device") or args[0].device)
        return device.type != args[0].device.type and not kwargs.get("non_blocking")
    if name == "copy_":
        return args[0].device.type != args[1].device.type and not (args[2] if len(args) > 2 else False)
    return False
