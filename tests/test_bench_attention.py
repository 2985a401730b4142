import json

import pytest
import torch

from hf_flashcp.attention.kernels.base import hidden
from hf_flashcp.bench import attention, kernels
from hf_flashcp.cli import main
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.errors import ConfigurationError
from hf_flashcp.layout import Rectangle
from hf_flashcp.planning import kv_bytes, plan_documents


LENGTHS = [96, 40, 17, 9]
LAYER = {"heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "fp32"}


@pytest.fixture(scope="module")
def found():
    return attention.measure(LENGTHS, 2, **LAYER, strategies=["whole_doc", "per_doc"], rounds=2)


def test_counts_are_those_of_the_plans(found):
    assert [(case["strategy"], case["exchange"]) for case in found["cases"]] == [
        ("whole_doc", "needed"),
        ("whole_doc", "all"),
        ("per_doc", "needed"),
        ("per_doc", "all"),
    ]
    a_token = kv_bytes(1, 2, 8, 8, 4)
    for case in found["cases"]:
        plan = plan_documents(LENGTHS, 2, strategy=case["strategy"])
        report = plan.report()
        if case["exchange"] == "needed":
            assert case["bytes_received"] == max(report["kv_received"]) * a_token
            assert case["kernel_calls"] == max(report["kernel_calls"])
            assert case["collectives"] == max(report["collectives"])
            assert case["copies"] == max(report["copies"])
        else:
            assert case["bytes_received"] == max(sum(LENGTHS) - tokens for tokens in report["tokens"]) * a_token
            assert case["collectives"] == 2 and case["copies"] is None


def test_times_are_positive(found):
    assert found["seconds"] > 0 and found["rounds"] == 2
    for case in found["cases"]:
        assert case["seconds"] >= case["forward"] > 0 and case["ideal_share"] > 0 and case["waiting"] >= 0
    assert json.loads(json.dumps(found)) == found
    table = attention.text(found)
    assert "single process" in table and table.count("per_doc") == 2


def test_peaks_of_groups_of_kv_heads():
    options = {"strategies": ["per_doc"], "exchanges": ["needed"], "rounds": 1}
    found = attention.measure([512], 2, **{**LAYER, "kv_heads": 4}, head_groups=[1, 2, 4], **options)
    one, two, four = found["cases"]
    assert one["peak_bytes"] > two["peak_bytes"] > four["peak_bytes"] > 0
    assert one["bytes_received"] == two["bytes_received"] == four["bytes_received"] > 0
    assert [each["kernel_calls"] for each in (one, two, four)] == [4, 8, 16]
    assert "MiB at the peak" in attention.text(found) and "head groups" not in attention.text(
        {**found, "cases": [{**one, "peak_bytes": None}]}
    )


def test_drawn_packs(capsys):
    options = (
        "--packs 2 --window 96 --seed 3 --heads 4 --kv-heads 2 --head-dim 8 --rounds 1 --strategies per_doc search"
    )
    assert main(["bench", "attention", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 packs of 96 tokens drawn from pile, 2 processes, 4/2 heads of 8, bf16")
    assert [line.split()[0] for line in lines[-4:]] == ["3", "4", "lowest", "median"]
    assert main(["bench", "attention", *options.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [pack["lengths"] for pack in found["packs"]] == [sample_pack("pile", 96, seed=seed) for seed in (3, 4)]
    for pack in found["packs"]:
        assert pack["seconds"] > 0 and all(share > 0 for share in pack["ideal_share"].values())


@pytest.mark.parametrize("strategy", ["per_doc", "whole_doc"])
def test_an_all_gather_with_a_plan_is_exact_too(pool, strategy):
    """The all-gather must compute the same layer; otherwise its time could not be compared.

    With whole documents, ranks receive keys that none of their queries see.
    """
    plan = plan_documents(LENGTHS, 3, strategy=strategy)
    for errors in pool.run(3, all_gather_errors, plan):
        assert max(errors) < 1e-12


def all_gather_errors(plan):
    from tests import attention_cases as cases

    inputs = cases.make_inputs(plan.lengths, 4, 2, 8, 8, cases.torch.float64, 0)
    reference = cases.reference_attention(list(plan.lengths), *inputs)
    bound = cases.bind(plan)
    bound.layout = attention.AllGatherLayout(plan, bound.rank)
    index = bound.layout.token_index
    query, key, value, grad_out = (tensor.index_select(1, index) for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = cases.document_attention(*leaves, bound)
    out.backward(grad_out)
    return cases.relative_errors([([out.detach(), *(leaf.grad for leaf in leaves)], index, reference)])[0]


def test_kernels_of_every_rank():
    lengths = sample_pack("wlb_llm", 512)
    found = kernels.measure(lengths, 3, **LAYER, strategies=["per_doc", "search"], num_stages=2, rounds=1)
    assert found["chosen"] == "cpu_flash" and found["device"] == "CPU"
    assert list(found["kernels"]) == ["cpu_flash"]  # eager is timed only if it is named
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    for rows in found["kernels"]["cpu_flash"].values():
        assert all(len(rows[name]) == 3 and min(rows[name]) > 0 for name in ("one_call", "kernels", "engine"))
        # Two matrix products in forward and five in backward, of two operations each.
        assert sum(rows["flops"]) == 7 * 2 * 4 * 8 * pairs
    assert "per_doc" in kernels.text(found)


def test_several_kernels_run_the_same_plans():
    found = kernels.measure(
        LENGTHS, 2, **LAYER, kernels=["eager", "cpu_flash"], strategies=["per_doc", "search"], rounds=1
    )
    assert found["chosen"] == "cpu_flash" and list(found["kernels"]) == ["eager", "cpu_flash"]
    eager, fused = found["kernels"].values()
    assert list(eager) == list(fused) == ["per_doc", "search"]
    assert all(eager[name]["flops"] == fused[name]["flops"] for name in eager)
    rows = [line.split()[:2] for line in kernels.text(found).splitlines()[-4:]]
    assert rows == [[kernel, strategy] for kernel in ("eager", "cpu_flash") for strategy in ("per_doc", "search")]


@pytest.mark.parametrize(
    "name, said",
    [
        ("cpu_flahs", "There is no kernel 'cpu_flahs'. Choose one of cpu_flash"),
        (
            "torch_flash",
            "The kernel torch_flash cannot run this layer here: it runs on CUDA only. Choose from cpu_flash, eager.",
        ),
    ],
)
def test_kernels_that_cannot_be_timed(name, said):
    with pytest.raises(ConfigurationError) as error:
        kernels.measure(LENGTHS, 2, **LAYER, kernels=["eager", name])
    assert said in str(error.value)


@pytest.mark.parametrize("rectangle", [Rectangle(3, 8, 2, 7), Rectangle(0, 3, 0, 9), Rectangle(5, 6, 0, 1)])
def test_pairs_of_a_rectangle(rectangle):
    visible = ~hidden(rectangle.queries, rectangle.keys, None, torch.device("cpu"))
    assert kernels.count_pairs([rectangle, rectangle], causal=True) == 2 * visible.sum()
    assert kernels.count_pairs([rectangle], causal=False) == visible.numel()


def test_speed_of_the_slowest_rank():
    times = {"kernels": [1.0, 4.0, 2.0], "flops": [9e12, 2e12, 8e12], "engine": [9.0, 9.0, 9.0]}
    assert kernels.slowest_speed(times) == 0.5


def test_command_lines(capsys):
    layer = "--heads 2 --kv-heads 1 --head-dim 8 --strategies per_doc --rounds 1 --json"
    assert main(f"bench kernels --window 256 --cp-size 2 {layer}".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cp_size"] == 2 and list(found["kernels"]["cpu_flash"]) == ["per_doc"]
    assert main(f"bench kernels --window 256 --cp-size 2 --kernel eager {layer}".split()) == 0
    assert list(json.loads(capsys.readouterr().out)["kernels"]) == ["eager"]
    assert main(f"bench attention --lengths 30,20 --exchange needed {layer}".split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"] == [30, 20] and [case["exchange"] for case in found["cases"]] == ["needed"]
    assert main(["bench", "attention", "--rounds", "0"]) == 2
    assert main(["bench", "attention", "--head-groups", "2", "0"]) == 2
    assert main(["bench", "kernels", "--rounds", "0"]) == 2
