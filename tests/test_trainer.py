"""Training loops: gradients at the optimizer, compared with per-document runs on one device."""

from types import SimpleNamespace

import pytest

from hf_flashcp import plan_documents
from hf_flashcp.integrations.trainers import plan_metrics
from hf_flashcp.integrations.trainers.plan_metrics import PlanMetrics
from tests import trainer_cases
from tests.device import ON_CPU


pytestmark = pytest.mark.devices("cpu", "cuda")

GRADIENT = 1e-6  # relative Frobenius norm of each parameter, fp64 parameters through the models' own fp32 loss
LENGTHS = [40, 3, 17, 9, 25, 1, 30, 7, 12, 5, 5, 5]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strategy": "whole_doc"},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3, "strategy": "whole_doc"},
        {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
        {"own_collator": False, "activation_checkpointing": True},
        {"dataloader_num_workers": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.smoke
def test_trainer(pool, cp_size, options):
    """All cases have masked prompts and unequal tokens per rank."""
    for result in pool.run(cp_size, trainer_cases.trainer_step_with, LENGTHS, options):
        assert result["gradient_error"] < GRADIENT
        assert result["loss"] == pytest.approx(result["expected_loss"], rel=GRADIENT)


def test_counters_count_a_shared_batch_once(pool):
    """Six documents per step, with and without data-parallel groups."""
    layouts = [(1, 1, 3), (2, 2, 3), (2, 1, 3), (4, 2, 3)]
    results = {}
    for world_size, cp_size, per_batch in layouts:
        options = {"include_num_input_tokens_seen": "all", "steps": 2, "cp_size": cp_size, "per_batch": per_batch}
        results[world_size, cp_size] = pool.run(world_size, trainer_cases.trainer_step_with, LENGTHS, options)[0]
    assert results[1, 1]["tokens_seen"] == results[2, 2]["tokens_seen"] == sum(LENGTHS[:6])
    assert results[2, 1]["tokens_seen"] == results[4, 2]["tokens_seen"] == sum(LENGTHS[:12])
    assert results[1, 1]["flos"] == results[2, 2]["flos"]
    assert results[2, 1]["flos"] == results[4, 2]["flos"]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("world_size, cp_size", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_the_documented_custom_loss(pool, world_size, cp_size, average):
    """The example in docs/turn_it_on.md with gradient accumulation: gradient, logged loss and eval_loss."""
    for result in pool.run(world_size, trainer_cases.documented_loss, LENGTHS, cp_size, average):
        assert result["gradient_error"] < GRADIENT
        assert result["loss"] == pytest.approx(result["expected_loss"], rel=GRADIENT)
        assert result["eval_loss"] == pytest.approx(result["expected_eval_loss"], rel=GRADIENT)


def test_plan_metrics_are_logged(pool):
    (first, *_) = pool.run(2, trainer_cases.trainer_step_with, LENGTHS, {})[0]["log"]
    assert first["flashcp_kv_fraction"] == pytest.approx(43 / 60)
    assert first["flashcp_token_imbalance"] == 1.0
    assert 1.0 <= first["flashcp_pair_imbalance"] < 1.1
    assert first["flashcp_tokens_per_second"] > 0
    # On a GPU the host does not wait for transfers, so it cannot time them.
    assert first["flashcp_exposed_transfer_ms"] > 0 if ON_CPU else "flashcp_exposed_transfer_ms" not in first


@pytest.mark.devices("cpu")
def test_speed_counts_every_group_and_no_evaluation(monkeypatch):
    """With a fake clock: four packs of eight tokens per group, 2 seconds of training, 5 of evaluation."""
    now, waited = [100.0], [3.0]
    monkeypatch.setattr(plan_metrics, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(plan_metrics, "seconds_waited", lambda: waited[0])
    metrics, plan = PlanMetrics(groups=2), plan_documents([5, 3], 2)
    for pack in range(4):
        metrics.add(plan)
        now[0] += 0.5
        waited[0] += 0.01
        if pack == 1:
            with metrics.paused():
                now[0] += 5
                waited[0] += 1
    means = metrics.take_interval_means()
    assert means["flashcp_tokens_per_second"] == pytest.approx(2 * 32 / 2)
    assert means["flashcp_exposed_transfer_ms"] == pytest.approx(10)
    now[0] += 7  # saving the model
    assert metrics.means()["flashcp_tokens_per_second"] == pytest.approx(2 * 32 / 2)
    assert metrics.take_interval_means() == {}


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_plain_accelerator_loop(pool, cp_size, accumulation):
    for result in pool.run(cp_size, trainer_cases.accelerator_loop, LENGTHS, accumulation):
        assert result["gradient_error"] < GRADIENT
        assert result["losses"] == pytest.approx(result["expected_losses"], rel=GRADIENT)


@pytest.mark.parametrize("world_size, cp_size", [(2, 2), (4, 2)])
def test_bf16_autocast_is_as_close_to_fp64_as_a_single_process(pool, world_size, cp_size):
    for ours, single in pool.run(world_size, trainer_cases.autocast_errors, LENGTHS, cp_size):
        assert 0 < ours <= 2 * single


def test_two_data_parallel_groups(pool):
    """dp 2 x cp 2 under DDP: each pair of ranks shares a batch, and the loss counts the targets of both."""
    for result in pool.run(4, trainer_cases.trainer_step_with, LENGTHS, {"cp_size": 2, "per_batch": 3}):
        assert result["gradient_error"] < GRADIENT
        assert result["loss"] == pytest.approx(result["expected_loss"], rel=GRADIENT)
