"""Functions that workers run for the tests of the liveness thread while the main thread cannot raise an error."""

import logging
import time
from datetime import timedelta

import torch.distributed as dist

from hf_flashcp import name_missing_ranks
from hf_flashcp.distributed import group_timeout, liveness, location


class Event:
    """Stands for a CUDA event."""

    def __init__(self, answer):
        self.answer = answer

    def query(self):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Logged(logging.Handler):
    """Collects what the liveness thread logs."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self):
        liveness.logger.addHandler(self)
        return self

    def __exit__(self, *_):
        liveness.logger.removeHandler(self)

    def wait(self):
        """Wait for a message, in code that does not look like a wait for other ranks."""
        while not self.messages:
            time.sleep(0.05)


def exchange_that_a_gpu_waits_for(line):
    """Return what rank 0 logs while its GPU waits for rank 1, as other ranks do that are not missing.

    Rank 1 is in the function `first` or `second`.
    """
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    liveness.watch_liveness()
    dist.barrier()
    with Logged() as logged:
        liveness.group_timeout = lambda: timedelta(seconds=8)
        if rank != 1:
            location._latest = location.Wait("the keys", time.monotonic(), Event(False))
        try:
            if rank == 0:
                logged.wait()
                store.set("flashcp test/reported", "")
            {"first": first, "second": second}[line](store)
        finally:
            location._latest, liveness.group_timeout = None, group_timeout
    dist.barrier()
    store.delete_key("flashcp test/reported")
    return logged.messages


def first(store):
    while not store.check(["flashcp test/reported"]):
        time.sleep(0.05)


def second(store):
    while not store.check(["flashcp test/reported"]):
        time.sleep(0.05)


def error_of_another_rank():
    """Return what rank 0 logs about the error of rank 1 while it does not wait for a collective in Python."""
    liveness.watch_liveness()
    dist.barrier()
    liveness._RAISED_WITHIN = 0.0
    with Logged() as logged:
        try:
            with name_missing_ranks("my loop"):
                if dist.get_rank() == 1:
                    raise LookupError("a fault of this rank's own")
                logged.wait()
        except LookupError:
            pass
        finally:
            liveness._RAISED_WITHIN = 5.0
    dist.barrier()
    return logged.messages
