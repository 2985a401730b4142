"""Attached models exchange KV in a process group of their own, of which nothing is left when they are removed."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist

from tests import exchange_group_cases as cases
from tests.launch_cases import ROOT


OWN, INSIDE = "flashcp exchange", "flashcp exchange inside nodes"
LAYERS = 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("world_size, cp_size, ranks_per_node", [(2, 2, None), (4, 2, None), (4, 4, 2)])
def test_100_cycles_leave_nothing(pool, world_size, cp_size, ranks_per_node):
    for early, late in pool.run(world_size, cases.cycles, cp_size, 100, ranks_per_node):
        for measured in (early, late):
            del measured["MB"], measured["objects"]
        assert early == late


def test_ranks_of_other_groups_do_not_take_part(pool):
    """Only one of two groups attaches; then both do, which have made different numbers of groups."""
    pool.run(4, cases.cycles, 2, 10, None, [2, 3])
    pool.run(4, cases.cycles, 2, 10)


@pytest.mark.parametrize("world_size, cp_size, ranks_per_node", [(2, 2, None), (4, 2, None), (4, 4, 2)])
def test_exchanges_use_their_own_groups(pool, world_size, cp_size, ranks_per_node):
    forward = [OWN, INSIDE] if ranks_per_node else [OWN]
    for found in pool.run(world_size, cases.groups_of_a_step, cp_size, ranks_per_node):
        calls = found.pop("calls")
        assert calls == [*LAYERS * forward, *LAYERS * forward[::-1]]
        assert all(found.values()), found


def test_models_of_a_mesh_share_a_group(pool):
    pool.run(1, dist.get_world_size)  # so that the next world is new, without models that other tests attached
    pool.run(2, cases.sharing)


def test_ranks_that_disagree_about_the_group(pool):
    for kind, message, _ in pool.run(2, cases.one_rank_removes):
        assert kind == "ConfigurationError"
        assert re.search(r"exchange groups made is \d+ on rank 0 and \d+ on rank 1\.", message)


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", "gloo"])
def test_streams_have_high_priority_under_nccl(pool, backend):
    for found in pool.run(2, cases.arguments_under_nccl, backend):
        assert found == {
            "backend": backend,
            "high priority": None if backend == "gloo" else True,
            "timeouts": True,
            "name": "a description",
            "bound": (None, "cuda:0"),
        }


def test_all_groups_are_destroyed_before_the_handle_is_removed(pool):
    pool.run(2, cases.destroyed_before_removal)
    pool.close()  # the workers have left their world


def test_the_interpreter_ends_quietly_without_remove():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.left_attached"],
            cwd=ROOT,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0 and output == "trained"
    finally:
        for process in processes:
            process.kill()
