"""A pytest plugin: the run fails if a process that it started is still there when it ends.

On Linux the process that runs pytest adopts whatever its descendants leave behind, so that all of them are found,
whichever session, environment or command line they have. Elsewhere nothing is checked.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest


SECONDS = 20  # for what has been told to end, or noticed by itself that it should
PR_SET_CHILD_SUBREAPER = 36
_FOUND = pytest.StashKey[dict]()


def adopt_orphans():
    """From now on a process whose parent ends becomes this one's child, if this one is an ancestor."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def descendants():
    """Ids of the processes below this one that run, with their command lines."""
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(directory.name)] = int(parent)
    found, generation = [], {os.getpid()}
    while generation := {process for process, parent in parents.items() if parent in generation}:
        found += generation
    return {process: _command_line(process) for process in sorted(found)}


def _command_line(process):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return "ended meanwhile"


def wait_for_the_end(of=descendants):
    """What `of` still finds after `SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while (found := of()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _helpers():
    """What ends with this process: daemons, such as the workers of a loader that is still referred to, fork server and
    resource tracker. `multiprocess` is what `datasets` has in place of `multiprocessing`."""
    for process in multiprocessing.active_children():
        if process.daemon:
            yield process.pid
    for package in ("multiprocessing", "multiprocess"):
        if server := sys.modules.get(f"{package}.forkserver"):
            yield server._forkserver._forkserver_pid
        if tracker := sys.modules.get(f"{package}.resource_tracker"):
            yield tracker._resource_tracker._pid


def end_leftovers():
    """Ends whatever is still there and should not be: process ids with command lines."""
    helpers = set(_helpers())

    def others():
        return {process: line for process, line in descendants().items() if process not in helpers}

    found = wait_for_the_end(others)
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return found


def _checks(config):
    return sys.platform == "linux" and not hasattr(config, "workerinput")  # those of pytest-xdist are descendants


def pytest_configure(config):
    if _checks(config):
        adopt_orphans()


@pytest.hookimpl(wrapper=True, trylast=True)  # after pytest-xdist has ended its workers, before the summary
def pytest_sessionfinish(session):
    result = yield
    if _checks(session.config):
        found = session.config.stash[_FOUND] = end_leftovers()
        if found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return result


def pytest_terminal_summary(terminalreporter, config):
    if found := config.stash.get(_FOUND, {}):
        terminalreporter.section("processes left behind", red=True)
        for process, line in found.items():
            terminalreporter.write_line(f"process {process}: {line}")
        terminalreporter.write_line("The run fails because of them. They have been killed.")
