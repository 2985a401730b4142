import json
import math
import re

import pytest
from hypothesis import given

from hf_flashcp.bench.plans.plan_quality import measure, plan_quality, text
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.errors import PlanError
from hf_flashcp.planning import STRATEGIES, plan_documents
from hf_flashcp.planning.lower_bound import kv_lower_bound
from tests.packs import arbitrary_plans


@pytest.fixture(scope="module")
def found():
    return measure(["pile", "wlb_llm"], [4096, 8192], [2, 4], packs=2, seed=3)


@given(arbitrary_plans())
def test_plan_quality_equals_the_report(plan):
    report, quality = plan.report(), plan_quality(plan)
    assert quality["kv_total"] == report["kv_total"]
    assert quality["bottleneck"] == max(report["kv_received"] + report["kv_sent"])
    assert quality["pair_imbalance"] == report["pair_imbalance"]
    assert quality["token_imbalance"] == report["token_imbalance"]
    assert quality["tokens_equal"] == (max(report["tokens"]) - min(report["tokens"]) <= 1)
    assert quality["slices"] == sum(map(len, plan.slices))


def test_cells_are_means_of_the_reports(found):
    assert len(found["cells"]) == 2 * 2 * 2
    for cell in found["cells"]:
        drawn = [sample_pack(cell["corpus"], cell["window"], seed=seed) for seed in (3, 4)]
        bounds = [kv_lower_bound(lengths, cell["cp_size"]) for lengths in drawn]
        assert cell["kv_bound"] == sum(bounds) / 2 and cell["documents"] == sum(map(len, drawn)) / 2
        assert list(cell["strategies"]) == list(STRATEGIES)
        for strategy, row in cell["strategies"].items():
            plans = [plan_documents(lengths, cell["cp_size"], strategy=strategy) for lengths in drawn]
            reports = [plan.report() for plan in plans]
            assert row["kv_total"] == sum(report["kv_total"] for report in reports) / 2
            assert row["bottleneck"] == sum(max(report["kv_received"] + report["kv_sent"]) for report in reports) / 2
            assert row["pair_imbalance"] == pytest.approx(sum(report["pair_imbalance"] for report in reports) / 2)
            assert row["slices"] == sum(len(slices) for plan in plans for slices in plan.slices) / 2
            assert row["plan_ms"] > 0


def test_plans_within_the_caps_are_not_below_the_bound(found):
    for cell in found["cells"]:
        assert cell["strategies"]["flashcp"]["within_caps"] == 1
        for row in cell["strategies"].values():
            assert row["bound_ratio"] is None or row["bound_ratio"] >= 1
        if cell["kv_bound"]:
            row = cell["strategies"]["flashcp"]
            assert row["bound_ratio"] == pytest.approx(row["kv_total"] / cell["kv_bound"])


def test_summary_is_over_the_cells_with_a_bound(found):
    bounded = [cell for cell in found["cells"] if cell["kv_bound"]]
    assert 0 < found["summary_cells"] == len(bounded)
    ratios = [cell["strategies"]["per_doc"]["bound_ratio"] for cell in bounded]
    assert found["summary"]["per_doc"]["bound_ratio"] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert found["summary"]["whole_doc"]["kv_fraction"] is None
    assert found["summary"]["per_doc"]["within_caps"] == 1


def test_table_and_json(found):
    assert json.loads(json.dumps(found)) == found
    table = text(found)
    assert len(re.findall(r"^(?:pile|wlb_llm) +[48],", table, re.MULTILINE)) == 8
    for strategy in STRATEGIES:
        assert re.search(rf"^{strategy} ", table, re.MULTILINE)


def test_caps_seeds_and_other_planners():
    def everything_zigzag(lengths, cp_size):
        return plan_documents(lengths, cp_size, strategy="per_doc")

    options = {"packs": 1, "strategies": ["flashcp"], "others": {"zigzag": everything_zigzag}}
    wide = measure("pile", [4096], [4], max_imbalance=3.0, max_token_imbalance=3.0, **options)
    tight = measure("pile", [4096], [4], **options)
    assert list(wide["summary"]) == ["flashcp", "zigzag"] and wide["max_token_imbalance"] == 3.0
    assert wide["cells"][0]["kv_bound"] < tight["cells"][0]["kv_bound"]
    assert wide["summary"]["flashcp"]["pair_imbalance"] > tight["summary"]["flashcp"]["pair_imbalance"]
    assert (
        wide["cells"][0]["strategies"]["zigzag"]["kv_total"] == tight["cells"][0]["strategies"]["zigzag"]["kv_total"]
    )
    assert measure("pile", [4096], [4], seed=1, **options)["cells"] != tight["cells"]
    assert "tokens at most 3 x the mean" in text(wide)


def test_progress_is_silent_without_a_terminal(capsys):
    measure("pile", [1024], [2], packs=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "corpora, windows, cp_sizes, message",
    [
        ("piles", [64], [2], "Unknown length distribution"),
        ("pile", [0], [2], "window"),
        ("pile", [64], [0], "cp_size"),
    ],
)
def test_bad_input_is_named(corpora, windows, cp_sizes, message):
    with pytest.raises(PlanError, match=message):
        measure(corpora, windows, cp_sizes, packs=1)
