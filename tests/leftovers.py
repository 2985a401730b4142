"""A pytest plugin that fails the run if a process that it started is still running when it ends.

On Linux the process that runs pytest adopts the orphaned processes of its descendants. So all of them are found, in
any session and with any environment or command line. On other systems nothing is checked.
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


SECONDS = 20  # grace period for processes that are about to end
PR_SET_CHILD_SUBREAPER = 36
_FOUND = pytest.StashKey[dict]()


def adopt_orphans():
    """Make descendants whose parent ends children of this process, from this call on."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def descendants():
    """Return the ids and command lines of the running descendants of this process."""
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended in the meantime
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
    """Return the processes that `of` still finds after `SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while (found := of()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _helpers():
    """Return the processes that end together with this one: daemons, the fork server and the resource tracker.

    Daemons are, for example, workers of a loader that is still referenced. `datasets` uses `multiprocess` in place of
    `multiprocessing`.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            yield process.pid
    for package in ("multiprocessing", "multiprocess"):
        if server := sys.modules.get(f"{package}.forkserver"):
            yield server._forkserver._forkserver_pid
        if tracker := sys.modules.get(f"{package}.resource_tracker"):
            yield tracker._resource_tracker._pid


def end_leftovers():
    """End the processes that should not be running any more. Return their ids with command lines."""
    helpers = set(_helpers())

    def others():
        return {process: line for process, line in descendants().items() if process not in helpers}

    found = wait_for_the_end(others)
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return found


def _checks(config):
    return sys.platform == "linux" and not hasattr(config, "workerinput")  # workers of pytest-xdist are descendants


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
