import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.bench.plans import published
from hf_flashcp.bench.plans.predicted import LLAMA_3_8B
from hf_flashcp.bench.plans.table2 import padded_all_gather_fraction
from hf_flashcp.cli import main
from hf_flashcp.data.lengths import draw_pack, read_lengths, sample_pack
from hf_flashcp.errors import ConfigurationError, PlanError
from hf_flashcp.planning import HARDWARE, CostModel, HardwareProfile, ShardPlan, Topology, plan_documents
from hf_flashcp.predict import hardware_profile
from hf_flashcp.predict.cost_model import LayerCosts
from hf_flashcp.predict.layer_work import StageWork
from hf_flashcp.predict.memory import estimate_memory
from hf_flashcp.predict.memory_shape import MemoryShape
from hf_flashcp.predict.model_shape import AttentionLayers
from hf_flashcp.predict.timeline import Timeline
from hf_flashcp.predict.training_setup import RankLoad, TrainingSetup
from hf_flashcp.simulation.baselines import BASELINES, Layer, RingPieces, passes, shared_tokens
from hf_flashcp.simulation.simulate import EXACT, NAMES, TIMED, simulate
from hf_flashcp.simulation.step_costs import step_seconds
from tests.hybrid_sizes import QWEN3_NEXT
from tests.packs import KNOWN_PACKS, owners, packs
from tests.step_time_evaluator import call_seconds as counted_call


H100 = HardwareProfile.load("h100")
MHA = AttentionLayers(1, 8, 8, 64, 64)
GQA = AttentionLayers(1, 8, 2, 64, 32)


def model_of(layers=MHA, ranks_per_node=8, **changes):
    profile = dataclasses.replace(H100, ranks_per_node=ranks_per_node, **changes)
    return CostModel(profile, 1e9, (layers,))


def plan_of(name, lengths, cp_size):
    return ShardPlan(lengths, cp_size, BASELINES[name].slices(tuple(lengths), cp_size))


def row(*values):
    return np.array(values, dtype=float)


def test_a_pass_by_hand():
    """On two ranks, the kernel of step 1 waits for a slow hop on rank 0, and for its own first kernel on rank 1."""
    line = Timeline(2)
    hop = line.hop(row(5, 1))
    ends = [hop, line.kernel(row(2, 4)), line.kernel(row(3, 3), hop), copy := line.copy(row(1, 1))]
    ends.append(line.collective(row(2, 2), copy))
    assert [end.tolist() for end in ends] == [[5, 1], [2, 4], [8, 7], [9, 8], [11, 11]]
    kernels, copies, exposed, transfer = line.times()
    assert kernels.tolist() == [5, 7] and copies.tolist() == [1, 1] and transfer.tolist() == [7, 3]
    assert exposed.tolist() == [5, 3]


def test_a_hop_waits_for_the_rank_before_it():
    """Rank 2 starts late, so its KV reaches rank 0 late, whose KV reaches rank 1 late, and so on."""
    line = Timeline(3)
    ends = [line.kernel(row(1, 1, 9))]
    for _ in range(2):
        ends.append(line.hop(row(1, 1, 1), ends[-1]))
    assert [end.tolist() for end in ends] == [[1, 1, 9], [10, 2, 10], [11, 11, 11]]


@given(st.lists(st.tuples(*[st.floats(0, 10)] * 2), min_size=1, max_size=6), st.floats(0, 20))
def test_stages_by_hand(stages, local):
    """In this library's exchange, all stages are posted at once, and gradients are sent once they are computed."""
    wires, works = ([stage[part] for stage in stages] for part in (0, 1))
    end, arrived = local, 0.0
    for wire, work in zip(wires, works):
        arrived += wire
        end = max(end, arrived) + work
    forward, back = layer_of_times(wires, works, local).passes()
    assert sum(forward[:3]).item() == pytest.approx(end)
    home = done = 0.0
    for wire, work in zip(wires, works):
        done += work
        home = max(home, done) + wire
    assert sum(back[:3]).item() == pytest.approx(max(done + local, home))
    assert forward.transfer.item() == back.transfer.item() == pytest.approx(sum(wires))


def layer_of_times(wires, works, local):
    """Return the costs of a layer on one rank whose stages take these seconds to transfer and to compute."""

    class Given(LayerCosts):
        def kernel_seconds(self, rectangles, **options):
            return row(rectangles)

        def stage_seconds(self, stage, backward):
            return row(stage.received)

        def merge_seconds(self, rectangles):
            return row(0)

        def passes(self):
            stages = [StageWork(work, wire, wire, 0, 0) for wire, work in zip(wires, works)]
            return self.forward(local, stages), self.backward(local, stages)

    return Given(model_of(), MHA, ShardPlan([1], 1, [[(0, 0, 1)]]))


@pytest.mark.parametrize("cp_size", [2, 4, 8])
@pytest.mark.parametrize("layers", [MHA, GQA])
def test_traffic_equals_closed_forms(cp_size, layers):
    """Compare the bytes of forward with closed forms.

    Per rank, an all-gather and a ring send (N-1) C/N tokens of KV, and Ulysses (N-1) / N^2 C tokens of all heads.
    Exact exchange of one zigzagged document sends 3 (N-1) / 4 C tokens in total.
    """
    tokens = 2 * cp_size * 64
    config = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8}
    model, kv = model_of(layers), layers.kv_elements_per_token * 2
    found = simulate([tokens], cp_size, config, model, names=("per_doc", *BASELINES))
    for name in ("llama3", "per_doc_cp", "ring", "zigzag_ring"):
        assert found[name].received.sum(0).tolist() == [(cp_size - 1) * tokens / cp_size * kv] * cp_size
    assert found["per_doc"].received.sum() == 3 * (cp_size - 1) / 4 * tokens * kv
    kv_heads = max(layers.kv_heads, cp_size)
    elements = layers.query_heads * (layers.key_dim + layers.value_dim) + kv_heads * (
        layers.key_dim + layers.value_dim
    )
    a_rank = (cp_size - 1) / cp_size**2 * tokens * elements * 2
    assert found["ulysses"].received.sum(0) == pytest.approx([a_rank] * cp_size)
    # One zigzagged document: the two adjacent chunks of rank N-1 form one shard, and rank 0 has the last shard.
    assert found["flashcp_paper"].received.sum(0).tolist() == [(cp_size - 1) * tokens / cp_size * kv] * cp_size


def test_equal_documents_stay_whole():
    config = {**LLAMA_3_8B, "num_hidden_layers": 2}
    model = CostModel.from_config(config, "h100")
    found = simulate([4096] * 8, 8, config, model, names=("whole_doc", "search", TIMED, "flashcp_paper", "llama3"))
    whole = found.pop("whole_doc")
    llama = found.pop("llama3")
    assert llama.received.any() and llama.step_seconds > whole.step_seconds
    for outcome in found.values():
        assert not outcome.received.any() and not outcome.time.transfer.any()
        assert outcome.time.exposed == pytest.approx(0, abs=1e-15)
        assert outcome.step_seconds == pytest.approx(whole.step_seconds)


@pytest.mark.parametrize("cp_size, ranks_per_node, crossing", [(8, 8, 0), (8, 4, 1), (8, 2, 3), (8, 1, 7), (64, 8, 7)])
def test_collectives_send_to_each_node_once(cp_size, ranks_per_node, crossing):
    layer = Layer(model_of(ranks_per_node=ranks_per_node), MHA, plan_of("llama3", [6400], cp_size))
    inside, between = layer.gathered(10)
    assert (
        between.tolist() == [10 * crossing] * cp_size and (inside + between).tolist() == [10 * (cp_size - 1)] * cp_size
    )
    inside, between = layer.exchanged(10)
    assert between.tolist() == [10 * (cp_size - min(ranks_per_node, cp_size))] * cp_size
    inside, between = layer.hop(np.full(cp_size, 10.0))
    assert (inside + between).tolist() == [10] * cp_size
    assert between.sum() == (10 * cp_size / ranks_per_node if crossing else 0)


@settings(max_examples=40)
@given(packs(max_documents=5, max_length=60), st.sampled_from(["ring", "zigzag_ring"]))
def test_ring_steps_compute_each_pair_once(case, name):
    """In step s, all queries of a document that attend to the block of rank - s attend to the same part of it."""
    lengths, cp_size = case
    plan = plan_of(name, lengths, cp_size)
    pieces = RingPieces.of(plan)
    for step in range(1, cp_size):
        expected = []
        for ranks in owners(plan):
            for rank in range(cp_size):
                block = np.flatnonzero(ranks == (rank - step) % cp_size)
                seen = [int((block < query).sum()) for query in np.flatnonzero(ranks == rank)]
                seen = [keys for keys in seen if keys]
                assert len(set(seen)) <= 1
                if seen:
                    expected.append([rank, len(seen), seen[0]])
        found = pieces.remote(step)
        assert sorted(np.stack((found.ranks, found.queries, found.keys), 1).tolist()) == sorted(expected)


@pytest.mark.parametrize("pack", ["mixed", "blocks_of_128", "six_of_150", "giant_and_tiny", "ring_flash_attention"])
@pytest.mark.parametrize("name", ["llama3", "per_doc_cp", "flashcp_paper", "ulysses", "zigzag_ring"])
def test_kernel_times_equal_those_from_counted_tiles(pack, name):
    lengths, cp_size, model = KNOWN_PACKS[pack], 4, model_of()
    plan = plan_of(name, lengths, cp_size)
    for backward, (attention, *_) in zip((False, True), passes(name, model, plan, MHA)):
        for rank in range(cp_size):
            heads = MHA
            if name == "ulysses":
                heads = dataclasses.replace(MHA, query_heads=MHA.query_heads // cp_size)
                calls = [(True, [(length, 0) for length in lengths])]
            elif name == "zigzag_ring":
                mine = [np.flatnonzero(ranks == rank) for ranks in owners(plan)]
                calls = [(True, [(len(own), 0) for own in mine if len(own)])]
                for other in set(range(cp_size)) - {rank}:
                    full = []
                    for own, ranks in zip(mine, owners(plan)):
                        seen = [keys for query in own if (keys := (np.flatnonzero(ranks == other) < query).sum())]
                        full += [(len(seen), seen[0])] if seen else []
                    calls.append((False, full))
            else:
                calls = [(True, [(stop - start, start) for _, start, stop in plan.slices[rank]])]
            counted = sum(counted_call(rows, heads, model, masked, backward) for masked, rows in calls)
            assert attention[rank] == pytest.approx(counted, rel=1e-12)


def test_an_all_gather_by_hand():
    """Gather, reorder, compute; compute, reorder, reduce: nothing overlaps, and all ranks wait for the slowest."""
    lengths, cp_size = [3000, 1000], 2
    plan = plan_of("llama3", lengths, cp_size)
    (attention, copies, exposed, transfer), back = passes("llama3", model_of(), plan, MHA)
    size = 2000 * 8 * 128 * 2
    assert transfer == pytest.approx(2e-5 + size / 370e9)
    assert copies == pytest.approx(2 * 2 * size / 2.7e12)
    assert exposed == pytest.approx(transfer)
    assert sum(back[:3]) == pytest.approx([sum(part.max() for part in (back[0], back[1], back[3]))] * 2)


def test_a_ring_by_hand():
    """On two ranks with one document, rank 0 has nothing to compute in step 1, and rank 1 returns the gradients of its
    KV."""
    plan, model = plan_of("ring", [4096], 2), model_of()
    (attention, copies, exposed, transfer), back = passes("ring", model, plan, MHA)
    block = 2048 * 8 * 128
    hop = 2e-5 + 2 * block / 370e9
    merge = 2048 * 8 * 64 * 10 / 2.7e12
    assert transfer == pytest.approx(hop) and copies == pytest.approx([0, merge])
    local = attention[0]
    assert exposed == pytest.approx([max(hop - local, 0)] * 2)
    added = (2048 * 8 * 64 + block) * 10 / 2.7e12
    home = 2e-5 + 4 * block / 370e9
    assert back[1] == pytest.approx([block * 10 / 2.7e12, added])
    end = back[0][1] + added + home
    assert sum(back[:3])[0] == pytest.approx(end) and back[3] == pytest.approx(hop + 2 * home)


def test_exact_schemes_are_the_cost_models():
    lengths = sample_pack("pile", 32768, seed=1)
    model = CostModel.from_config(LLAMA_3_8B, dataclasses.replace(H100, ranks_per_node=4))
    found = simulate(lengths, 8, LLAMA_3_8B, model)
    again = simulate(lengths, 8, LLAMA_3_8B, model)
    assert list(found) == [*NAMES]
    for name, outcome in found.items():
        assert outcome.to_dict() == again[name].to_dict()
        total = sum(getattr(outcome.time, part) for part in ("linear", "attention", "scan", "copies", "exposed"))
        assert outcome.step_seconds == pytest.approx(total.max()) and (outcome.time.exposed > -1e-12).all()
    for name in EXACT:
        options = {"cost_model": model} if name == TIMED else {"strategy": name, "topology": Topology(4)}
        plan = plan_documents(lengths, 8, **options)
        assert found[name].step_seconds == pytest.approx(model.step_time(plan).seconds)
        report = plan.report(topology=Topology(4))
        for link, received in zip(("intra", "inter"), found[name].received):
            assert received / (32 * 8 * 256 * 2) == pytest.approx(report[f"{link}_node_received"])
    assert found[TIMED].step_seconds <= min(found[name].step_seconds for name in ("search", "flashcp"))


@pytest.mark.parametrize("lengths", [[131072], [98304] + [1024] * 32])
def test_a_hybrid_model_of_80_billion_parameters(lengths):
    """Qwen3-Next-80B-A3B on 128K tokens and 8 ranks: cut documents are several times as fast as whole ones."""
    model = CostModel.from_config(QWEN3_NEXT, "h100")
    found = simulate(lengths, 8, QWEN3_NEXT, model, gradient_checkpointing="full")
    assert list(found) == [*EXACT]  # no baseline has an exchange of states
    times = {name: outcome.step_seconds for name, outcome in found.items()}
    assert times[TIMED] == min(times.values()) and times["whole_doc"] > 4 * times[TIMED]
    plan = plan_documents(lengths, 8, topology=Topology(8), state_tokens=6144.0)
    report, received = plan.report(), found["search"].received
    halo = [36 * 3 * 8192 * 2 * sum(piece.start > 0 for piece in held) for held in plan.slices]
    kv = [12 * 2 * 2 * 256 * 2 * tokens for tokens in report["kv_received"]]
    states = [36 * 4 * 2**20 * count for count in report["states_received"]]
    assert received[0].tolist() == [sum(parts) for parts in zip(kv, states, halo)] and not received[1].any()
    outcome = found["search"]
    assert outcome.step_seconds == pytest.approx(
        step_seconds(model.step_time(plan), TrainingSetup(gradient_checkpointing="full"))
    )
    again = model.step_time(plan)
    repeated = again.linear / 3 + again.scan / 3 + again.attention * 2 / 7 + (again.copies + again.exposed) / 2
    assert outcome.step_seconds == pytest.approx((again.of_ranks + repeated).max())
    assert outcome.to_dict()["scan_seconds"] > 0
    flops = 131072 * (model.linear_flops_per_token + 36 * 32 * (6 * 128 * 128 + 64 * 10 * 128))
    flops += 12 * 16 * 4 * 256 * sum(length * (length + 1) // 2 for length in lengths)
    assert outcome.mfu == pytest.approx(3 * flops / (outcome.step_seconds * 8 * 989e12))


def test_simulation_of_a_hybrid_model_is_printed(capsys, tmp_path):
    path, picture = tmp_path / "config.json", tmp_path / "simulation.png"
    path.write_text(json.dumps(QWEN3_NEXT))
    line = f"simulate --lengths 6000,1000,800 --cp-size 2 --model {path} --plot {picture}"
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert "  scan  " in out and "ours, whole_doc" in out and picture.stat().st_size > 10_000
    for name in BASELINES:
        title = BASELINES[name].title
        assert f"left out: {title}: it has no exchange for recurrent and convolutional layers" in out
        assert sum(line.startswith(title) for line in out.splitlines()) == 0
    assert main("simulate --lengths 6000,1000,800 --cp-size 2".split()) == 0
    assert "  scan  " not in capsys.readouterr().out


def test_utilization_counts_only_the_models_work():
    config = {**LLAMA_3_8B, "num_hidden_layers": 1}
    model = CostModel.from_config(config, "h100")
    outcome = simulate([4096, 4096], 2, config, model, names=["whole_doc"])["whole_doc"]
    linear = 8192 * 2 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336 + 4096 * 128256)
    attention = 2 * (4096 * 4097 // 2) * 32 * 4 * 128
    assert outcome.mfu == pytest.approx(3 * (linear + attention) / (outcome.step_seconds * 2 * 989e12))
    full = simulate([4096, 4096], 2, config, model, names=["whole_doc"], gradient_checkpointing="full")["whole_doc"]
    assert full.step_seconds > 1.3 * outcome.step_seconds and full.mfu < outcome.mfu


def test_memory_of_gathered_kv():
    model = CostModel.from_config(LLAMA_3_8B, "h100")
    found = simulate([16384], 8, LLAMA_3_8B, model, names=["llama3", "ring"])
    shape, setup = MemoryShape.from_config(LLAMA_3_8B), TrainingSetup(gpus=8)
    kept = 32 * 7 * 2048 * 8 * 256 * 2
    at_loss = {name: outcome.memory_bytes for name, outcome in found.items()}
    assert at_loss["llama3"] - at_loss["ring"] == pytest.approx(kept)
    load = RankLoad(2048, 7 * 2048, batch_tokens=16384)
    without = estimate_memory(shape, dataclasses.replace(setup, keep_received_kv=False), load)
    assert estimate_memory(shape, setup, load).to_dict() == without.to_dict()


@pytest.mark.parametrize("pack", [sample_pack("pile", 16384), KNOWN_PACKS["mixed"], [64] * 8])
def test_tokens_of_a_padded_all_gather(pack):
    plan = plan_of("flashcp_paper", pack, 4)
    owner = owners(plan)
    last = [ranks[-1] for ranks in owner]
    shared = [0] * 4
    for ranks, rank_of_last in zip(owner, last):
        end = len(ranks)
        while end and ranks[end - 1] == rank_of_last:
            end -= 1
        for rank in range(4):
            shared[rank] += int((ranks[:end] == rank).sum())
    assert shared_tokens(plan) == max(shared)
    assert padded_all_gather_fraction(plan) == max(shared) * 4 / sum(pack)


def test_schemes_that_cannot_run_a_model():
    model = model_of(dataclasses.replace(MHA, window=100))
    config = {"hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8}
    assert not {"ring", "zigzag_ring"} & set(simulate([4000], 4, config, model))
    assert "ulysses" not in simulate([4000], 6, config, model_of())
    with pytest.raises(ConfigurationError, match="cp_size 12 does not fill nodes of 8 ranks"):
        simulate([4000], 12, config, model_of())
    for cp_size in (1, 257):
        with pytest.raises(PlanError, match=f"cp_size {cp_size} cannot be simulated"):
            simulate([4000], cp_size, config, model_of())


def leaves(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif prefix or key != "description":
            yield prefix + key


@pytest.mark.parametrize("name", HARDWARE)
def test_every_figure_of_a_profile_has_a_source(name):
    data = json.loads((Path(hardware_profile.__file__).with_name("hardware") / f"{name}.json").read_text())
    sources = {key for keys in data.pop("sources") for key in keys.split(", ")}
    figures = set(leaves(data))
    for figure in figures:
        assert any(figure == key or figure.startswith(f"{key}.") for key in sources), figure
    for key in sources:
        assert any(figure == key or figure.startswith(f"{key}.") for figure in figures), key
    profile = HardwareProfile.load(name)
    if name not in ("cpu", "generic"):
        assert 0.5 < profile.linear_flops_per_second / profile.peak_flops_per_second < 0.65


def test_faster_hardware_is_faster():
    lengths = sample_pack("prolong64k", 32768)
    steps = {}
    for name in HARDWARE:
        model = CostModel.from_config(LLAMA_3_8B, name)
        steps[name] = simulate(lengths, 8, LLAMA_3_8B, model, names=["per_doc_cp"])["per_doc_cp"].step_seconds
    slower = ["b200", "h200", "h100", "mi300x", "a100", "l40s", "generic", "rtx5090", "rtx4090", "cpu"]
    assert sorted(steps, key=steps.get) == slower


def test_sixty_four_ranks():
    lengths = sample_pack("prolong64k", 131072)
    model = CostModel.from_config(LLAMA_3_8B, "h100")
    found = simulate(lengths, 64, LLAMA_3_8B, model, names=["search", *BASELINES])
    assert list(found) == ["search", *(name for name in BASELINES if name != "ulysses")]
    # A gathered token is sent to each node once, a block of the ring to every rank.
    a_block = 2048 * 32 * 8 * 256 * 2
    assert (found["llama3"].received[1] == 7 * a_block).all()
    assert found["zigzag_ring"].received[1].max() == pytest.approx(63 * a_block, rel=0.001)
    assert 0 < found["search"].received[1].max() < 7 * a_block


@pytest.fixture
def lengths_file(tmp_path):
    path = tmp_path / "lengths.jsonl"
    path.write_text("\n".join(json.dumps({"tokens": list(range(size)), "length": size}) for size in (900, 500, 300)))
    return path


def test_lengths_from_files(tmp_path, lengths_file):
    assert read_lengths(lengths_file) == read_lengths(lengths_file, "tokens") == [900, 500, 300]
    text = tmp_path / "lengths.txt"
    text.write_text("900, 500\n300\n\n7")
    assert read_lengths(text) == [900, 500, 300, 7]
    drawn = draw_pack([900, 500, 300], 1000, seed=3)
    assert sum(drawn) == 1000 and drawn == draw_pack([900, 500, 300], 1000, seed=3)
    assert sorted(draw_pack([900, 500, 300], 1700)) == [300, 500, 900]
    for content, match in (
        ("12\nten", "line 2 has no document length"),
        ("12 0", "line 1 has a document of 0 tokens"),
    ):
        text.write_text(content)
        with pytest.raises(PlanError, match=match):
            read_lengths(text)
    with pytest.raises(PlanError, match="line 1 has no document length.*'size'"):
        read_lengths(lengths_file, "size")
    with pytest.raises(PlanError, match="cannot be read"):
        read_lengths(tmp_path / "none.txt")
    with pytest.raises(PlanError, match="3 documents with 1,700 tokens do not fill a window of 2,000"):
        draw_pack([900, 500, 300], 2000)


SCHEME_KEYS = {
    *(f"{part}_seconds" for part in ("step", "attention_module", "linear", "attention", "scan", "copies", "exposed")),
    "repeated_seconds",
    *("transfer_seconds", "busiest_attention_seconds", "mfu", "intra_node_bytes", "inter_node_bytes", "memory_bytes"),
    *("over_reference", "attention_over_reference"),
}


def test_command(capsys, tmp_path, lengths_file):
    line = f"simulate --lengths-file {lengths_file} --window 1600 --packs 2 --cp-size 2 4 --hardware h100 b200"
    picture = tmp_path / "simulation.png"
    assert main([*line.split(), "--ranks-per-node", "2", "--json", "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    found = json.loads(capsys.readouterr().out)
    assert found["window"] == 1600 and len(found["documents"]) == 2
    cells = [(cell["hardware"], cell["cp_size"], cell["ranks_per_node"]) for cell in found["cells"]]
    assert cells == [("h100", 2, 2), ("h100", 4, 2), ("b200", 2, 2), ("b200", 4, 2)]
    packs_drawn = [draw_pack([900, 500, 300], 1600, seed=seed) for seed in (0, 1)]
    model = CostModel.from_config(LLAMA_3_8B, dataclasses.replace(H100, ranks_per_node=2))
    outcomes = [simulate(pack, 4, LLAMA_3_8B, model, names=("llama3", TIMED)) for pack in packs_drawn]
    for cell in found["cells"]:
        assert list(cell["schemes"]) == [*NAMES] and cell["left_out"] == {} and cell["reference"] == TIMED
        for row_of_scheme in cell["schemes"].values():
            assert set(row_of_scheme) == SCHEME_KEYS
        assert cell["schemes"][TIMED]["over_reference"] == 1
    llama = found["cells"][1]["schemes"]["llama3"]
    steps = [outcome["llama3"].step_seconds for outcome in outcomes]
    ratios = [outcome["llama3"].step_seconds / outcome[TIMED].step_seconds for outcome in outcomes]
    assert llama["step_seconds"] == pytest.approx(sum(steps) / 2)
    assert llama["over_reference"] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)

    assert main("simulate --lengths 900,500,300 --cp-size 3 --gradient-checkpointing full".split()) == 0
    text = capsys.readouterr().out
    assert "1,700 tokens in 3 documents, 1 pack, gradient checkpointing full" in text
    assert "all-gather, Llama 3" in text and "repeated" in text and "3 ranks do not divide 32 query heads" in text


@pytest.mark.parametrize(
    "line, match",
    [
        ("--lengths-from pile --cp-size 4", "--lengths-from needs --window"),
        ("--lengths 100,20 --window 120 --cp-size 4", "--window goes with --lengths-from"),
        ("--lengths-from pile --window 1000 --packs 0 --cp-size 4", "--packs must be at least 1"),
        ("--lengths 100,20 --cp-size 4 12", "cp_size 12 does not fill nodes of 8 ranks"),
        ("--lengths 100,20 --cp-size 300", "cp_size 300 cannot be simulated"),
        ("--lengths 2,3 --cp-size 8", "every rank needs at least one token"),
        ("--lengths 100,20 --cp-size 4 --hardware tpu", "no hardware profile 'tpu'.*a100, b200, .*h100, h200"),
        ("--lengths 100,20 --cp-size 4 --ranks-per-node 0", "--ranks-per-node must be at least 1"),
    ],
)
def test_errors_name_the_remedy(capsys, line, match):
    assert main(["simulate", *line.split()]) == 2
    assert re.search(match, capsys.readouterr().err.replace("\n", " "))


def test_predictions_compared_with_the_papers_measurements(capsys):
    assert main("bench published --packs 1 --json".split()) == 0
    found = json.loads(capsys.readouterr().out)
    for corpus, schemes in published.PAPER.items():
        for scheme in schemes:
            beside = found["parts"][corpus][scheme]
            assert beside["errors"][0] == pytest.approx(beside["predicted"][0] / schemes[scheme][0] - 1)
        # Figures that do not depend on the paper's packs.
        for scheme in ("llama3", "per_doc_cp"):
            assert found["parts"][corpus][scheme]["errors"][3:5] == pytest.approx([-0.06, -0.07], abs=0.02)
        ratios = found["kernel_ratios"][corpus]
        assert ratios["predicted"]["backward / forward"] == pytest.approx(
            ratios["published"]["backward / forward"], rel=0.1
        )
    # The paper's averages, computed from its measurements of other implementations and of FlashCP's kernels.
    both = found["speedups"]["32 KV heads, published"]["both"]
    assert all(both[rival] > ratio for rival, ratio in published.TARGETS.items())
    assert main("bench published --packs 1".split()) == 0
    assert "32 KV heads, published, ours copies as much" in capsys.readouterr().out
