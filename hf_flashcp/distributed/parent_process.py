"""Ends a worker process when the process that started it is gone, under every start method of `multiprocessing`.

PyTorch's DataLoader workers watch the process id of their parent. Under the forkserver start method, Python 3.14's
default on Linux, that parent is the server, which lives as long as the workers do: those of a rank that was killed, or
that left through `os._exit`, would stay for ever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait


_watching_in: int | None = None  # the id of this process, once it watches: a forked copy of it has to begin anew


def end_with_parent() -> None:
    """Makes this process end when the one that started it through `multiprocessing` has ended, however that happened.

    A thread waits for it. Calling it again, or in a process that was started otherwise, does nothing.
    """
    global _watching_in
    parent = multiprocessing.parent_process()
    if parent is None or _watching_in == os.getpid():
        return
    _watching_in = os.getpid()
    # A pipe that closes with the parent, on every platform; but copies that the parent has forked keep it open.
    signs = [parent.sentinel]
    if hasattr(os, "pidfd_open"):
        try:
            signs.append(os.pidfd_open(parent.pid))
        except ProcessLookupError:
            os._exit(1)
        except OSError:
            pass  # an old kernel, or a sandbox that forbids it
    threading.Thread(target=_end_after, args=(signs,), name="flashcp-parent", daemon=True).start()


def _end_after(signs: Sequence[int]) -> None:
    wait(signs)
    os._exit(1)


def init_loader_worker(inner: Callable[[int], None] | None, worker_id: int) -> None:
    """Makes a DataLoader's worker end with its rank, then calls `inner`, which was the loader's `worker_init_fn`."""
    end_with_parent()
    if inner is not None:
        inner(worker_id)
