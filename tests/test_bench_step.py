import json

import pytest
import torch

from hf_flashcp.bench import step, traces
from hf_flashcp.bench.step_worker import run_turn
from hf_flashcp.planning import plan_documents
from tests.test_cli import png_size, run


TINY = {
    **step.QWEN3,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def test_command(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    line = f"bench step --lengths-from pile --window 64 --rounds 1 --model {tmp_path / 'config.json'} --json"
    code, out, err = run(capsys, f"{line} --plot {tmp_path / 'layer.png'}")
    assert code == 0 and err == f"plot written to {tmp_path / 'layer.png'}\n"
    assert png_size(tmp_path / "layer.png")[0] > 800
    found = json.loads(out)
    assert (found["window"], found["cp_size"], found["rounds"], found["config"]["hidden_size"]) == (64, 2, 1, 32)
    (pack,) = found["packs"]
    single, *cases = pack["cases"]
    assert pack["corpus"] == "pile" and sum(pack["lengths"]) == 64
    assert (single["strategy"], single["ideal_share"], single["shares"]["waiting"]) == (step.SINGLE, 1, 0)
    assert [(case["strategy"], case["exchange"]) for case in cases] == [
        (strategy, exchange)
        for strategy in ("per_doc", "per_seq", "flashcp", "search")
        for exchange in ("needed", "all")
    ]
    for case in pack["cases"]:
        assert set(case["shares"]) == set(traces.PARTS) and min(case["shares"].values()) >= 0
        assert sum(case["shares"].values()) == pytest.approx(1)
        assert case["tokens_per_second"] == pytest.approx(64 / case["seconds"]) and case["ideal_share"] > 0
        assert case["cpu_ideal_share"] > 0
        assert case["loss"] == pytest.approx(single["loss"], rel=1e-5)
        assert case["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
        assert case["peak_bytes"] > 0 and case["profiled_seconds"] > 0
    assert any(case["shares"]["waiting"] > 0 for case in cases)
    assert (found["layer"]["strategy"], found["layer"]["exchange"]) == ("search", "needed")
    table = step.text(found)
    assert "64 tokens, 2 processes, 1 thread each" in table and table.count("search") == 2


def test_given_documents_of_a_hybrid_model():
    config = {**step.QWEN3_5, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    found = step.measure(
        [], 64, 2, config=config, lengths=[70, 1], strategies=["per_doc"], exchanges=["needed"], rounds=1
    )
    (pack,) = found["packs"]
    assert (pack["corpus"], pack["lengths"]) == ("lengths", [70, 1])
    single, case = pack["cases"]
    assert case["tokens_per_second"] == pytest.approx(71 / case["seconds"])
    assert case["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
    assert "71 tokens, 2 processes" in step.text(found)


def test_stages_and_an_all_gather_compute_the_same_step(pool):
    """On three ranks, one stage and several differ."""
    plan = plan_documents([70, 30, 20], 3, strategy="per_doc")
    staged = plan_documents([70, 30, 20], 3, strategy="per_doc", num_stages=2)
    assert staged != plan
    cases = [(plan_documents([70, 30, 20], 1), False), (plan, False), (staged, False), (plan, True)]
    ranks = pool.run(3, run_turn, (json.dumps(TINY), "fp32", "cpu", 1), cases, [2, 3, 0, 1], True)
    assert [sorted(rank) for rank in ranks] == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3]]
    alone = ranks[0][0]
    for index in (1, 2, 3):
        assert sum(rank[index]["loss"] for rank in ranks) / 3 == pytest.approx(alone["loss"], rel=1e-5)
        assert all(rank[index]["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5) for rank in ranks)
    for rank in ranks:
        for row in rank.values():
            assert sum(row["parts"].values()) <= row["seconds"]
        assert {"stage 1", "stage 2"} <= {name for name, *_ in rank[2]["layer"]["forward"]}
        assert {"stage 1, backward", "local pass, backward"} <= {name for name, *_ in rank[2]["layer"]["backward"]}


def test_a_case_that_computes_something_else_is_an_error():
    case = {"strategy": "search", "exchange": "needed", "loss": 2.0, "grad_norm": 1.0}
    step.check_agreement([case, {**case, "loss": 2.00001}], 1e-5)
    with pytest.raises(AssertionError, match="loss of search, needed: 2.0001"):
        step.check_agreement([case, {**case, "loss": 2.0001}], 1e-5)
    with pytest.raises(AssertionError, match="grad_norm"):
        step.check_agreement([case, {**case, "grad_norm": float("nan")}], 1e-5)


NODE = "autograd::engine::evaluate_function: "
EVENTS = [
    ("step", 0, 100, None),
    ("layer", 5, 30, None),
    ("aten::mm", 6, 4, 1),
    ("flashcp::attention", 10, 20, 2),
    ("flashcp: local pass", 11, 5, None),
    ("aten::mm", 12, 2, None),
    ("flashcp: wait for the keys and values of other ranks", 20, 5, None),
    ("aten::mul", 31, 2, 3),
    ("forward is done", 40, 0, None),
    ("backward", 42, 40, None),
    (NODE + "MulBackward0", 43, 2, 3),
    (NODE + "_DocumentAttentionBackward", 45, 10, 2),
    ("flashcp: local pass, backward", 46, 8, None),
    (NODE + "MmBackward0", 56, 8, 1),
    ("aten::mm", 57, 6, None),
    (NODE + "EmbeddingBackward0", 66, 4, 0),
    ("optimizer", 83, 7, None),
]


def events():
    """Return events of one thread, and of another thread that must be ignored."""
    for name, begin, duration, number in EVENTS:
        arguments = {} if number is None else {"Sequence number": number}
        yield {"name": name, "ts": begin, "dur": duration, "tid": 1, "args": arguments}
    yield {"name": "aten::mm", "ts": 0, "dur": 100, "tid": 2}


def test_parts_of_a_trace():
    microseconds = {part: 1e6 * seconds for part, seconds in traces.seconds_by_part(events()).items()}
    assert list(microseconds) == list(traces.PARTS)
    assert microseconds == pytest.approx(
        {"linear": 10, "attention": 25, "waiting": 5, "gradients": 12, "optimizer": 7, "other": 41}
    )


def test_a_layer_of_a_trace():
    bars = traces.layer_bars(events())
    assert bars["forward"][0][1:] == pytest.approx((5e-6, 35e-6))
    assert [name for name, *_ in bars["forward"]] == [
        "layer",
        "linear",
        "local pass",
        "wait for the keys and values of other ranks",
    ]
    assert [name for name, *_ in bars["backward"]] == ["layer", "linear", "local pass, backward"]
    assert bars["backward"][0][1:] == pytest.approx((43e-6, 64e-6))


@pytest.mark.parametrize(
    "options, message",
    [
        ("--rounds 0", "--rounds must be at least 1"),
        ("--threads 0", "--threads must be at least 1"),
        ("--cp-size 1", "--cp-size must be at least 2"),
        ("--window 1", "tokens"),
        ("--model no_such_model", "No usable config for 'no_such_model'"),
        ("--device cuda --plot layer.png", "--plot draws a step on CPU"),
        (f"--device cuda --cp-size {torch.cuda.device_count() + 2}", "GPUs, but PyTorch sees"),
    ],
)
def test_errors(capsys, options, message):
    code, out, err = run(capsys, f"bench step {options}")
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err
