"""Uses of public names for a type checker. Only mypy reads this file (tests/test_promise.py); nothing runs it."""

from __future__ import annotations

from typing import Any, assert_type

from hf_flashcp import CostModel, ShardPlan, errors, pack_lengths, plan_documents
from hf_flashcp.data import Packing, sample_pack
from hf_flashcp.plan import Slice
from hf_flashcp.planning import HardwareProfile, StepTime


def planning(config: dict[str, Any]) -> None:
    plan = plan_documents(sample_pack("pile", 4096), 2, strategy="per_doc")
    assert_type(plan, ShardPlan)
    assert_type(plan.slices, tuple[tuple[Slice, ...], ...])
    assert_type(plan.report(window=8), dict[str, Any])
    assert_type(ShardPlan.from_dict(plan.to_dict()), ShardPlan)
    assert_type(CostModel.from_config(config, HardwareProfile.load("h100")).step_time(plan), StepTime)
    assert_type(pack_lengths([5, 3], window=8, cp_size=2), Packing)


def mistakes() -> None:
    """Contain only errors that mypy must see: a line without an error is reported as an unused ignore."""
    plan_documents(["8"], 2)  # type: ignore[list-item]
    plan_documents([8], cp_size="2")  # type: ignore[arg-type]
    ShardPlan([8], 1)  # type: ignore[call-arg]
    try:
        plan_documents([8], 2, stategy="per_doc")  # type: ignore[call-arg]
    except errors.PlanError as error:
        assert_type(error, errors.PlanError)
