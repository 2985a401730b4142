"""`flashcp plan --explain`: what limits a step, its distance from the bound, and what other choices give."""

import json
import warnings
from dataclasses import replace

import pytest

from hf_flashcp.cli import main
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.planning import CostModel, HardwareProfile, PlanSettings, ShardPlan, plan_with
from hf_flashcp.planning.explanation import other_choices, seconds_bound, step_limits
from hf_flashcp.planning.time_bound import step_time_bound
from hf_flashcp.predict.model_shape import LLAMA_3_8B
from tests.hybrid_sizes import QWEN3_NEXT


H100 = HardwareProfile.load("h100")


def model_of(ranks_per_node=8, config=LLAMA_3_8B):
    return CostModel.from_config(config, replace(H100, ranks_per_node=ranks_per_node))


@pytest.fixture
def line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    return f"plan --lengths-from pile --window 65536 --cp-size 8 --hardware h100 --model {path}"


def run(capsys, line):
    code = main(line.split())
    return code, *capsys.readouterr()


@pytest.mark.parametrize("strategy", ["whole_doc", "per_doc", "per_seq", "flashcp", "search"])
@pytest.mark.parametrize("ranks_per_node", [1, 4, 8])
@pytest.mark.parametrize("config", [LLAMA_3_8B, QWEN3_NEXT], ids=["llama", "hybrid"])
def test_limits_add_up_to_the_step(strategy, ranks_per_node, config):
    model = model_of(ranks_per_node, config)
    plan = plan_with(PlanSettings(8, strategy), sample_pack("wlb_llm", 65536))
    limits = step_limits(plan, model)
    assert sum(limits) == pytest.approx(model.step_time(plan).seconds) and min(limits) >= 0
    assert limits.linear == pytest.approx(model.step_time(plan).linear.mean())
    assert limits.between == 0 if ranks_per_node == 8 else limits.inside == 0 if ranks_per_node == 1 else True
    assert (limits.scan > 0) == (config is QWEN3_NEXT) and (limits.states == 0 or config is QWEN3_NEXT)


def test_there_is_no_bound_beyond_the_caps():
    lengths, model = sample_pack("pile", 65536), model_of()
    plan = plan_with(PlanSettings(8, "per_doc"), lengths)
    assert seconds_bound(plan, model) == step_time_bound(lengths, 8, model).seconds
    assert seconds_bound(plan_with(PlanSettings(8, "whole_doc"), lengths), model) is None
    uneven = ShardPlan([64] * 4, 2, [[(0, 0, 64), (1, 0, 64), (2, 0, 64)], [(3, 0, 64)]])
    assert seconds_bound(uneven, model) is None and seconds_bound(uneven, model, 1.5) is None
    assert seconds_bound(uneven, model, 1.5, 1.5) is not None


@pytest.mark.parametrize("strategy", ["per_doc", "search"])
def test_choices_are_what_planning_with_them_gives(strategy):
    lengths, model = sample_pack("pile", 65536), model_of(4)
    settings = PlanSettings(8, strategy, cost_model=model if strategy == "search" else None)
    plan = plan_with(settings, lengths)
    this, *others = other_choices(plan, settings, model)
    assert this.seconds == model.step_time(plan).seconds and this.kv_received == max(plan.kv_moved()[0])
    assert this.gpu_seconds_per_token == pytest.approx(8 * this.seconds / 65536)
    found = {(choice.group, choice.value): choice for choice in others}
    assert len(found) == len(others)
    assert {value for group, value in found if group == "cp_size"} == {4, 16}
    assert ("strategy", strategy) not in found and ("max_imbalance", 1.05) not in found
    assert (("max_imbalance", 1.1) in found) == (strategy == "search")
    if strategy == "search":
        looser = plan_with(replace(settings, max_imbalance=1.1), lengths)
        assert found["max_imbalance", 1.1].seconds == model.step_time(looser).seconds
        bound = step_time_bound(lengths, 8, model, 1.1).seconds
        assert found["max_imbalance", 1.1].over_bound == pytest.approx(model.step_time(looser).seconds / bound)
    assert all(choice.over_bound is None or choice.over_bound >= 1 for choice in others)


def test_every_choice_that_cannot_be_planned_is_left_out():
    model = model_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lengths, cp_size in ([5], 1), ([3, 2], 5), ([4, 3], 3), ([9, 1], 2):
            settings = PlanSettings(cp_size, "per_seq")
            plan = plan_with(settings, lengths)
            for choice in other_choices(plan, settings, model):
                assert 1 <= choice.cp_size <= sum(lengths)


def test_explain_prints_a_paragraph_and_a_table(capsys, line):
    code, out, err = run(capsys, f"{line} --explain")
    assert code == 0 and not err
    assert " x the lower bound\n" in out and "limit the step. It consists of " in out
    assert "\nthis plan " in out and "\nmax_imbalance=1.1 " in out and "\ncp_size=16 " in out
    assert run(capsys, f"{line} --strategy whole_doc")[1].count("ranks beyond the caps: no bound\n") == 1


def test_explain_in_json(capsys, line):
    found = json.loads(run(capsys, f"{line} --explain --json")[1])
    seconds = found["step_time"]["seconds"]
    assert found["lower_bound"]["step_over_bound"] == pytest.approx(seconds / found["lower_bound"]["seconds"])
    assert sum(found["explanation"]["limits"].values()) == pytest.approx(seconds)
    assert [row["over_this"] for row in found["explanation"]["choices"] if not row["group"]] == [1]
    assert "explanation" not in json.loads(run(capsys, f"{line} --json")[1])


@pytest.mark.parametrize("given", ["", " --model config.json"])
def test_explain_needs_a_predicted_step(capsys, given):
    code, _, err = run(capsys, f"plan --lengths 16,3 --cp-size 2 --explain{given}")
    assert code == 2 and err == "error: --explain needs --hardware and --model: it explains a predicted step.\n"
