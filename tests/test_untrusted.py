"""Untrusted input: no code in it is run, and invalid plans, profiles, configs and logs raise our errors."""

import ast
import json
from pathlib import Path

import pytest

from hf_flashcp import ShardPlan
from hf_flashcp.cli.report import read_series
from hf_flashcp.data.json_lines import _corrupt_lines
from hf_flashcp.data.lengths import read_lengths
from hf_flashcp.errors import ConfigurationError, PlanError
from hf_flashcp.planning import CostModel, HardwareProfile
from hf_flashcp.simulation.simulate import simulate
from tests.fuzz.command_lines import no_constant, run
from tests.fuzz.values import CONFIG, H100
from tests.hybrid_sizes import HYBRIDS, SIZES


ROOT = Path(__file__).parent.parent

RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALL_OUT = {"urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
SAFE = {"shell": "False", "trust_remote_code": "False", "allow_pickle": "False"}
ALLOWED = {("hf_flashcp/distributed/workers.py", "pickle")}  # over pipes to its own child processes


def unsafe(tree):
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from {each.name.split(".")[0] for each in names} & (RUN_CODE | CALL_OUT)
            case ast.ImportFrom(module=str(module), level=0):
                yield from {module.split(".")[0]} & (RUN_CODE | CALL_OUT)
            case ast.Call(func=func, keywords=keywords):
                name, given = ast.unparse(func), {each.arg: ast.unparse(each.value) for each in keywords}
                if name in CALLS or name == "torch.load" and given.get("weights_only") != "True":
                    yield name
                yield from (name for name, safe in SAFE.items() if given.get(name, safe) != safe)


def test_nothing_runs_code_from_data_or_calls_out():
    files = [path for folder in ("hf_flashcp", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        (path.relative_to(ROOT).as_posix(), what)
        for path in files
        for what in unsafe(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(files) > 100 and found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import os, pickle",
        "from urllib.request import urlopen",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(line, shell=True)",
        "AutoConfig.from_pretrained(name, trust_remote_code=trust)",
    ],
)
def test_unsafe_code_is_found(line):
    assert len(list(unsafe(ast.parse(line)))) == 1


PLAN = {"lengths": [4, 2], "cp_size": 2, "slices": [[[0, 0, 3]], [[0, 3, 4], [1, 0, 2]]]}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": 6}, "lengths must be a sequence"),
        ({"lengths": [4, True]}, "true or false"),
        ({"slices": [[[False, 0, 3]], PLAN["slices"][1]]}, "true or false"),
        ({"lengths": [10**30, 2]}, "at most 2,147,483,647 tokens"),
        ({"cp_size": 10**30}, "at most 2,147,483,647 tokens"),
        ({"lengths": [2**30], "cp_size": 2**29, "offset_groups": [[1]]}, "offset_groups are"),
        ({"lengths": [2**30], "cp_size": 2**29, "slices": []}, "slices for 0 ranks"),
        ({"cp_size": float("nan")}, "cp_size must be a positive integer"),
        ({"lengths": nested(100_000)}, "whole numbers of tokens"),
        ({"slices": nested(100_000)}, "slices must hold"),
        ({"offset_groups": nested(100_000)}, "offset_groups are"),
        ({"slices": [[[0, -1, 3]], PLAN["slices"][1]]}, r"holds tokens \[-1, 3\)"),
    ],
)
def test_plans_that_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        ShardPlan.from_dict({**PLAN, **change})


def test_duplicate_keys_give_one_plan_or_an_error():
    text = json.dumps(PLAN)
    assert ShardPlan.from_dict(json.loads(text[:-1] + ', "cp_size": 2}')) == ShardPlan.from_dict(PLAN)
    with pytest.raises(PlanError):
        ShardPlan.from_dict(json.loads(text[:-1] + ', "cp_size": 3}'))


def test_a_plan_of_a_million_slices():
    half = range(0, 1_000_000, 2)
    slices = [[[0, start + rank, start + rank + 1] for start in half] for rank in range(2)]
    plan = ShardPlan.from_dict({"lengths": [1_000_000], "cp_size": 2, "slices": slices})
    assert sum(map(len, plan.slices)) == 1_000_000
    slices[1][-1][2] += 1
    with pytest.raises(PlanError, match="holds tokens"):
        ShardPlan.from_dict({"lengths": [1_000_000], "cp_size": 2, "slices": slices})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ranks_per_node": "8"}, "ranks_per_node = '8': give a positive number"),
        ({"ranks_per_node": 0.5}, "ranks_per_node = 0.5"),
        ({"ranks_per_node": True}, "ranks_per_node = True"),
        ({"linear_flops_per_second": 10**400}, "linear_flops_per_second = 1000"),
        ({"kernel": "fast"}, "cannot be read"),
        ({"description": ["h100"]}, "description"),
    ],
)
def test_profiles_that_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        HardwareProfile.from_dict({**H100, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "4096"}, "hidden_size = '4096': it must be a whole number from 0 to 16,777,216"),
        ({"intermediate_size": [1, 2]}, "intermediate_size"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"layer_types": {"full_attention": 1}}, "layer_types"),
        ({"model_type": {}}, "model_type"),
        ({"v_head_dim": None}, "no v_head_dim"),
        ({"layer_types": ["linear_attention"]}, "no layers with attention"),
    ],
)
def test_configs_that_are_refused(change, message):
    with pytest.raises(ConfigurationError, match=message):
        simulate([50, 20], 2, {**CONFIG, **change}, CostModel.from_config({**CONFIG, **change}, "h100"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layer_types": None, "linear_attn_config": {"head_dim": "128"}}, "a dict of sizes and lists of layers"),
        ({"layer_types": None, "linear_attn_config": {"full_attn_layers": 4}}, "a dict of sizes and lists of layers"),
        ({"linear_attn_config": [1]}, "linear_attn_config = .1.: it must be a dict"),
        ({"mlp_layer_types": "dense"}, "mlp_layer_types = 'dense': it must be a list of names"),
        ({"num_experts_per_token": 0.5, "num_experts_per_tok": None}, "num_experts_per_token = 0.5"),
        ({"linear_head_dim": -1}, "linear_head_dim = -1: it must be a whole number"),
    ],
)
def test_configs_of_hybrid_models_that_are_refused(change, message):
    config = {"model_type": "kimi_linear", **SIZES, **HYBRIDS["kimi_linear"], **change}
    with pytest.raises(ConfigurationError, match=message):
        CostModel.from_config(config, "h100")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"1" * 5000, b'{"hidden_size": 1e999}'])
def test_paths_that_are_not_files(tmp_path, text):
    file = tmp_path / "file.json"
    file.write_bytes(text)
    with pytest.raises(ConfigurationError):
        HardwareProfile.load(file)
    with pytest.raises(ConfigurationError):
        read_series(file)
    code, out, err = run("estimate", "--window", "64", "--gpus", "2", "--model", str(file))
    assert code == 2 and not out and err.startswith("error: ")
    lines = file.with_suffix(".jsonl")
    lines.write_bytes(text or b"{")
    with pytest.raises(PlanError):
        read_lengths(lines)
    assert [number for number, _ in _corrupt_lines(lines)] == [1] * (b"1e999" not in text)


@pytest.mark.parametrize("line", ["report", "simulate --lengths 64,20 --cp-size 2 --hardware"])
def test_json_has_null_for_nan_and_infinity(tmp_path, line):
    """NaN and infinity come from the logs of a diverged run, and as MFU from a profile without a peak."""
    contents = {"report": '{"log_history": [{"step": 1, "loss": NaN}, {"step": 2, "loss": Infinity}]}'}
    (tmp_path / "file.json").write_text(contents.get(line) or json.dumps({**H100, "peak_flops_per_second": None}))
    code, out, _ = run(*line.split(), str(tmp_path / "file.json"), "--json")
    found = json.loads(out, parse_constant=no_constant)
    found = found["summary"]["loss"]["mean"] if line == "report" else found["cells"][0]["schemes"]["search"]["mfu"]
    assert code == 0 and found is None


@pytest.mark.parametrize(
    "entry",
    [
        {"step": 1, "loss": 1e308},
        {"step": 1, "loss": float("nan")},
        {"step": 1, "lo\ud800ss": 1.0, "flashcp_\ud800": 1.0},
        {"step": 1, "flashcp_$\\no$": 1.0},
    ],
)
def test_pages_of_strange_logs(tmp_path, entry):
    (tmp_path / "\udcff.json").write_text(json.dumps({"log_history": [{"step": 0, "loss": -1e308}, entry]}))
    code, out, err = run("report", str(tmp_path / "\udcff.json"), "--html", str(tmp_path / "\udcff.html"))
    assert code == 0 and "times logged" in out and not err
    assert "</html>" in (tmp_path / "\udcff.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line",
    [
        "plan --lengths 64,20 --cp-size 2 --sliding-window 0 --plot new.svg",
        "plan --lengths 9,9 --cp-size 2 --hardware h100 --model {long}",
        "plan --lengths 9,9 --cp-size 2 --hardware h100 --model {lines}",
        "simulate --lengths 9,9 --cp-size 2 --ranks-per-node 999999999999999999999",
        "report {long}",
        "report {lines}",
        "report {steps}",
    ],
)
def test_errors_are_one_line_and_leave_no_files(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps").write_text('{"log_history": [{"step": 1%s, "loss": 1}]}' % ("0" * 400))
    names = {"{long}": "a" * 5000, "{lines}": "a\nb", "{steps}": "steps"}
    code, out, err = run(*(names.get(word, word) for word in line.split()))
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["steps"]
