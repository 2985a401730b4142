"""KV is sent to each node once and forwarded there; attention is the same as with a direct exchange."""

import contextlib
import dataclasses
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.errors import PlanError
from hf_flashcp.exchange import AllToAll, hierarchical
from hf_flashcp.layout import RankLayout
from hf_flashcp.layout.rank_layout import token_index
from hf_flashcp.plan.hierarchical_traffic import hierarchical_traffic
from hf_flashcp.planning import CostModel, HardwareProfile, ShardPlan, plan_documents
from hf_flashcp.predict.model_shape import AttentionLayers
from tests import attention_cases as cases
from tests.packs import KNOWN_PACKS, arbitrary_plans, owners
from tests.step_time_evaluator import step_times, traffic_of


CPU = torch.device("cpu")
NODES = [(4, 2), (6, 2), (6, 3), (8, 4), (9, 3)]


@settings(max_examples=60)
@given(data=st.data())
def test_routes_deliver_the_same_as_a_direct_exchange(data):
    """Simulate all ranks in one process, which exchange the positions of their tokens."""
    cp_size, size = data.draw(st.sampled_from(NODES))
    direct = data.draw(arbitrary_plans(cp_size))
    if data.draw(st.booleans()):
        direct = direct.with_offset_groups([[offset] for offset in range(1, cp_size)])
    window = data.draw(st.sampled_from([None, 1, 3, 20]))
    hierarchical = direct.with_ranks_per_node(size)
    tokens = [torch.from_numpy(token_index(direct, rank)) for rank in range(cp_size)]
    layouts = [[layout_of(plan, rank, window) for rank in range(cp_size)] for plan in (direct, hierarchical)]
    moved = np.zeros((2, cp_size, cp_size), dtype=np.int64)
    for number, _ in enumerate(layouts[0][0].stages(CPU)):
        brought = []
        for of_plan in layouts:
            stages = [layout.stages(CPU)[number] for layout in of_plan]
            rows = [layout.send_rows(CPU).take(mine) for layout, mine in zip(of_plan, tokens)]
            sent = [packed[stage.sent] for packed, stage in zip(rows, stages)]
            brought.append(all_to_all(sent, [stage.send_splits for stage in stages]))
        wanted, first = brought
        passed = [stage.second_step.forwarded.take(arrived) for stage, arrived in zip(stages, first)]
        second = all_to_all(passed, [stage.second_step.send_splits for stage in stages])
        for rank, stage in enumerate(stages):
            second_step = stage.second_step
            assert [len(first[rank]), len(second[rank])] == [sum(stage.recv_splits), sum(second_step.recv_splits)]
            received = torch.full((stage.received,), -1)
            second_step.first.put(received, second_step.needed.take(first[rank]))
            second_step.second.put(received, second[rank])
            assert received.tolist() == wanted[rank].tolist()
            forwarded = second_step.forwarded.take(torch.arange(len(first[rank])))
            _, *by_destination = second_step.sums.split(
                torch.cat([second_step.needed.take(first[rank]), forwarded])[None]
            )
            assert [len(part.unique()) for part in by_destination] == [
                rows.count for rows in second_step.sums.rows[1:]
            ]
            moved[:, rank] += stage.send_splits, second_step.send_splits
        for start in range(0, cp_size, size):
            node = range(start, start + size)
            came = [piece for rank in node for piece in from_others(first[rank], stages[rank].recv_splits, node)]
            needed = {token for rank in node for token in wanted[rank].tolist()}
            assert sorted(came) == sorted(needed - {token for rank in node for token in tokens[rank].tolist()})
    between = moved.sum(0) * (np.arange(cp_size) // size != np.arange(cp_size)[:, None] // size)
    if direct.offset_groups is None or window is not None:
        assert (moved == hierarchical_traffic(direct.slices, size, window)).all()
        assert (moved == traffic_of(owners(direct), window, range(1, cp_size), size)).all()
        assert hierarchical.report(window)["inter_node_received"] == between.sum(0).tolist()


def layout_of(plan, rank, window):
    return RankLayout(plan, rank, window)


def all_to_all(sent, splits):
    parts = [rows.split(counts) for rows, counts in zip(sent, splits)]
    return [torch.cat(pieces) for pieces in zip(*parts)]


def from_others(arrived, splits, node):
    pieces = arrived.split(splits)
    return torch.cat([piece for rank, piece in enumerate(pieces) if rank not in node]).tolist()


@pytest.mark.parametrize("cp_size, size", [(4, 2), (6, 3)])
def test_attention_is_exact(pool, cp_size, size):
    one_by_one = [[offset] for offset in range(1, cp_size)]
    todo = [
        cases.Case(
            plan_documents(KNOWN_PACKS[name], cp_size, strategy=strategy).with_ranks_per_node(size),
            (4, 2, 8, 12),
            offset_groups=groups,
            keep_received_kv=kept,
            options=options,
        )
        for name, strategy in (("seven", "per_doc"), ("giant_and_tiny", "search"))
        for groups, kept, options in ((None, True, {}), (one_by_one, False, {}), (None, False, {"window": 20}))
    ]
    for errors in pool.run(cp_size, cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < 1e-12, (case, error)


class Stream:
    """Stands for a CUDA stream; all of them write to one log."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for the event of {event}")

    def record_event(self):
        return self.name


def test_streams_of_the_two_steps(monkeypatch):
    """On a GPU, one stream starts second steps and another one ends them; all tensors live until the result is
    awaited."""
    log = []
    main, forwarding, finishing = (Stream(name, log) for name in ("main", "forwarding", "finishing"))
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def does(what, result):
        log.append(f"{current[-1].name}: {what}")
        return result

    class Second:
        def __init__(self, rows):
            does("post", None)
            self.received = rows.received

        def wait(self):
            return does("await second", self.received)

    alive = weakref.WeakSet()

    class Tensor:
        device = torch.device("cuda")

        def __init__(self):
            alive.add(self)

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(hierarchical, "_streams", lambda _: (forwarding, finishing))
    monkeypatch.setattr(hierarchical, "Transfer", Second)
    transfer = hierarchical.HierarchicalTransfer(
        SimpleNamespace(wait=lambda: does("await first", Tensor())),
        lambda _: does("forward", AllToAll(Tensor(), Tensor(), [], [], None)),
        lambda *_: does("finish", Tensor()),
        (Tensor(),),
    )
    gc.collect()
    assert len(alive) == 5
    result = transfer.wait()
    gc.collect()
    assert list(alive) == [result]
    assert log == [
        "forwarding waits for main",
        "forwarding: await first",
        "forwarding: forward",
        "forwarding: post",
        "finishing waits for forwarding",
        "finishing: await second",
        "finishing: finish",
        "main waits for the event of finishing",
    ]


def test_the_report_counts_the_transfers(pool):
    plan = plan_documents(KNOWN_PACKS["mixed"], 4, strategy="per_doc").with_ranks_per_node(2)
    report = plan.report()
    sums = [np.add(report[f"intra_node_{way}"], report[f"inter_node_{way}"]) for way in ("received", "sent")]
    for rank, calls in enumerate(pool.run(4, cases.counted_traffic, plan, (4, 2, 8, 12))):
        forward, backward = calls[:2], calls[2:]
        assert report["collectives"][rank] == len(calls) == 4
        assert [sum(call[way] for call in forward) for way in ("received", "sent")] == [sums[0][rank], sums[1][rank]]
        assert [sum(call[way] for call in backward) for way in ("sent", "received")] == [sums[0][rank], sums[1][rank]]


@settings(max_examples=30)
@given(arbitrary_plans(6), st.sampled_from([2, 3]), st.sampled_from([None, 1, 20]), st.booleans(), st.integers(1, 6))
def test_predictions_equal_those_from_counted_tiles_and_tokens(plan, size, window, staged, hardware_size):
    profile = dataclasses.replace(HardwareProfile.load("h100"), ranks_per_node=hardware_size)
    model = CostModel(profile, 1e9, (AttentionLayers(3, 8, 2, 64, 48, window), AttentionLayers(2, 4, 4, 128, 128)))
    plan = plan.with_ranks_per_node(size).with_offset_groups([[2, 4], [1], [3, 5]] if staged else None)
    found = model.step_time(plan)
    if plan.ranks_per_node:  # the plan knows its nodes better than the profile
        profile = dataclasses.replace(profile, ranks_per_node=plan.ranks_per_node)
    expected = step_times(plan, dataclasses.replace(model, hardware=profile))[0]
    assert found.attention + found.copies + found.exposed == pytest.approx(expected, rel=1e-9)


def test_sums_on_the_way_home_lose_no_more_than_a_single_device_does(pool):
    todo = [
        cases.Case(plan_documents(KNOWN_PACKS[name], 4, strategy=strategy).with_ranks_per_node(2), (8, 2, 16, 16))
        for name, strategy in (("mixed", "per_doc"), ("giant_and_tiny", "search"))
    ]
    for errors in pool.run(4, cases.bf16_errors, todo):
        assert all(ours <= 2 * single for pairs in errors for ours, single in pairs)


def test_nodes_belong_to_a_plan():
    plan = plan_documents([40, 24], 4)
    hierarchical = plan.with_ranks_per_node(2)
    assert hierarchical != plan and hierarchical.digest != plan.digest and "ranks_per_node=2" in repr(hierarchical)
    assert ShardPlan.from_dict(hierarchical.to_dict()) == hierarchical and "ranks_per_node" not in plan.to_dict()
    assert hierarchical.with_offset_groups([[1], [2, 3]]).ranks_per_node == 2
    # With one node, or one rank per node, nothing is forwarded.
    for size in (None, 1, 4, 8):
        assert hierarchical.with_ranks_per_node(size) == plan
    for size, message in ((3, "4 is not a multiple"), (0, "ranks_per_node must be"), (True, "ranks_per_node must be")):
        with pytest.raises(PlanError, match=message):
            plan.with_ranks_per_node(size)
    with pytest.raises(PlanError, match="ranks_per_node must be"):
        ShardPlan.from_dict({**plan.to_dict(), "ranks_per_node": "2"})
