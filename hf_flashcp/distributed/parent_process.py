"""Ends a worker process when the process that started it is gone, under every start method of `multiprocessing`.

PyTorch's DataLoader workers watch the process id of their parent. Under the forkserver start method, the default of
Python 3.14 on Linux, that parent is the server, which lives as long as the workers do. The workers of a rank that was
killed, or that left through `os._exit`, would stay forever.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait


_watching_in: int | None = None  # id of the process whose thread watches: a forked copy needs a thread of its own


def end_with_parent() -> None:
    """Make this process end when the process that started it through `multiprocessing` has ended, for any reason.

    A thread waits for the parent. The call does nothing if the thread exists already, or if this process was not
    started through `multiprocessing`.
    """
    global _watching_in
    parent = multiprocessing.parent_process()
    if parent is None or _watching_in == os.getpid():
        return
    _watching_in = os.getpid()
    # On every platform there is a pipe that closes with the parent, but forked copies of the parent keep it open.
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
    """Make a DataLoader's worker end with its rank, then call `inner`, the loader's original `worker_init_fn`."""
    end_with_parent()
    if inner is not None:
        inner(worker_id)
