"""Recurrent and convolutional layers on documents that are cut: states and tokens pass between ranks, exactly."""

import pytest
import torch

from hf_flashcp.doctor.gradients import GRADIENT_FLOOR
from hf_flashcp.errors import BatchError, FlashCPError, UnsupportedModelError
from hf_flashcp.integrations.gradient_check import gradient_error, relative_error
from hf_flashcp.layout import RankPlan
from hf_flashcp.layout.state_layout import SliceGroup
from hf_flashcp.plan.contracted import contracted, states_moved
from hf_flashcp.plan.hierarchical_traffic import hierarchical_traffic
from hf_flashcp.plan.slices import local_slices
from hf_flashcp.plan.traffic import traffic_matrix
from hf_flashcp.planning import ShardPlan, plan_documents
from hf_flashcp.recurrence.mamba2 import _Mamba2, mamba2
from tests import engine_cases, fault_cases, model_cases, recurrence_cases, trainer_cases
from tests.models import HYBRIDS, KINDS, WHOLE_DOCUMENT_HYBRIDS


FP64, FP32 = 1e-12, 1e-5
STRATEGIES = ["search", "per_doc", "per_seq", "flashcp"]
LENGTHS = [(200, 3, 130, 1, 97), (301,), (5, 1, 2, 9)]
SCANS = [family for family in KINDS if family not in ("lfm2", "zaya")]
CUT = (200, 3, 130, 1, 97)


def plans(cp_size, strategies=STRATEGIES, lengths=LENGTHS):
    return [plan_documents(each, cp_size, strategy=strategy) for each in lengths for strategy in strategies]


def check(results, limit=FP64):
    for found in results:
        assert max(map(max, found)) < limit, found


# Gradients


SAMPLE = {
    1: plans(1, ["per_doc"], LENGTHS[:1]),
    2: [*plans(2, lengths=LENGTHS[:1]), *plans(2, ["search"], LENGTHS[1:])],
    3: [*plans(3, ["search"], LENGTHS[:1]), *plans(3, ["per_doc"], LENGTHS[2:])],
    4: [*plans(4, ["flashcp"], LENGTHS[:1]), *plans(4, ["per_seq"], LENGTHS[1:])],
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_cut_documents(pool, family):
    """States last for whole documents. Slices are shorter and longer than a chunk of the kernels."""
    for cp_size, todo in SAMPLE.items():
        check(pool.run(cp_size, recurrence_cases.errors, family, todo))


@pytest.mark.load
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("family", HYBRIDS)
def test_cut_documents_with_every_strategy(pool, family, cp_size):
    check(pool.run(cp_size, recurrence_cases.errors, family, plans(cp_size)))


ODD = {
    "one token per slice": ShardPlan(
        (9, 5), 2, [[(0, t, t + 1) for t in range(0, 9, 2)], [*[(0, t, t + 1) for t in range(1, 9, 2)], (1, 0, 5)]]
    ),
    "a rank that only begins a document": ShardPlan(
        (90, 4), 3, [[(0, 0, 30)], [(0, 30, 60)], [(0, 60, 90), (1, 0, 4)]]
    ),
    "ranks without any cut document": ShardPlan(
        (150, 75, 75), 4, [[(0, 0, 75)], [(0, 75, 150)], [(1, 0, 75)], [(2, 0, 75)]]
    ),
    "several slices per rank": ShardPlan((80,), 2, [[(0, 0, 9), (0, 20, 31), (0, 60, 80)], [(0, 9, 20), (0, 31, 60)]]),
    "several stages": plan_documents(CUT, 4, strategy="per_doc", num_stages=3),
    "later slices on earlier ranks": ShardPlan((60, 7), 3, [[(0, 40, 60)], [(0, 20, 40), (1, 0, 7)], [(0, 0, 20)]]),
}


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.smoke
def test_odd_plans(pool, family):
    """Every rank enters the collectives of backward, even if it neither sends nor receives states."""
    for plan in ODD.values():
        check(pool.run(plan.cp_size, recurrence_cases.errors, family, [plan]))


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("family", KINDS)
def test_random_plans(pool, family, cp_size):
    todo = recurrence_cases.random_plans((70, 3, 40, 1, 25), cp_size, 4, seed=cp_size)
    check(pool.run(cp_size, recurrence_cases.errors, family, todo))


@pytest.mark.parametrize("family", KINDS)
def test_nodes(pool, family):
    """States and tokens are sent to each node once."""
    todo = [ShardPlan(each.lengths, 4, each.slices, ranks_per_node=2) for each in plans(4, ["per_doc", "search"])]
    check(pool.run(4, recurrence_cases.errors, family, todo))


@pytest.mark.parametrize("family", [family for family in KINDS if family != "zaya"])
def test_fp32_and_bf16(pool, family):
    for found in pool.run(2, recurrence_cases.rounded_errors, family, CUT):
        assert found[torch.float32][1] < FP32
        single, ours = found[torch.bfloat16]
        assert 0 < ours <= 2 * single


@pytest.mark.parametrize("family", SCANS)
def test_states_of_bf16_layers_are_not_rounded(pool, family):
    (plan,) = plans(2, ["per_doc"], [CUT])
    for tensors in pool.run(2, recurrence_cases.summaries, family, plan, "bfloat16"):
        for each in tensors:
            assert each.dtype == torch.float32 and not torch.equal(each, each.bfloat16().float())


def mamba2_scan(length, dtype, rate=-8.0):
    """Return a scan of one head whose kernel returns its input, its inputs, and one slice."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.rand(1, length, *shape, generator=generator) for shape in ((1, 2), (1,), (1, 2))]
    x, dt, B = (each.to(dtype).clone().requires_grad_() for each in inputs)
    steps = {"dt_bias": None, "dt_softplus": False, "dt_limit": (0.0, 0.1)}
    scan = _Mamba2(lambda x, *args, **kwargs: x, (x, dt, B, B), torch.full((1,), rate, dtype=dtype), steps, {})
    return scan, (x, dt, B), SliceGroup(local_slices([(0, 0, length)]))


def test_long_slices_of_mamba2_in_fp32():
    """The states of slices that decay by exp(-26000) are exact to fp32, and so are gradients."""
    found = []
    for dtype in (torch.float64, torch.float32):
        scan, inputs, slices = mamba2_scan(1 << 15, dtype)
        _, last = scan.first(slices)
        found.append([last.detach(), *torch.autograd.grad(last.sum(), inputs)])
    for exact, ours in zip(*found):
        assert relative_error(ours, exact) < FP32


def test_states_of_mamba2_under_autocast():
    """Autocast does not change them, and backward keeps no values in fp32 for them."""
    found, kept = [], []
    for enabled in (True, False):
        scan, inputs, slices = mamba2_scan(90, torch.bfloat16, rate=-0.1)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept),
        ):
            continued = scan.continued(slices)
            read = continued.read(continued.added)
        found.append([continued.decay, continued.added, read])
        assert not [each for each in kept if each.dtype == torch.float32 and each.numel() >= inputs[0].numel()]
    for ours, expected in zip(*found):
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)


def test_a_gate_in_the_scan_of_mamba2():
    plan = RankPlan(plan_documents([9], 1))
    values, steps = torch.zeros(1, 9, 1, 2), torch.zeros(1, 9, 1)
    with pytest.raises(UnsupportedModelError, match=r"passes its gate \(z\) to the scan"):
        mamba2(None, plan, values, steps, steps[0, 0], values, values, 4, z=values)


@pytest.mark.parametrize("family", KINDS)
def test_wrong_exchanges_are_noticed(pool, family):
    (plan,) = plans(2, ["per_doc"], [CUT])
    for found in pool.run(2, recurrence_cases.mutated_errors, family, plan):
        assert found.pop("none") < FP64
        wrong = {name: error for name, error in found.items() if family in SCANS or name == "no halo"}
        assert min(wrong.values()) > 1e-2, wrong


# Trainers and wrappers


def check_training(results, reference, loss=1e-6, change=2e-5):
    """Check losses, which are logged in fp32, and changes of parameters. Scans run in fp32."""
    losses, changes = reference
    for ours, ours_changes in results:
        assert ours == pytest.approx(losses, rel=loss)
        assert gradient_error(ours_changes, changes, GRADIENT_FLOOR) < change


WRAPPERS = {
    "DDP": (2, {"cp_size": 2}),
    "DDP, two groups": (4, {"cp_size": 2, "per_batch": 3}),
    "checkpointing": (2, {"cp_size": 2, "activation_checkpointing": True}),
    "FSDP2": (2, {"cp_size": 2, "fsdp": True}),
    "FSDP2, two groups": (4, {"cp_size": 2, "per_batch": 3, "fsdp": True}),
}


@pytest.mark.parametrize(
    "family, lora, names",
    [
        ("qwen3_5", None, list(WRAPPERS)),
        ("qwen3_5", ["q_proj", "in_proj_qkv"], ["DDP, two groups", "FSDP2"]),
        *((family, None, ["DDP", "FSDP2, two groups"]) for family in KINDS if family != "qwen3_next"),
    ],
)
def test_trainer(pool, family, lora, names):
    """Losses and parameters are those of a Trainer on one process."""
    (reference,) = pool.run(1, recurrence_cases.trained, family, {"lora": lora})
    for name in names:
        world_size, options = WRAPPERS[name]
        results = pool.run(world_size, recurrence_cases.trained, family, {"lora": lora, **options})
        check_training(results, reference)


def test_sft_trainer(pool):
    (reference,) = pool.run(1, recurrence_cases.trained_by_sft, "qwen3_5", 1, 2)
    for world_size, per_batch in ((2, 2), (4, 1)):
        check_training(pool.run(world_size, recurrence_cases.trained_by_sft, "qwen3_5", 2, per_batch), reference)


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_autocast(pool, family):
    for ours, single in pool.run(2, trainer_cases.autocast_errors, CUT, 2, family):
        assert 0 < ours <= 2 * single


def test_states_are_carried_in_fp32_under_autocast(pool):
    (plan,) = plans(4, ["per_doc"], [CUT])
    for found in zip(*(pool.run(4, recurrence_cases.carried, plan, autocast) for autocast in (True, False))):
        for ours, expected in zip(*found):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_fsdp2_mixed_precision(pool, family):
    for ours, _, single in pool.run(2, model_cases.fully_sharded_errors, family, CUT, 2, True):
        assert 0 < ours <= 2 * single


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_fsdp2_units_in_layers(pool, family):
    """FSDP2 changes the classes of mixers that it shards as units of their own, as min_num_params can ask for."""
    for ours, loss, _ in pool.run(2, model_cases.fully_sharded_errors, family, CUT, 2, False, True):
        assert max(ours, loss) < 2e-5


MIXERS = ["in_proj_qkvz", "in_proj_ba", "out_proj"]


@pytest.mark.parametrize(
    "options",
    [
        {"lora": ["q_proj", "v_proj"]},
        {"lora": MIXERS},
        {"lora": MIXERS, "frozen": ("layers.0.",)},
        {"lora": ["in_proj_ba"], "frozen": ("layers.0.",)},
        {"lora": ["out_proj"]},
        {"frozen": ("embed", "proj", "norm", "head", "mlp", "conv", "dt_bias")},
        {"frozen": ("linear_attn",)},
        {"frozen": ("embed",)},
    ],
    ids=str,
)
def test_frozen_parameters(pool, options):
    """LoRA beside frozen mixers, on mixers only, and after layers without gradients; gradients of A alone."""
    layers = ["linear_attention", "full_attention", "linear_attention"]
    options = {**options, "overrides": {"num_hidden_layers": 3, "layer_types": layers}}
    for error in pool.run(3, model_cases.family_errors_with, "qwen3_next", [40, 3, 17, 1, 25], ["per_doc"], options):
        assert error < FP64


@pytest.mark.parametrize(
    "family, overrides",
    [
        ("bamba", {}),
        pytest.param("zaya", {"num_hidden_layers": 1, "layer_types": ["hybrid"]}, marks=pytest.mark.load),
        *(pytest.param(name, {}, marks=pytest.mark.load) for name in ("qwen3_5", "kimi_linear", "lfm2")),
    ],
)
def test_compiled_layers(pool, family, overrides):
    """Gradients are those without compilation, and a further pack compiles no new graph."""
    packs = [[40, 3, 17, 1, 25], [30, 9], [64, 5, 7]]
    for errors, graphs, _ in pool.run(2, engine_cases.compiled, packs, "aot_eager", False, family, overrides):
        assert max(errors) < FP64
        assert graphs == [graphs[0]] * 3


# One layer


TWO_CUT = ShardPlan(
    (90, 60, 7), 3, [[(0, 0, 20), (1, 40, 60)], [(0, 20, 40), (0, 60, 90)], [(0, 40, 60), (1, 0, 40), (2, 0, 7)]]
)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
@pytest.mark.smoke
def test_number_and_bytes_of_exchanges(pool, family, dtype):
    """A layer has one exchange of tokens and one of states, forward and backward, as the contracted plan says."""
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]
    back = contracted(TWO_CUT.slices, backwards=True).slices
    for rank, found in enumerate(pool.run(3, recurrence_cases.exchanged, family, TWO_CUT, dtype)):
        forward, backward, width, channels, summary = found
        tokens = traffic_matrix(TWO_CUT.slices, width)
        expected = [(channels, int(tokens[:, rank].sum()) * channels * size)]
        returned = [(channels, int(tokens[rank].sum()) * channels * size)]
        if family in SCANS:
            row = summary * max(size, 4)
            expected.append((summary, states_moved(TWO_CUT.slices)[0][rank] * row))
            returned.insert(0, (summary, int(traffic_matrix(back)[:, rank].sum()) * row))
        assert forward == expected and backward == returned


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_number_and_bytes_of_exchanges_over_nodes(pool, family):
    (direct,) = plans(4, ["per_doc"], [CUT])
    plan = ShardPlan(direct.lengths, 4, direct.slices, ranks_per_node=2)
    there, back = (contracted(plan.slices, backwards=backwards).slices for backwards in (False, True))
    for rank, found in enumerate(pool.run(4, recurrence_cases.exchanged, family, plan, "float64")):
        forward, backward, width, channels, summary = found
        tokens = hierarchical_traffic(plan.slices, 2, width)
        expected = [(channels, int(each[:, rank].sum()) * channels * 8) for each in tokens]
        returned = [(channels, int(each[rank].sum()) * channels * 8) for each in tokens]
        if family in SCANS:
            for seen, slices in ((expected, there), (returned, back)):
                counts = hierarchical_traffic(slices, 2)
                seen += [(summary, int(each[:, rank].sum()) * summary * 8) for each in counts]
        assert sorted(forward) == sorted(expected) and sorted(backward) == sorted(returned)


@pytest.mark.parametrize("family", [family for family in HYBRIDS if family != "zaya"])
def test_plans_without_cuts_need_no_exchange(pool, family):
    """Every mixer runs once, and not once per document."""
    plan = plan_documents([40, 3, 17, 1, 25], 2, strategy="whole_doc")
    for runs, exchanges in pool.run(2, recurrence_cases.mixer_calls, family, plan):
        assert set(runs.values()) == {1} and exchanges == {"mixers": 0, "backward": 0}


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_mixers_run_once_on_cut_documents(pool, family):
    for runs, exchanges in pool.run(3, recurrence_cases.mixer_calls, family, TWO_CUT):
        assert set(runs.values()) == {1} and exchanges["mixers"] == len(runs) * (1 if family == "lfm2" else 2)


# Faults


@pytest.mark.parametrize(
    "number, what",
    enumerate(
        [
            "tokens before slices",
            "recurrent states",
            "gradients of recurrent states",
            "gradients of tokens before slices",
        ]
    ),
)
@pytest.mark.parametrize("family", SCANS)
def test_a_bit_that_changes_in_transit(pool, family, number, what):
    plan = plan_documents(CUT, 3, strategy="per_doc")
    found = pool.errors(3, recurrence_cases.layer_with_a_flipped_bit, family, plan, number, 1)
    assert len({str(error) for error in found}) == 1 and type(found[0]) is FlashCPError
    assert "Data changed during an exchange" in str(found[0]) and f"rows of {what} (" in str(found[0])


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_correct_layers_pass_in_debug_mode(pool, family):
    pool.run(3, recurrence_cases.layer_in_debug_mode, family, TWO_CUT)


@pytest.mark.parametrize("point", ["recurrent states", "gradients of recurrent states"])
def test_a_rank_that_is_missing(tmp_path, forked, point):
    arguments = recurrence_cases.loop_that_loses_a_rank, fault_cases.kill, 1, point
    found = fault_cases.outcomes(str(tmp_path), 2, *arguments)
    assert found[1] == ("ended", -9)
    kind, message = found[0]
    assert kind == "FlashCPError" and "Missing: rank 1 (host " in message, found[0]
    assert f"waiting for the {point} of other ranks" in message


# Refusals


def check_refusal(found, kind, *fragments):
    for error in found:
        assert type(error) is kind, error
        for fragment in fragments:
            assert fragment in str(error)


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_a_mixer_with_its_own_kernel(pool, family):
    change = recurrence_cases.with_its_own_kernel
    found = pool.errors(2, recurrence_cases.step, family, change)
    check_refusal(found, UnsupportedModelError, "layers of", "The others did not exchange states", "use_kernels")


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_a_mixer_without_the_plan(pool, family):
    found = pool.errors(2, recurrence_cases.step, family, recurrence_cases.without_the_plan)
    check_refusal(found, UnsupportedModelError, "but its layer was not given flashcp_plan")


def test_another_convolution(pool):
    found = pool.errors(2, recurrence_cases.step, "qwen3_next", recurrence_cases.with_another_convolution)
    check_refusal(found, UnsupportedModelError, "has a convolution model.smoothing outside of its Qwen3Next")


@pytest.mark.parametrize("family", [*SCANS, "lfm2"])
def test_a_modeling_file_without_the_function(pool, family):
    found = pool.errors(2, recurrence_cases.without_a_function, family)
    check_refusal(found, UnsupportedModelError, "has no function", "Use the version of transformers")


@pytest.mark.parametrize("family", WHOLE_DOCUMENT_HYBRIDS)
def test_cut_documents_of_families_that_need_whole_ones(pool, family):
    found = pool.errors(2, recurrence_cases.step, family)
    check_refusal(found, BatchError, "that need whole documents, but the plan gives rank", 'strategy="whole_doc"')
