import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp import FlashCPCollator
from hf_flashcp.bench.plans.plan_quality import measure, text
from hf_flashcp.cli import main
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.errors import PlanError
from hf_flashcp.plan.slices import Slice
from hf_flashcp.planning import CostModel, HardwareProfile, PlanSettings, ShardPlan, Topology, fastest, plan_documents
from hf_flashcp.planning.caps import Caps
from hf_flashcp.planning.fastest import node_plans
from hf_flashcp.planning.search.nodes import busiest as busiest_links
from hf_flashcp.planning.search.nodes import grouped
from hf_flashcp.predict.model_shape import LLAMA_3_8B
from tests.independent_plan_checker import assert_caps, check_plan
from tests.packs import arbitrary_plans, owners


def links(plan, ranks_per_node):
    """Count (4, cp_size) tokens: received within the node and from others, sent within the node and to others.

    Each token is sent directly to every rank that needs it.
    """
    found = np.zeros((4, plan.cp_size), dtype=np.int64)
    for owner in owners(plan):
        for holder in np.unique(owner):
            senders = owner[: np.flatnonzero(owner == holder)[-1]]
            senders = senders[senders != holder]
            inside = senders // ranks_per_node == holder // ranks_per_node
            found[0, holder] += inside.sum()
            found[1, holder] += (~inside).sum()
            found[2] += np.bincount(senders[inside], minlength=plan.cp_size)
            found[3] += np.bincount(senders[~inside], minlength=plan.cp_size)
    return found


def hierarchical_links(plan, size):
    """Count the same if tokens are sent to each node once, and (2, cp_size) tokens received and sent in the second
    step."""
    first, second = np.zeros((2, plan.cp_size, plan.cp_size), dtype=np.int64)
    for owner in owners(plan):
        node, place = owner // size, owner % size
        for here in np.unique(node):
            crossing = np.flatnonzero((node != here) & (np.arange(len(owner)) < np.flatnonzero(node == here)[-1]))
            middle = here * size + place[crossing]
            np.add.at(first, (owner[crossing], middle), 1)
            for holder in np.unique(owner[node == here]):
                mine = crossing < np.flatnonzero(owner == holder)[-1]
                np.add.at(second, (middle[mine], holder), 1)
                inside = (node == here) & (owner != holder)
                inside[np.flatnonzero(owner == holder)[-1] :] = False
                np.add.at(first, (owner[inside], holder), 1)
    np.fill_diagonal(second, 0)
    ranks = np.arange(plan.cp_size) // size
    inside = ranks[:, None] == ranks
    parts = [(first * which).sum(axis) for axis in (0, 1) for which in (inside, ~inside)]
    return np.array(parts), np.array([second.sum(0), second.sum(1)])


def busiest(plan, topology):
    cost = topology.inter_node_cost
    first, second = hierarchical_links(plan, min(topology.ranks_per_node, plan.cp_size))
    return (first * np.array([[1], [cost], [1], [cost]])).max() + second.max()


@st.composite
def packs_in_nodes(draw):
    ranks_per_node, nodes = draw(st.sampled_from([(1, 3), (2, 1), (2, 2), (2, 4), (3, 3), (4, 2), (4, 4), (8, 2)]))
    lengths = draw(st.lists(st.floats(0, 7.5).map(lambda power: int(math.exp(power))), min_size=1, max_size=40))
    cp_size = ranks_per_node * nodes
    return lengths + [1] * max(cp_size - sum(lengths), 0), cp_size, ranks_per_node


@settings(max_examples=50)
@given(
    packs_in_nodes(),
    st.sampled_from([1.0, 1.05, 1.3, math.inf]),
    st.sampled_from([1.0, 1.1, math.inf]),
    st.sampled_from([1, 7.7, 100.0]),
)
def test_plans_for_nodes_are_valid_and_never_busier(case, max_imbalance, max_token_imbalance, cost):
    lengths, cp_size, ranks_per_node = case
    options = {"max_imbalance": max_imbalance, "max_token_imbalance": max_token_imbalance}
    topology = Topology(ranks_per_node, cost)
    flat = plan_documents(lengths, cp_size, **options)
    plan = plan_documents(lengths, cp_size, **options, topology=topology)
    without = check_plan(lengths, cp_size, flat.slices)
    most_pairs = max(max_imbalance * without["pairs"].sum() / cp_size, without["pairs"].max())
    others = node_plans(list(map(list, flat.slices)), Caps(tuple(lengths), cp_size, **options), ranks_per_node)
    for slices in [plan.slices, *others]:
        counts = check_plan(lengths, cp_size, slices)
        assert_caps(counts, max_token_imbalance)
        assert counts["pairs"].max() <= most_pairs
    assert busiest(plan, topology) <= busiest(flat, topology) * (1 + 1e-12)
    if ranks_per_node in (1, cp_size):
        assert plan == flat
    else:
        assert plan.ranks_per_node == ranks_per_node


def test_states_are_part_of_the_load_of_links():
    """Four ranks in a chain on two nodes: each link between nodes carries one slice, which is then forwarded."""
    slices = [[Slice(0, 10 * rank, 10 * rank + 10)] for rank in range(4)]
    assert busiest_links(slices, Topology(2, 7.0))[0] == 7 * 10 + 10
    assert busiest_links(slices, Topology(2, 7.0), 1000.0) == (7 * 1010 + 1010, 2 * 7 * 1010 + (2 + 2) * 1010)


def test_on_one_node_states_have_the_same_price_as_without_nodes():
    options = {"max_token_imbalance": 1.02, "state_tokens": 6144.0}
    plan = plan_documents([131072], 8, topology=Topology(8), **options)
    assert plan == plan_documents([131072], 8, **options) != plan_documents([131072], 8, max_token_imbalance=1.02)


@pytest.mark.parametrize("corpus", ["prolong64k", "pile", "magi_real"])
def test_plans_for_nodes_have_a_price_of_states(corpus):
    lengths, topology = sample_pack(corpus, 65536, seed=2), Topology(4)
    plan, without = (plan_documents(lengths, 16, topology=topology, state_tokens=price) for price in (6144.0, 0.0))
    flat = plan_documents(lengths, 16, state_tokens=6144.0)
    loads = [busiest_links(each.slices, topology, 6144.0) for each in (plan, flat, without)]
    assert loads[0] <= min(loads)
    assert plan.ranks_per_node == 4 and plan.report()["pair_imbalance"] <= 1.05


@given(arbitrary_plans(), st.integers(1, 4), st.sampled_from([None, 1, 3, 50]))
def test_the_report_tells_links_apart(plan, ranks_per_node, window):
    without, report = plan.report(window), plan.report(window, Topology(ranks_per_node))
    parts = [report.pop(f"{link}_node_{way}") for way in ("received", "sent") for link in ("intra", "inter")]
    assert report == without
    assert np.add(parts[0], parts[1]).tolist() == report["kv_received"]
    assert np.add(parts[2], parts[3]).tolist() == report["kv_sent"]
    assert sum(parts[0]) == sum(parts[2]) and sum(parts[1]) == sum(parts[3])
    if window is None:
        assert parts == links(plan, ranks_per_node).tolist()


@pytest.mark.parametrize("corpus, seed, at_most", [("wlb_llm", 1, 0.5), ("pile", 2, 0.8), ("prolong512k", 2, 0.9)])
def test_a_topology_reduces_traffic_between_nodes(corpus, seed, at_most):
    lengths = sample_pack(corpus, 65536, seed=seed)
    flat, plan = (plan_documents(lengths, 32, topology=topology) for topology in (None, Topology(8)))
    assert busiest(plan, Topology(8)) <= at_most * busiest(flat, Topology(8))
    assert plan.report()["pair_imbalance"] <= 1.05


def test_documents_that_fit_in_a_node_stay_there():
    plan = plan_documents([800] * 4, 16, topology=Topology(4))
    assert not links(plan, 4)[1].any() and links(plan, 4)[0].any()


def test_grouping_finds_ranks_that_share_documents():
    held = [[(document, 10 * place, 10 * place + 10)] for place in range(4) for document in range(6)]
    assert links(ShardPlan([40] * 6, 24, held), 4)[1].any()
    assert not links(ShardPlan([40] * 6, 24, grouped(held, 4)), 4)[1].any()


def test_plans_use_the_nodes_of_a_cost_model(monkeypatch):
    lengths = tuple(sample_pack("pile", 32768, seed=2))
    profile = dataclasses.replace(HardwareProfile.load("h100"), ranks_per_node=4)
    model = CostModel.from_config(LLAMA_3_8B, profile)
    with_nodes = plan_documents(lengths, 16, cost_model=model)
    monkeypatch.setattr(fastest, "node_plans", lambda *arguments: [])
    monkeypatch.setattr(fastest, "group_ranks", lambda traffic, ranks_per_node: np.arange(len(traffic)))
    without = fastest.fastest(Caps(lengths, 16), model)
    assert model.step_time(with_nodes).seconds < model.step_time(without).seconds
    directly = model.step_time(with_nodes.with_ranks_per_node(None))
    assert with_nodes.ranks_per_node == 4 and model.step_time(with_nodes).seconds < 0.99 * directly.seconds


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Topology(0), "ranks_per_node must be a whole number from 1 to 2,147,483,647, got 0"),
        (lambda: Topology(8.0), "ranks_per_node must be a whole number from 1 to 2,147,483,647, got 8.0"),
        (lambda: Topology(2**63), "got 9223372036854775808"),
        (lambda: Topology(8, 0.5), "inter_node_cost is 0.5"),
        (lambda: Topology(8, math.nan), "inter_node_cost is nan"),
        (
            lambda: plan_documents([99], 12, topology=Topology(8)),
            "12 is not a multiple of the topology's ranks_per_node, 8",
        ),
        (lambda: PlanSettings(16, topology=8), "topology is 8, not a Topology: pass"),
        (lambda: plan_documents([99], 16, topology=8), "topology is 8, not a Topology: pass"),
        (
            lambda: PlanSettings(12, topology=Topology(8)),
            "12 is not a multiple of the topology's ranks_per_node, 8",
        ),
        (
            lambda: plan_documents([9], 2, minimize_total=True, topology=Topology(8)),
            "minimize_total is a goal of its own",
        ),
    ],
)
def test_invalid_topologies_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()


def test_the_collator_plans_for_nodes():
    lengths = sample_pack("wlb_llm", 4096, seed=2)
    batch = FlashCPCollator(settings=PlanSettings(16, topology=Topology(4)))(
        [{"input_ids": [1] * length} for length in lengths]
    )
    assert batch["flashcp_plan"] == plan_documents(lengths, 16, topology=Topology(4))
    assert batch["flashcp_plan"] != plan_documents(lengths, 16)


def test_the_plan_command_shows_links_apart(capsys):
    line = ["plan", "--lengths-from", "pile", "--window", "9000", "--cp-size", "8", "--ranks-per-node", "4"]
    plan = plan_documents(sample_pack("pile", 9000), 8, topology=Topology(4))
    report = plan.report(topology=Topology(4), kernel="torch_flash")
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["digest"] == plan.digest and found["report"] == report
    assert main(line) == 0
    shown = capsys.readouterr().out
    inside, between = sum(report["intra_node_received"]), sum(report["inter_node_sent"])
    assert f"  in nodes of 4         {inside:,} inside, {between:,} between" in shown
    last = shown.splitlines()[3].split()[-2:]
    assert last == [f"{report[f'inter_node_{way}'][0]:,}" for way in ("received", "sent")]
    assert main([*line[:-1], "8"]) == 0 and "other nodes" not in capsys.readouterr().out
    assert main([*line, "--strategy", "per_doc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["ranks_per_node"] == 4


def test_the_hardware_s_nodes_are_the_plan_command_s(capsys, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_3_8B))
    line = ["plan", "--lengths", "900,800,31", "--cp-size", "4", "--hardware", "h100", "--model", str(config)]
    assert main(line) == 0 and "in nodes of" not in capsys.readouterr().out
    assert main([*line, "--ranks-per-node", "2"]) == 0 and "in nodes of 2" in capsys.readouterr().out


def test_bench_plan_measures_links():
    topology = Topology(2)
    found = measure("pile", [4096], [4], packs=1, ranks_per_node=2)
    parts, forwarded = hierarchical_links(plan_documents(sample_pack("pile", 4096), 4, topology=topology), 2)
    parts[::2] += forwarded
    row = found["cells"][0]["strategies"]["with topology"]
    assert [row["intra_node"], row["inter_node"]] == [parts[::2].max(), parts[1::2].max()]
    assert row["inter_node_total"] == parts[1].sum()
    shown = text(found).splitlines()
    assert [line.split()[0] for line in shown[-4:]] == ["pile", "pile", "means", "means"]
    assert "with topology" in shown[-3] and "with topology" in shown[-1]
    assert len({len(line) for line in shown[3:]}) == 1


def test_bench_nodes(capsys):
    line = "bench nodes --lengths-from wlb_llm --cp-size 16 --tokens 256 --packs 1"
    assert main([*line.split(), "--json"]) == 0
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    lengths = sample_pack("wlb_llm", 4096)
    model = CostModel.from_config(LLAMA_3_8B, "h100")
    flat, planned = (plan_documents(lengths, 16, topology=topology) for topology in (None, Topology(8)))
    plans = flat, flat.with_ranks_per_node(8), planned.with_ranks_per_node(None), planned
    timed = plan_documents(lengths, 16, cost_model=model)
    assert list(cell["variants"])[-1] == "search, timed"
    for row, plan in zip(cell["variants"].values(), (*plans, timed), strict=True):
        parts = links(plan, 8) if plan.ranks_per_node is None else hierarchical_links(plan, 8)[0]
        assert row["inter_node"] == parts[1::2].max()
        assert row["step_seconds"] == model.step_time(plan).seconds
        assert row["over_bound"] is None or row["over_bound"] >= 1
    assert cell["variants"]["directly"]["over_directly"] == 1
    assert main(line.split()) == 0 and "once per node" in capsys.readouterr().out
