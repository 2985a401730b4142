"""Input from elsewhere: no code in it is run, and what is no plan, profile, config or log is one of our errors."""

import ast
import contextlib
import copy
import io
import json
import tempfile
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp import ShardPlan
from hf_flashcp.cli import main
from hf_flashcp.cli.report import read_series, summarize
from hf_flashcp.data.json_lines import _corrupt_lines
from hf_flashcp.data.lengths import read_lengths
from hf_flashcp.errors import ConfigurationError, PlanError
from hf_flashcp.planning import STRATEGIES, CostModel, HardwareProfile, plan_documents
from hf_flashcp.planning.memory_shape import MemoryShape
from hf_flashcp.planning.model_shape import LLAMA_3_8B
from hf_flashcp.planning.simulation import simulate
from tests.packs import arbitrary_plans


ROOT = Path(__file__).parent.parent

RUN_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALL_OUT = {"urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "huggingface_hub"}
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
SAFE = {"shell": "False", "trust_remote_code": "False", "allow_pickle": "False"}
ALLOWED = {("hf_flashcp/doctor/workers.py", "pickle")}  # over pipes to processes that it has started itself


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
def test_what_would_be_unsafe_is_found(line):
    assert len(list(unsafe(ast.parse(line)))) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([2**31, 10**30]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, original):
    """JSON in which one or two values have become something else."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        place = value
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or not draw(st.integers(0, 3)):
                break
            place = place[key]
        place[key] = draw(json_values)
    return value


def reads_as_a_plan_or_raises(data):
    try:
        plan = ShardPlan.from_dict(data)
    except PlanError:
        return
    assert ShardPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@settings(max_examples=200)
@given(
    json_values | st.fixed_dictionaries(dict.fromkeys(("lengths", "cp_size", "slices", "offset_groups"), json_values))
)
def test_what_is_no_plan(data):
    reads_as_a_plan_or_raises(data)


@settings(max_examples=200)
@given(arbitrary_plans().flatmap(lambda plan: changed({**plan.to_dict(), "offset_groups": None})))
def test_changed_plans(data):
    reads_as_a_plan_or_raises(data)


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
        ({"cp_size": float("nan")}, "cp_size must be an integer"),
        ({"lengths": nested(100_000)}, "whole numbers of tokens"),
        ({"slices": nested(100_000)}, "slices must hold"),
        ({"offset_groups": nested(100_000)}, "offset_groups are"),
        ({"slices": [[[0, -1, 3]], PLAN["slices"][1]]}, r"holds tokens \[-1, 3\)"),
    ],
)
def test_plans_that_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        ShardPlan.from_dict({**PLAN, **change})


def test_keys_that_stand_twice_are_one_plan_or_none():
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


H100 = json.loads((ROOT / "hf_flashcp" / "planning" / "hardware" / "h100.json").read_text(encoding="utf-8"))
CONFIG = {
    **LLAMA_3_8B,
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "sliding_window": 128,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
    "final_logit_softcapping": 30.0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
A_PLAN = plan_documents([50, 20], 2)


def prices_or_raises(config, profile):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numbers beyond what floats hold
        try:
            MemoryShape.from_config(config)
            CostModel.from_config(config, HardwareProfile.from_dict(profile)).step_time(A_PLAN)
        except ConfigurationError:
            pass


@given(json_values | changed(H100))
def test_what_is_no_hardware_profile(profile):
    prices_or_raises(LLAMA_3_8B, profile)


@given(st.dictionaries(st.sampled_from(sorted(CONFIG)), json_values) | changed(CONFIG))
def test_what_is_no_config(config):
    prices_or_raises(config, H100)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ranks_per_node": "8"}, "ranks_per_node = '8': a positive number"),
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


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"1" * 5000, b'{"hidden_size": 1e999}'])
def test_files_that_are_none(tmp_path, text):
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


@given(changed({"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "epoch": 0.1, "loss": 1.0}]}))
def test_logs_that_are_none(state):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(state, file)
        file.flush()
        with contextlib.suppress(ConfigurationError):
            summarize(read_series(Path(file.name)))


def run(*line):
    """Exit code, stdout and stderr of a command line, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


whole = st.sampled_from(["1", "2", "3", "64", "4096", "0", "-1", "x", "9" * 30])
ratios = st.sampled_from(["1", "1.05", "2", "1e3", "inf", "0.5", "-1", "nan", "x"])


def some(**options):
    """Option strings: any of the options, each with a value of its own; those whose strategy is None take none."""
    flags = {
        name: st.just([]) if values is None else values.map(lambda value: [value]) for name, values in options.items()
    }
    chosen = st.fixed_dictionaries({}, optional=flags)
    return chosen.map(
        lambda given: [part for name, value in given.items() for part in ("--" + name.replace("_", "-"), *value)]
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in {
        "llama": LLAMA_3_8B,
        "list": [],
        "state": {"log_history": [{"step": 1, "loss": 2.0}]},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


@settings(max_examples=150)
@given(st.data())
def test_any_command_line_says_what_is_wrong_or_works(files, data):
    models = st.sampled_from([str(files / "llama.json"), str(files / "list.json")])
    hardware = st.sampled_from(["h100", "h1000", str(files / "list.json"), str(files)])
    command = data.draw(st.sampled_from(["plan", "estimate", "report"]))
    common = {"window": whole, "seed": whole, "cp_size": whole}
    line = [command]
    if command == "plan":
        lengths = st.sampled_from(["8", "8,5,3", "4096,64,1", "0", "1,,2", "9" * 30])
        caps = {"max_imbalance": ratios, "max_token_imbalance": ratios, "sliding_window": whole}
        line += data.draw(
            st.sampled_from(["--lengths 9,5,3 --cp-size 2", "--lengths-from pile --window 4096 --cp-size 2", ""])
        ).split()
        line += data.draw(some(lengths=lengths, strategy=st.sampled_from([*STRATEGIES, "x"]), **common, **caps))
        line += data.draw(some(hardware=hardware, model=models))
    elif command == "estimate":
        line += data.draw(
            st.sampled_from([["--model", str(files / "llama.json"), "--window", "64", "--gpus", "2"], []])
        )
        line += data.draw(some(model=models, hardware=hardware, gpus=whole, **common))
    else:
        line.append(str(files / data.draw(st.sampled_from(["state.json", "list.json", "llama.json", "nowhere", ""]))))
        line.append("--json")
    line += data.draw(some(json=None))
    code, out, err = run(*line)
    assert code in (0, 2) and "Traceback" not in err, line
    if code == 2:
        assert err and (not out or "does not fit on" in err), "an estimate is printed before it says that nothing fits"
    elif "--json" in line:
        json.loads(out, parse_constant=no_constant)
    else:
        assert out
