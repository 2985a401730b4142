"""`check_cluster`, and the recipe that uses it."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_flashcp.doctor import cluster, layer_errors
from hf_flashcp.errors import ConfigurationError


ROOT = Path(__file__).parent.parent


def checked(**options):
    return cluster.check_cluster(dist.group.WORLD, torch.device("cpu"), megabytes=1, **options)


@pytest.mark.parametrize("cp_size", [2, 3])
def test_a_working_cluster(pool, cp_size):
    found = pool.run(cp_size, checked)
    for rank in found:
        assert rank["ranks"] == found[0]["ranks"] and len(rank["ranks"]) == cp_size
        assert list(rank["links"]) == ["node"]
        link = rank["links"]["node"]
        assert link["bytes_per_second"] >= link["slowest_bytes_per_second"] > 0 and link["latency_seconds"] > 0
        assert {dtype: layer["error"] <= layer["limit"] for dtype, layer in rank["layer"].items()} == {
            "float64": True,
            "bfloat16": True,
        }
        assert rank["layer"]["float64"]["limit"] == 1e-12
        assert {layer["kernel"] for layer in rank["layer"].values()} == {"cpu_flash"}
    assert json.loads(json.dumps(found[0])) == found[0]


def with_wrong_data():
    original = dist.all_to_all_single

    def corrupting(output, *args, **kwargs):
        original(output, *args, **kwargs)
        if dist.get_rank() == 1:
            output += 1

    dist.all_to_all_single = corrupting
    try:
        checked()
    finally:
        dist.all_to_all_single = original


def with_a_wrong_layer():
    original = layer_errors.document_attention

    def scaled(*args, **kwargs):
        out = original(*args, **kwargs)
        return out * 1.01 if dist.get_rank() == 0 else out

    layer_errors.document_attention = scaled
    try:
        checked()
    finally:
        layer_errors.document_attention = original


def with_another_version():
    original = cluster.__version__
    cluster.__version__ = f"0.{dist.get_rank()}"
    try:
        checked()
    finally:
        cluster.__version__ = original


@pytest.mark.parametrize(
    "function, message",
    [
        (with_wrong_data, r"an all-to-all delivered wrong data to rank 1 .*: check the network"),
        (with_a_wrong_layer, r"attention in torch.float64 with the kernel cpu_flash is off by 1.*e-02 on rank 0"),
        (with_another_version, r'Ranks disagree on versions: hf_flashcp is "0.0" on rank 0 and "0.1" on rank 1'),
    ],
)
def test_problems_are_named_on_every_rank(pool, function, message):
    for error in pool.errors(2, function):
        assert isinstance(error, ConfigurationError)
        with pytest.raises(ConfigurationError, match=message):
            raise error


def one_rank_stays_away():
    if dist.get_rank() == 0:
        checked(timeout=datetime.timedelta(seconds=2))


def test_a_missing_rank_is_named(pool):
    error, nothing = pool.errors(2, one_rank_stays_away)
    assert nothing is None and "Waited 2 seconds for ranks [1] to compare versions" in str(error)


def test_recipe(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_cp2.yaml"]
    command += ["recipes/check_cluster.py", "--megabytes", "1", "--json_file", str(tmp_path / "found.json")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "COLUMNS": "120"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "2 processes" in result.stdout and "cpu_flash" in result.stdout
    assert len(json.loads((tmp_path / "found.json").read_text())["ranks"]) == 2
