"""No process that a run or the tests have started outlives them."""

import subprocess
import sys

import pytest

from tests import leftover_cases
from tests.launch_cases import run_forked


linux = pytest.mark.skipif(sys.platform != "linux", reason="nobody adopts orphans elsewhere")

LEAVES_ONE = """
import subprocess, sys

def test_it():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)  # left"], start_new_session=True)
"""
LEAVES_NONE = """
import multiprocessing, time

def test_it():
    context = multiprocessing.get_context("forkserver")
    context.Process(target=time.sleep, args=(0.5,)).start()
    context.Process(target=time.sleep, args=(3600,), daemon=True).start()
"""
SHORTER = "from tests import leftovers; leftovers.SECONDS = 1"


@linux
@pytest.mark.parametrize("options", [[], ["-n", "2"]], ids=["one process", "xdist"])
@pytest.mark.parametrize("text", [LEAVES_ONE, LEAVES_NONE], ids=["left", "nothing left"])
def test_a_run_that_leaves_a_process_fails(text, options, tmp_path):
    (tmp_path / "test_it.py").write_text(text)
    (tmp_path / "conftest.py").write_text(SHORTER)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.leftovers",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
    ]
    result = subprocess.run([*command, *options, tmp_path / "test_it.py"], capture_output=True, text=True)
    left = text == LEAVES_ONE
    assert result.returncode == left and "1 passed" in result.stdout, result.stdout + result.stderr
    assert ("# left" in result.stdout) == left


@linux
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_loader_workers_end_with_their_rank(forked, method, tmp_path):
    """Loader workers of any trainer with any collator.

    With forkserver, their parent is a server, which must end too.
    """
    check_ranks(leftover_cases.trainer_s_loader, method, tmp_path)


@linux
def test_loader_workers_of_a_users_loop_end_with_their_rank(forked, tmp_path):
    check_ranks(leftover_cases.own_loader, "forkserver", tmp_path)


def check_ranks(make_loader, method, directory):
    (directory / "read").mkdir()
    run_forked(leftover_cases.ranks_that_end, [make_loader, method, str(directory / "read")], directory / "log")


@linux
def test_workers_of_a_pool_end_with_the_process_that_made_it(forked, tmp_path):
    (tmp_path / "began").mkdir()
    run_forked(leftover_cases.pool_that_is_killed, str(tmp_path / "began"), tmp_path / "log")


@linux
def test_an_open_pool_does_not_keep_its_process_alive(forked, tmp_path):
    run_forked(leftover_cases.pool_that_is_forgotten, None, tmp_path / "log")
