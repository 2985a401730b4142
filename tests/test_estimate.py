import ast
import json
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_flashcp.attention.kernels import BackwardInputs, ScoreOptions
from hf_flashcp.bench.memory import CASES, LLAMA, RANK_CASES, compare, compare_on_ranks
from hf_flashcp.doctor.tiny import default_config
from hf_flashcp.errors import ConfigurationError, PlanError
from hf_flashcp.layout import RankPlan, Rectangle
from hf_flashcp.planning import CostModel, HardwareProfile, ShardPlan, plan_documents
from hf_flashcp.predict.attention_memory import attention_backward, backward_buffers, backward_workspace
from hf_flashcp.predict.layer_memory import LayerStack, block_backward, layer_bytes
from hf_flashcp.predict.layer_work import largest_calls
from hf_flashcp.predict.loss_memory import chunk_tokens, loss_copies, loss_memory
from hf_flashcp.predict.memory import PARTS, MemoryEstimate, estimate_memory, largest_window
from hf_flashcp.predict.memory_shape import MemoryShape
from hf_flashcp.predict.mixer_memory import mixer_backward, mixer_bytes
from hf_flashcp.predict.model_shape import LLAMA_3_8B
from hf_flashcp.predict.training_setup import KERNELS, RankLoad, TrainingSetup
from hf_flashcp.simulation.remedies import REMEDIES, as_arguments, combinations, described, propose
from hf_flashcp.simulation.sizing import Choice, best, busiest_load, choices, cp_sizes, sizings, usable_bytes
from tests.hybrid_sizes import HYBRIDS, QWEN3_NEXT, SIZES
from tests.kernel_cases import EmulatedVarlen
from tests.models import FAMILIES
from tests.test_cli import png_size, run


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Run on one thread: such small operators gain nothing from more, and a busy machine makes threads wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_near(found, within=0.10):
    for key in ("peak", "kept"):
        assert abs(found[key]["estimated"] / found[key]["measured"] - 1) < within, (key, found)


@pytest.mark.parametrize("name", CASES)
def test_estimate_against_measured_memory(name):
    config, options = CASES[name]
    assert_near(compare(config, options))


@pytest.mark.parametrize("name", RANK_CASES)
def test_estimate_against_measured_memory_of_ranks(pool, name):
    config, options = RANK_CASES[name]
    ranks = pool.run(2, compare_on_ranks, config, options)
    # At the end of forward, a rank may still hold weights that FSDP2 gathered for its last layer.
    kept = min((found["kept"] for found in ranks), key=lambda each: each["measured"])
    for found in ranks:
        assert_near({**found, "kept": kept})


@pytest.mark.parametrize("lengths", [(16,), (64,), (256,)])
@pytest.mark.parametrize(
    "name", ["llama, bf16", "llama, fp32, autocast", "big vocabulary, bf16", "big vocabulary, bf16, no logits"]
)
def test_the_peak_with_few_tokens(name, lengths):
    config, options = CASES[name]
    assert_near(compare(config, options, lengths))


def test_received_kv_is_held_if_one_document_is_shared(pool):
    config = {**LLAMA, "num_key_value_heads": 8}
    for found in pool.run(2, compare_on_ranks, config, {"dtype": "bfloat16", "mixed_precision": "no"}, (1024,)):
        assert_near(found, within=0.02)


def test_estimate_if_attention_is_the_peak(pool):
    narrow = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 16, "num_hidden_layers": 1}
    config = {**LLAMA, **narrow, "num_key_value_heads": 8, "head_dim": 32}
    for found in pool.run(2, compare_on_ranks, config, {"dtype": "bfloat16", "mixed_precision": "no"}, (4096,)):
        assert found["moment"] == "last layer's backward"
        assert_near(found, within=0.05)


_FOUR_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHER_FAMILIES = {
    "gemma3_text": {},
    "gpt_oss": _FOUR_EXPERTS,
    "mixtral": _FOUR_EXPERTS,
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "starcoder2": {},
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_estimate_of_other_families(family):
    config = {**LLAMA, **OTHER_FAMILIES[family], "model_type": family, "num_hidden_layers": 4}
    assert_near(compare(config, {"dtype": "bfloat16", "mixed_precision": "no"}))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
    counted = sum(parameter.numel() for parameter in model.parameters())
    # In such small models, biases are several percent of the parameters.
    assert abs(MemoryShape.from_config(model.config).parameters / counted - 1) < 0.05


def test_parameters_of_known_models():
    assert MemoryShape.from_config(LLAMA_3_8B).parameters == 8_030_261_248
    assert MemoryShape.from_config(QWEN3_NEXT).parameters / 1e9 == pytest.approx(79.7, abs=0.05)


@pytest.mark.parametrize("model_type, sizes", [*HYBRIDS.items(), ("zamba2", None), ("granitemoehybrid", None)])
def test_parameters_of_hybrid_models_are_counted(model_type, sizes):
    """A norm of the output and a few values per head are not counted. Zamba2 repeats its attention block."""
    config = default_config(model_type) if sizes is None else AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert abs(MemoryShape.from_config(config).parameters / counted - 1) < 0.006


def test_states_are_kept_in_recurrent_layers_alone():
    """Qwen3-Next has 36 recurrent layers, whose states have 4 MiB, and 12 attention layers."""
    shape = MemoryShape.from_config(QWEN3_NEXT)
    load = RankLoad(4096, 2000, 1000, batch_tokens=32768)
    cut = load._replace(states_received=7, states_held=3, continued_tokens=3000)
    state, response = 3 * 4 * 2**20, 3000 * 2 * 32 * 128
    for mode, kept, repeated in (("none", 1, 0), ("full", 0, 1), ("attention-saving", 0, 1)):
        setup = TrainingSetup(gpus=8, gradient_checkpointing=mode)
        whole, found = (estimate_memory(shape, setup, each) for each in (load, cut))
        at_loss, last, first = (
            found.moments[name]["states"] for name in ("loss", "last layer's backward", "first layer's backward")
        )
        assert at_loss == 36 * kept * (state + response)
        assert (last, first) == (at_loss + repeated * (state + response), state + response)
        assert found.kept - whole.kept == at_loss
        assert not any(parts["states"] for parts in whole.moments.values())
        kv = 0 if mode == "full" else 12 * 2000 * 2 * 2 * 256 * 2
        assert found.moments["loss"]["received KV"] == kv
    scaled = cut.scaled(8192, 65536)
    assert scaled == RankLoad(8192, 4000, 2000, 4000, 2, 65536, False, 7, 3, 6000)


def test_activations_of_a_hybrid_model_follow_its_kinds_of_layers():
    """With more recurrent layers and fewer attention layers, or without feed-forward blocks, other widths are kept."""
    setup, load = TrainingSetup(), RankLoad(1000)

    def kept(kinds, **changes):
        config = {**QWEN3_NEXT, "num_hidden_layers": len(kinds), "layer_types": kinds, **changes}
        return estimate_memory(MemoryShape.from_config(config), setup, load).kept

    none, one, two = (kept([*["linear_attention"] * count, "full_attention"]) for count in range(3))
    assert two - one == pytest.approx(one - none)
    other = kept(["linear_attention", "full_attention", "full_attention"])
    shape = MemoryShape.from_config(QWEN3_NEXT)
    assert two - other == pytest.approx(1000 * (mixer_bytes(shape, shape.recurrent, setup) - _attention_bytes()))
    wide = kept(["linear_attention", "full_attention"], linear_num_value_heads=64)
    # Values before and after the convolution, gate, output, its norm, gated product; normed keys and queries; inverse.
    more = 32 * 128 * (2 * 2 + 2 + 2 + 2 + 8) + 2 * 2 * 32 * 128 + 2 * 32 * 64 + 8 * 32
    assert wide - one == pytest.approx(1000 * more)


def test_layers_without_a_feed_forward_block_keep_none():
    """A block of Nemotron-H keeps its norm's input and output, and input and output of its activation."""
    setup, load = TrainingSetup(), RankLoad(1000)
    with_block, without = (
        estimate_memory(
            MemoryShape.from_config(
                {"model_type": "nemotron_h", **SIZES, **HYBRIDS["nemotron_h"], "layers_block_type": kinds}
            ),
            setup,
            load,
        ).kept
        for kinds in (["linear_attention", "full_attention", "mlp"], ["linear_attention", "full_attention"])
    )
    assert with_block - without == pytest.approx(1000 * ((4 + 2) * 64 + 2 * 64 + 2 * 2 * 96))


def _attention_bytes():
    """What an attention layer of Qwen3-Next keeps per token in bf16, with the norm before it."""
    norms = 8 * 2048 + 8 * (16 + 2) * 256
    queries, kv, output = 2 * 16 * 256, 2 * 2 * 2 * 256, 2 * 16 * 256 + 4 * 16
    gates = 2 * 2 * 16 * 256
    return norms + 2 * 2048 + queries + kv + output + gates


def test_backward_of_a_mixer_holds_gradients_states_and_what_is_received():
    shape, setup = MemoryShape.from_config(QWEN3_NEXT), TrainingSetup()
    load = RankLoad(4096, states_received=5)
    point = mixer_backward(shape, shape.recurrent, setup, load, freed=7.0)
    operands = 2 * 8192 + 2 * 4096 + 2 * 4096
    expected = 2 * 4096 * 2 * 2048 + 2 * 4096 * operands + 2 * 2 * 64 * 32 * 128 * 128 + 5 * 4 * 2**20
    assert (point.temporary, point.workspace, point.freed) == (expected, 0, 7.0)


def test_choices_count_the_states_of_a_hybrid_model():
    model = CostModel.from_config(QWEN3_NEXT, H100)
    alone, shared = choices(QWEN3_NEXT, H100, TrainingSetup(gpus=8), [32768], [1, 8])
    plan = plan_documents([32768], 8, cost_model=model)
    report, load = plan.report(), busiest_load(plan, model)
    assert alone.state_bytes == 0
    assert shared.state_bytes == 36 * 4 * 2**20 * max(report["states_received"])
    assert shared.kv_bytes == pytest.approx(12 * 2 * 2 * 256 * 2 * max(report["kv_received"]))
    assert load.states_received == max(report["states_received"] + report["state_grads_received"])
    assert load.states_held == max(map(len, plan.slices))
    assert load.continued_tokens == 32768 // 8  # a rank that does not hold the head of the document
    backwards = ShardPlan([400], 3, [[(0, 100, 200), (0, 300, 400)], [(0, 200, 300)], [(0, 0, 100)]])
    assert max(backwards.report()["states_received"]) == 2 and busiest_load(backwards, model).states_received == 3
    whole = busiest_load(plan_documents([64] * 8, 8, cost_model=model), model)
    assert (whole.states_received, whole.states_held, whole.continued_tokens) == (0, 0, 0)
    plan = ShardPlan([100, 40], 2, [[(0, 0, 60)], [(0, 60, 100), (1, 0, 40)]])
    assert busiest_load(plan, model)[-3:] == (1, 1, 40)


def test_command_estimates_a_hybrid_model(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_NEXT))
    code, out, err = run(capsys, f"estimate --model {path} --window 65536 --gpus 64")
    assert (code, err) == (0, "") and out.startswith("79.67 billion parameters")
    assert "states GiB per rank" in out and "\nstates  " in out


SHAPE = MemoryShape.from_config(LLAMA_3_8B)
H100 = HardwareProfile.load("h100")


def test_fsdp2_shards_what_ddp_repeats():
    sharded = estimate_memory(SHAPE, TrainingSetup(gpus=16), RankLoad(8192))
    # fp32 shards whatever the dtype: 4 bytes of weight, 8 of Adam's moments.
    assert sharded.parts["weights"] == pytest.approx(4 * SHAPE.parameters / 16)
    assert sharded.parts["optimizer"] == pytest.approx(8 * SHAPE.parameters / 16)
    assert sharded.moments["optimizer"]["gradients"] == pytest.approx(4 * SHAPE.parameters / 16)
    repeated = estimate_memory(SHAPE, TrainingSetup(gpus=16, sharding="ddp"), RankLoad(8192))
    assert repeated.parts["weights"] == pytest.approx(2 * SHAPE.parameters)
    assert repeated.moments["optimizer"]["gathered"] == pytest.approx(2 * SHAPE.parameters)


def test_checkpointing_keeps_less_and_saving_attention_a_bit_more():
    kept = [
        estimate_memory(SHAPE, TrainingSetup(gpus=8, gradient_checkpointing=mode), RankLoad(32768, 32768)).kept
        for mode in ("none", "attention-saving", "full")
    ]
    assert kept[0] > 2 * kept[1] and kept[1] > 1.3 * kept[2]


def test_received_kv_is_kept_up_to_a_bound():
    setup = TrainingSetup(gpus=8)
    few, many = (estimate_memory(SHAPE, setup, RankLoad(1000, n)).parts["received KV"] for n in (4000, 4001))
    assert (few, many) == (32 * 2 * 4000 * 8 * 256, 0)


@pytest.mark.parametrize("mode", ["none", "full", "attention-saving"])
def test_largest_window_is_the_largest(mode):
    setup = TrainingSetup(gpus=8, gradient_checkpointing=mode)
    window = largest_window(SHAPE, setup, 8, 60e9, RankLoad(1, 1.5, 1.0))
    loads = [RankLoad(n / 8, 1.5 * n / 8, n / 8, sequences=n / 8, batch_tokens=n) for n in (window, window + 1024)]
    sizes = [estimate_memory(SHAPE, setup, load).total for load in loads]
    assert window > 0 and sizes[0] <= 60e9 < sizes[1]
    assert largest_window(SHAPE, setup, 8, 1e9, RankLoad(1)) == 0


def test_the_load_of_another_row_is_proportional():
    load = RankLoad(100, 60, 40, 30, 5, 800, stage_masked=True)
    assert load.scaled(200, 1600) == RankLoad(200, 120, 80, 60, 10, 1600, stage_masked=True)


def test_workspace_of_flash_attention_2():
    # 32 query heads and 8 KV heads of 128, 16,384 queries against 114,688 keys.
    for kernel in ("torch_flash", "flash_attn_2"):
        buffers = backward_buffers(SHAPE, 16384, 114688, kernel=kernel, masked=True)
        assert buffers["expanded dk, dv"] == 2 * 2 * 114688 * 32 * 128 == pytest.approx(1.88e9, rel=1e-3)
        assert buffers["dq_accum"] == 4 * (16384 + 128) * 32 * 128 == pytest.approx(0.27e9, rel=3e-3)
        assert buffers["softmax_d"] == 4 * (16384 + 128) * 32
        assert buffers["dk, dv"] == 2 * 2 * 114688 * 8 * 128 == pytest.approx(0.47e9, rel=1e-3)
        assert buffers["dq"] == 2 * 16384 * 32 * 128
        assert buffers["padded inputs"] == buffers["folded inputs"] == 0
        workspace = backward_workspace(SHAPE, 16384, 114688, kernel=kernel, masked=True)
        assert workspace == sum(buffers.values())


def test_workspace_if_query_heads_are_folded():
    """Without a mask nothing is expanded: four query heads of 16,384 queries become one of 65,536."""
    buffers = backward_buffers(SHAPE, 16384, 114688)
    assert buffers["expanded dk, dv"] == 0
    assert buffers["dq_accum"] == 4 * (65536 + 128) * 8 * 128
    assert buffers["softmax_d"] == 4 * (65536 + 128) * 8
    assert buffers["folded inputs"] == 3 * 2 * 16384 * 32 * 128 + 4 * 16384 * 32
    assert buffers["dq"] == 2 * 16384 * 32 * 128 and buffers["dk, dv"] == 2 * 2 * 114688 * 8 * 128
    # Up to two keys per query, copies of queries cost more than they save.
    assert backward_buffers(SHAPE, 1000, 2000)["folded inputs"] == 0
    assert backward_buffers(SHAPE, 1000, 2000) == backward_buffers(SHAPE, 1000, 2000, masked=True)
    # Rows of a single KV head are in the folded order already.
    assert backward_buffers(replace(SHAPE, kv_heads=1), 1000, 2001)["folded inputs"] == 4 * 1000 * 32


def test_the_page_has_the_workspaces_of_a_large_stage():
    page = Path("docs/memory.md").read_text(encoding="utf-8")
    for kernels in (("torch_flash", "flash_attn_2"), ("flash_attn_3", "flash_attn_4"), ("cudnn",)):
        sizes = {
            tuple(
                f"{backward_workspace(SHAPE, 16384, 114688, kernel=kernel, masked=masked) / 2**30:.2f} GiB"
                for masked in (False, True)
            )
            for kernel in kernels
        }
        (row,) = sizes
        assert f"| {', '.join(f'`{name}`' for name in kernels)} | {' | '.join(row)} |" in page


@pytest.mark.parametrize("kernel", ["torch_flash", "flash_attn_2", "cudnn"])
def test_workspace_expands_keys_only_for_grouped_queries(kernel):
    grouped = backward_buffers(SHAPE, 1000, 4000, kernel=kernel, masked=True)
    equal = backward_buffers(replace(SHAPE, kv_heads=32), 1000, 4000, kernel=kernel)
    assert equal["expanded dk, dv"] == equal["folded inputs"] == 0
    assert equal["dk, dv"] == 4 * grouped["dk, dv"]
    assert grouped["expanded dk, dv"] == (2 * 4 * 16384 * 32 * 128 if kernel == "cudnn" else equal["dk, dv"])
    assert equal["dq_accum"] == grouped["dq_accum"]


@pytest.mark.parametrize("kernel", ["flash_attn_3", "flash_attn_4"])
def test_workspace_of_flash_attention_3_and_4(kernel):
    """Rows are rounded up to whole blocks of 128; gradients of keys are summed per KV head, and nothing is folded."""
    buffers = backward_buffers(SHAPE, 1000, 5000, sequences=3, kernel=kernel)
    query_rows, key_rows = 1408, 5504  # 1,000 + 3 x 128 and 5,000 + 3 x 128, rounded up
    assert buffers == {
        "dq_accum": 4 * query_rows * 32 * 128,
        "softmax_d": 4 * query_rows * 32,
        "lse_log2": 4 * query_rows * 32,
        "dk_accum, dv_accum": 2 * 4 * key_rows * 8 * 128,
        "dq": 2 * 1000 * 32 * 128,
        "dk, dv": 2 * 2 * 5000 * 8 * 128,
        "padded inputs": 0,
        "folded inputs": 0,
    }
    equal = backward_buffers(replace(SHAPE, kv_heads=32), 1000, 5000, sequences=3, kernel=kernel)
    assert equal["dk_accum, dv_accum"] == 0
    width = {"flash_attn_3": 64, "flash_attn_4": 32}[kernel]
    narrow = backward_buffers(replace(SHAPE, key_dim=24, value_dim=24), 1000, 5000, sequences=3, kernel=kernel)
    assert narrow["dq_accum"] == 4 * query_rows * 32 * width


@pytest.mark.parametrize("kv_heads, measured", [(8, 2.418e9), (32, 0.271e9)])
def test_workspace_of_cudnn_s_plans(kv_heads, measured):
    """The workspace that cuDNN 9.20 asks for, for 8 sequences of 16,384 queries and 65,536 keys in total."""
    buffers = backward_buffers(replace(SHAPE, kv_heads=kv_heads), 16384, 65536, 8, kernel="cudnn", masked=True)
    workspace = buffers["dq_accum"] + buffers["softmax_d"] + buffers["expanded dk, dv"]
    assert workspace == pytest.approx(measured, rel=0.01)
    assert buffers["statistics"] == 4 * 16384 * 32


def test_cudnn_rounds_rows_and_heads_up():
    wide = replace(SHAPE, key_dim=72, value_dim=40)
    buffers = backward_buffers(wide, 16385, 65537, kernel="cudnn", masked=True)
    assert buffers["dq_accum"] == 4 * 32768 * 32 * 80
    assert buffers["expanded dk, dv"] == 4 * 131072 * 32 * (80 + 48)
    assert buffers["dq"] == 2 * 16385 * 32 * 80 and buffers["dk, dv"] == 2 * 65537 * 8 * (80 + 48)
    assert buffers["padded inputs"] == 2 * (16385 * 32 * (80 + 2 * 48) + 65537 * 8 * (80 + 48))
    assert backward_buffers(SHAPE, 5, 7, kernel="cudnn")["dq_accum"] == 4 * 16384 * 32 * 128
    folded = backward_buffers(SHAPE, 16384, 65536, kernel="cudnn")
    assert folded["dq_accum"] == 4 * 65536 * 8 * 128 and folded["expanded dk, dv"] == 0


@pytest.mark.parametrize(
    "key_dim, value_dim, width, rounded, padded",
    [
        (80, 80, 80, 96, 0),
        (192, 192, 192, 192, 0),
        (160, 160, 160, 192, 0),
        # Tensors padded with zeros: value, output and its gradient; all five.
        (192, 128, 192, 192, 2 * 100 * 32 + 700 * 8),
        (12, 12, 16, 32, 3 * 100 * 32 + 2 * 700 * 8),
    ],
)
def test_workspace_pads_heads(key_dim, value_dim, width, rounded, padded):
    shape = replace(SHAPE, key_dim=key_dim, value_dim=value_dim)
    buffers = backward_buffers(shape, 100, 700, sequences=3, masked=True)
    assert buffers["dq_accum"] == 4 * (100 + 3 * 128) * 32 * rounded
    assert buffers["dq"] == 2 * 100 * 32 * width
    assert buffers["padded inputs"] == 2 * padded * width


class _Copying(EmulatedVarlen):
    """Records the bytes of the inputs of backward that are not parts of the caller's tensors."""

    expands_kv_gradients = True

    def _backward_call(self, inputs, sequences, options):
        given = {tensor.untyped_storage().data_ptr() for tensor in self.given}
        copies = [tensor for tensor in inputs if tensor.untyped_storage().data_ptr() not in given]
        self.copied = sum(tensor.numel() * tensor.element_size() for tensor in copies)
        self.queries = inputs.query.shape[:2]
        return super()._backward_call(inputs, sequences, options)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("keys", [80, 81])
def test_folding_copies_what_the_estimate_says(kv_heads, keys):
    rectangle = Rectangle(0, 40, 0, keys)
    shape = replace(SHAPE, query_heads=4, kv_heads=kv_heads, key_dim=16, value_dim=16)
    tensors = torch.randn(2, 40, 4, 16), torch.randn(2, keys, kv_heads, 16), torch.randn(40, 4, 16)
    query, grad_out, key, value, out = (x.bfloat16().transpose(0, 1) for x in (*tensors[0], *tensors[1], tensors[2]))
    lse = torch.full((4, 40), 9.0)
    kernel = _Copying()
    kernel.given = query, key, value, grad_out, out, lse
    kernel.backward(BackwardInputs(grad_out, query, key, value, out, lse), (rectangle,), ScoreOptions(False, 1))
    folded = keys == 81 and kv_heads < 4
    assert kernel.queries == ((160 // kv_heads, kv_heads) if folded else (40, 4))
    assert kernel.copied == backward_buffers(shape, 40, keys)["folded inputs"]
    assert (kernel.copied > 0) == folded


def test_only_gpus_have_a_workspace():
    def most(shape=SHAPE, masked=True, **options):
        load = RankLoad(16384, 245760, 16384, stage_masked=masked)
        estimate = estimate_memory(shape, TrainingSetup(gpus=8, **options), load)
        return max(parts["attention workspace"] for parts in estimate.moments.values())

    assert most() == backward_workspace(SHAPE, 16384, 245760, masked=True)
    for kernel in ("flash_attn_3", "flash_attn_4"):
        assert most(masked=False, kernel=kernel) == backward_workspace(SHAPE, 16384, 245760, kernel=kernel)
    assert most(device="cpu") == 0
    # No fused kernel takes fp32 or wider heads.
    assert most(dtype="float32", mixed_precision="no") == 0
    assert most(replace(SHAPE, key_dim=512, value_dim=512)) == 0


def test_estimate_of_one_long_document_has_the_workspace():
    setup = TrainingSetup(gpus=16, gradient_checkpointing="full", kernel="flash_attn_3")
    (choice,) = choices(LLAMA_3_8B, H100, setup, [262144], [16])
    parts = choice.memory.moments["last layer's backward"]
    expected = backward_workspace(SHAPE, 16384, 245760, 2, kernel="flash_attn_3")
    assert parts["attention workspace"] == pytest.approx(expected, rel=0.01)
    # With few logits, the workspace decides how much fits.
    (choice,) = choices({**LLAMA_3_8B, "vocab_size": 1024}, H100, setup, [262144], [16])
    assert choice.memory.peak == "last layer's backward" and choice.memory.parts["attention workspace"] > 3.4e9


def test_points_of_attention_s_backward():
    setup = TrainingSetup(gpus=8)
    c, kv, queries = 2, SHAPE.kv_width, 1000 * SHAPE.query_heads * SHAPE.key_dim

    def points(stage_keys, kept):
        return attention_backward(SHAPE, setup, RankLoad(1000, 40000, 5000, stage_keys), kept=kept, freed=0)

    stage, packed, local, end = points(40000, kept=True)
    always = c * 1000 * (SHAPE.query_heads * SHAPE.value_dim + 2 * SHAPE.hidden)
    assert stage.temporary == always + c * kv * 5000
    assert packed.temporary - stage.temporary == c * queries + 2 * c * kv * 40000 and packed.workspace == 0
    assert local.temporary == always + c * queries + c * kv * 45000
    assert local.workspace == backward_workspace(SHAPE, 1000, 1000, masked=True)
    assert stage.workspace == backward_workspace(SHAPE, 1000, 40000)
    windowed = RankLoad(1000, 40000, 5000, 40000, stage_masked=True)
    for kernel in KERNELS:
        masked, *_ = attention_backward(SHAPE, replace(setup, kernel=kernel), windowed, kept=True, freed=0)
        assert masked.workspace == backward_workspace(SHAPE, 1000, 40000, kernel=kernel, masked=True)
    assert end.temporary == always + c * (2 * queries + 6000 * kv) and end.workspace == 0
    # KV that is fetched again is held until its stage is computed, and the local pass has run.
    assert points(40000, kept=False)[0].temporary - stage.temporary == c * (kv * 41000 + queries)
    # During the second of two equal stages, the gradients of the first are being sent, or wait to be added.
    second = points(20000, kept=True)[0]
    assert second.temporary - stage.temporary == c * (kv * 20000 + queries)
    assert second.workspace == backward_workspace(SHAPE, 1000, 20000)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("groups", [None, [[1], [2, 3]]])
def test_largest_calls_are_those_of_the_layouts(window, groups):
    plan = plan_documents([3000, 500, 40, 40, 516], 4, strategy="per_doc").with_offset_groups(groups)
    layers = [replace(CostModel.from_config(LLAMA_3_8B, H100).layers[0], window=window)]
    layouts = [RankPlan(plan, rank, FourRanks()).layout_for(window) for rank in range(4)]
    stages = [stage for layout in layouts for stage in layout.stages(torch.device("cpu"))]
    keys = [stage.received if stage.key_order is None else stage.key_order.count for stage in stages]
    calls = [layout.local for layout in layouts] + [stage.rectangles for stage in stages]
    found = largest_calls(plan, layers)
    assert found.keys == max(keys) and found.masked == (window is not None)
    assert max(map(len, calls)) <= found.sequences <= max(map(len, plan.slices))


class FourRanks:
    def size(self):
        return 4


def test_choices_use_the_cost_model_s_times():
    lengths = [30000, 20000, 15536]
    found = choices(LLAMA_3_8B, H100, TrainingSetup(gpus=8, skip_logits=False), lengths)
    assert [choice.cp_size for choice in found] == [1, 2, 4, 8] == cp_sizes(8, 65536)
    model = CostModel.from_config(LLAMA_3_8B, H100)
    for choice in found:
        seconds = model.step_time(plan_documents(lengths, choice.cp_size, cost_model=model)).seconds
        assert choice.step_seconds == pytest.approx(seconds)
        assert choice.tokens_per_second == pytest.approx(8 / choice.cp_size * 65536 / seconds)
        assert choice.fits == (choice.memory.total <= usable_bytes(H100)) == (choice.largest_window >= 65536)
    setup = TrainingSetup(gpus=8, gradient_checkpointing="full", skip_logits=False)
    slower = choices(LLAMA_3_8B, H100, setup, lengths)
    assert all(1.2 < b.step_seconds / a.step_seconds < 1.5 for a, b in zip(found, slower))


def _stack(received=3000, **options):
    shape = replace(SHAPE, layers=9, attention_layers=9)
    return LayerStack(shape, TrainingSetup(gpus=8, **options), RankLoad(1000, received))


def test_one_of_n_layers_is_checkpointed():
    """Layers 0, 4 and 8 of 9 are checkpointed; of ten, the last one keeps everything."""
    layer = layer_bytes(SHAPE, TrainingSetup()).kept * 1000
    kv, layer_input = 2 * 3000 * 8 * 256, 2 * 4096 * 1000
    stack = _stack(gradient_checkpointing="full", every_n_layers=4)
    assert [index for index in range(9) if stack.runs_again(index)] == [0, 4, 8]
    assert stack.up_to(5) == pytest.approx((2 * layer_input + 4 * layer, 4 * kv, 0))
    assert stack.in_backward(4) == pytest.approx((layer_input + 3 * layer + layer_input + layer, 4 * kv, 0))
    assert stack.last_checkpointed == 8 and _stack().last_checkpointed is None
    ten = replace(SHAPE, layers=10, attention_layers=10)
    setup = TrainingSetup(gpus=8, gradient_checkpointing="full", every_n_layers=4)
    moments = estimate_memory(ten, setup, RankLoad(1000, 3000)).moments
    last, last_again = (moments[f"last {kind}layer's backward"] for kind in ("", "checkpointed "))
    assert last["received KV"] == 7 * kv and last_again["received KV"] == 7 * kv
    assert last["gradients"] == pytest.approx(4 / 8 * (SHAPE.embedding_parameters + SHAPE.hidden))
    assert last_again["gradients"] - last["gradients"] == pytest.approx(4 / 8 * SHAPE.layer_parameters)
    assert "last checkpointed layer's backward" not in estimate_memory(SHAPE, TrainingSetup(), RankLoad(9)).moments


@pytest.mark.parametrize("mode, received", [("full", 3000), ("attention-saving", 3000), ("attention-saving", 4001)])
def test_offloading_leaves_one_layer_on_the_device(mode, received):
    here, there = (_stack(received, gradient_checkpointing=mode, offload=offload) for offload in (False, True))
    assert not any(there.up_to(8)) and here.on_host == here.offloaded == 0
    assert there.in_backward(8) == there.in_backward(0) == pytest.approx(here.in_backward(0))
    saved = [2 * 1000 * 4096]
    if mode == "attention-saving":
        saved += [2 * 1000 * 4096, 4 * 1000 * 32, 2 * received * 8 * 256 * (received <= 4000)]
    assert there.offloaded == 9 * sum(saved)
    assert there.on_host == 9 * sum(2 ** (size - 1).bit_length() for size in saved if size)
    assert estimate_memory(there.shape, there.setup, there.load).host == there.on_host
    some = _stack(received, gradient_checkpointing=mode, offload=True, every_n_layers=4)
    assert some.offloaded == 3 * sum(saved) and some.up_to(8) == pytest.approx(_stack(received).up_to(5))


@pytest.mark.parametrize("keep, kept, kept_again", [(None, False, True), (True, True, True), (False, False, False)])
def test_received_kv_is_kept_as_asked(keep, kept, kept_again):
    stack = _stack(5000, gradient_checkpointing="full", keep_received_kv=keep)
    assert (stack.keeps_kv, stack.keeps_kv_again) == (kept, kept_again)
    assert bool(stack.in_backward(8).received_kv) == kept_again


def test_memory_of_a_loss_without_logits():
    setup = TrainingSetup(gpus=8)
    assert chunk_tokens(10**6, 151936) == 2**28 // 151936 and chunk_tokens(1001, 1000) == 251
    assert chunk_tokens(1, 2**30) == chunk_tokens(1, 0) == 1
    chunk, vocabulary, hidden = 251, 128256, 4096
    found = loss_memory(SHAPE, setup, 1001)
    sums = 4 * vocabulary * hidden + 2 * 1001 * hidden
    assert found == (sums + max(12 * chunk * vocabulary, 2 * vocabulary * (hidden + chunk)), sums, 0, sums)
    assert loss_copies(SHAPE, 1001) == 4 * 2 * 4 * vocabulary * hidden
    kept = loss_memory(SHAPE, replace(setup, skip_logits=False), 1001)
    assert kept == tuple(size * 1001 * vocabulary for size in (10, 4, 12, 2))
    moments = estimate_memory(SHAPE, setup, RankLoad(1001)).moments
    assert "loss backward" not in moments and moments["head backward"]["logits"] == sums


def test_head_groups_divide_what_attention_allocates():
    load, setup = RankLoad(1000, 40000, 5000), TrainingSetup(gpus=8)
    one, two, eight, more = (
        attention_backward(SHAPE, replace(setup, head_groups=n), load, kept=False, freed=0) for n in (1, 2, 8, 9)
    )
    whole = 2 * 1000 * (32 + 2 * 8) * 128  # gradients of all heads
    always = 2 * 1000 * (32 * 128 + 2 * 4096)
    for before, half, eighth in zip(one, two, eight):
        assert half.workspace == pytest.approx(before.workspace / 2)
        assert half.temporary == pytest.approx(whole + always + (before.temporary - always) / 2)
        assert eighth.temporary == pytest.approx(whole + always + (before.temporary - always) / 8)
    assert more == eight
    three = attention_backward(SHAPE, replace(setup, head_groups=3), load, kept=False, freed=0)  # 3, 3 and 2 heads
    assert three[1].temporary == pytest.approx(whole + always + (one[1].temporary - always) * 3 / 8)


def test_a_feed_forward_block_in_tiles_keeps_its_input():
    """Three tiles of 1001 tokens hold at most 334 each. The block has 3 x 4096 x 14336 parameters."""
    setup = TrainingSetup(gpus=8, gradient_checkpointing="full")
    tiled, width, weights = replace(setup, mlp_tiles=3), 2 * 14336, 3 * 4096 * 14336
    whole, kept = (layer_bytes(SHAPE, each) for each in (setup, tiled))
    assert whole.kept - kept.kept == whole.block - kept.block == 4 * width
    around = 2 * 2 * 4096 * 1001
    assert [point.total for point in block_backward(SHAPE, setup, 1001)] == [around + 2 * width * 1001]
    points = block_backward(SHAPE, tiled, 1001)
    assert [point.total for point in points] == [around, around + (4 - 2) * weights + 2 * weights]
    many = block_backward(SHAPE, tiled, 300_000)[-1]
    assert many.total == 2 * 2 * 4096 * 300_000 + (4 - 2) * weights + 6 * width * 100_000
    autocast = replace(tiled, sharding="ddp", dtype="float32")
    casts = 4 * weights / 3  # of one matrix at a time, on a CPU
    assert block_backward(SHAPE, autocast, 1001)[-1].total == around * 2 + 6 * weights
    assert block_backward(SHAPE, replace(autocast, device="cpu"), 1001)[-1].total == around * 2 + 6 * weights + casts
    # Both linear layers that read the input keep one in bf16; a block in tiles keeps the fp32 input itself.
    more = layer_bytes(SHAPE, autocast).kept - layer_bytes(SHAPE, replace(autocast, mlp_tiles=1)).kept
    assert more == (4 - 2 * 2) * 4096 - 4 * width


def test_blocks_with_experts_have_no_tiles():
    sizes = {"moe_intermediate_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}
    latents = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
    config = {**LLAMA, **sizes, **latents, "model_type": "deepseek_v3", "first_k_dense_replace": 2}
    shape = MemoryShape.from_config(config)
    assert (shape.layers, shape.dense_share, shape.dense_width) == (6, 1 / 3, 384)
    setup = TrainingSetup()
    tiled = replace(setup, mlp_tiles=4)
    assert layer_bytes(shape, setup).kept - layer_bytes(shape, tiled).kept == pytest.approx(4 * 2 * 384 / 3)
    assert len(block_backward(shape, tiled, 1000)) == 2
    sparse = MemoryShape.from_config({**config, "first_k_dense_replace": 0})
    assert layer_bytes(sparse, setup) == layer_bytes(sparse, tiled) and len(block_backward(sparse, tiled, 1000)) == 1


def _sizing(lengths=(65536,), cp_size=8, hardware=H100):
    (sizing,) = sizings(LLAMA_3_8B, hardware, TrainingSetup(gpus=8), lengths, [cp_size])
    return sizing


def test_step_times_of_remedies():
    sizing = _sizing()
    time, load, base = sizing.time, sizing.load, TrainingSetup(gpus=8, skip_logits=False)

    def more(**options):
        return sizing.seconds(replace(base, **options)) - sizing.seconds(base)

    assert sizing.seconds(base) == pytest.approx(time.seconds + (time.copies + time.exposed).max() / 2)  # KV again
    assert more(keep_received_kv=True) == pytest.approx(-(time.copies + time.exposed).max() / 2)
    assert more(skip_logits=True) == pytest.approx(loss_copies(SHAPE, load.tokens) / H100.memory_bytes_per_second)
    full = {"gradient_checkpointing": "full", "keep_received_kv": True}
    assert more(**full, every_n_layers=4) - more(keep_received_kv=True) == pytest.approx(
        (more(**full) - more(keep_received_kv=True)) / 4
    )
    moved = 32 * 2 * 4096 * load.tokens
    assert more(**full, offload=True) - more(**full) == pytest.approx(2 * moved / H100.host_bandwidth)
    weights = 32 * 3 * 4096 * 14336
    sums = 8 * weights / H100.memory_bytes_per_second
    again = 2 * load.tokens * weights / H100.linear_flops_per_second
    half = {**full, "every_n_layers": 2}
    for options, repeated in (
        ({}, 1),
        (full, 0),
        (half, 0.5),
    ):
        tiled = more(**options, mlp_tiles=4) - more(**options)
        assert tiled == pytest.approx(repeated * again + 4 * sums)
    sizing.shape = replace(SHAPE, ends_with_block=False)
    assert more(**full, mlp_tiles=4) - more(**full) == pytest.approx(again + 4 * sums)
    sizing.shape = SHAPE
    # Seven more groups: two calls and one transfer in each direction, and the KV is fetched once more.
    calls = 4 * H100.kernel.call_seconds + 3 * H100.intra_node.latency_seconds
    stages = len(sizing.plan.stage_offsets)
    assert stages == 1 and more(head_groups=8) == pytest.approx(32 * 7 * calls) == more(head_groups=64)


def test_proposals_respect_what_was_given():
    sizing, setup = _sizing(), TrainingSetup(gpus=8)
    found = combinations(setup, REMEDIES, sizing)
    assert len(found) == len(set(found)) == (1 + 2 * 3 * 2) * 4 * 3 * 2
    assert {each.head_groups for each in found} == {1, 2, 4, 8} and {each.mlp_tiles for each in found} == {1, 4, 16}
    assert combinations(setup, (), sizing) == [setup]
    given = replace(setup, gradient_checkpointing="full", head_groups=3)
    free = ("offload", "every_n_layers")
    assert all(each.head_groups == 3 and not each.keep_received_kv for each in combinations(given, free, sizing))
    alone = combinations(setup, REMEDIES, _sizing(cp_size=1))
    assert {each.keep_received_kv for each in alone} == {None}
    slow = _sizing(hardware=replace(H100, host_bandwidth=None))
    assert not any(each.offload for each in combinations(setup, REMEDIES, slow))
    with pytest.raises(ConfigurationError, match="has no host_bandwidth"):
        slow.seconds(replace(given, offload=True))


def test_the_cheapest_combination_has_the_fewest_settings():
    sizing, setup = _sizing(), TrainingSetup(gpus=8)
    sizing.usable = 1e15
    cheapest, least = propose(setup, REMEDIES, sizing)
    assert cheapest.setup == setup and least.memory.total < cheapest.memory.total
    totals = [(sizing.memory(each).total, sizing.seconds(each)) for each in combinations(setup, REMEDIES, sizing)]
    assert least.memory.total == pytest.approx(min(total for total, _ in totals))
    sizing.usable = cheapest.memory.total * 0.8
    cheapest, _ = propose(setup, REMEDIES, sizing)
    fitting = [seconds for total, seconds in totals if total <= sizing.usable]
    assert cheapest.memory.total <= sizing.usable and cheapest.step_seconds <= min(fitting) / 0.99
    sizing.usable = 1e9
    assert len({choice.setup for choice in propose(setup, REMEDIES, sizing)}) == 1


def test_settings_in_words_and_as_code():
    setup = TrainingSetup(
        gradient_checkpointing="attention-saving",
        every_n_layers=2,
        offload=True,
        head_groups=4,
        mlp_tiles=16,
        keep_received_kv=False,
        skip_logits=False,
    )
    assert described(setup) == (
        "attention-saving, every 2 layers, offload, 4 head groups, 16 MLP tiles, received KV not kept, logits kept"
    )
    code = as_arguments(setup, 8)
    (call,) = ast.parse(code).body
    options = {each.arg: ast.unparse(each.value) for each in call.value.keywords}
    assert options["activation_checkpointing"] == "True"
    assert ast.literal_eval(options["activation_checkpointing_kwargs"].replace("save_attention_context_fn", "1")) == {
        "use_reentrant": False,
        "context_fn": 1,
        "offload": True,
        "every_n_layers": 2,
    }
    assert options["parallelism_config"] == (
        "FlashCPPlugin(cp_size=8, head_groups=4, mlp_tiles=16, keep_received_kv=False, skip_logits=False)"
    )
    assert as_arguments(TrainingSetup(), 4) == (
        "TrainingArguments(\n    parallelism_config=FlashCPPlugin(cp_size=4),\n)"
    )


def _choice(cp_size, fits, tokens_per_second):
    memory = MemoryEstimate({"loss": dict.fromkeys(PARTS, 1.0)}, 1.0)
    return Choice(cp_size, memory, 1024, fits, 1.0, tokens_per_second, 0.0, 0.0, 0.0, TrainingSetup())


@pytest.mark.parametrize(
    "rows, expected, reason",
    [
        ([(1, False, 9), (2, True, 100), (4, True, 100.5), (8, True, 80)], 2, "the smallest that fits"),
        ([(2, True, 100), (4, True, 150), (8, True, 151)], 4, "50% faster than cp_size 2"),
        ([(1, False, 9), (2, True, 5)], 2, "the only one that fits"),
        ([(1, False, 9)], None, "nothing fits"),
        ([(4, True, 9)], 4, "the size that was asked for"),
    ],
)
def test_the_choice(rows, expected, reason):
    chosen, why = best([_choice(*row) for row in rows])
    assert (chosen and chosen.cp_size) == expected and reason in why


QWEN3_8B = Path("docs/hooks/configs/qwen3_8b.json")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_3_8B, "model_type": "llama", "tie_word_embeddings": False}))
    return path


def test_command_prints_a_table(capsys, config):
    line = f"estimate --model {config.parent} --window 524288 --gpus 16 --gradient-checkpointing full --keep-logits"
    code, out, err = run(capsys, f"{line} --no-offload --every-n-layers 1 --head-groups 1 --kernel flash_attn_3")
    assert (code, err) == (0, "")
    assert out.startswith("8.03 billion parameters, loaded in bfloat16, bf16 mixed precision, fsdp2")
    assert out.splitlines()[0].endswith(", kernel flash_attn_3")
    assert "\ncp_size 16: the only one that fits" in out
    for part in (*PARTS, "sum", "proposed: full, logits kept"):
        assert (f"\n  {part}" in out or f"\n{part}" in out) == (part != "states")
    assert "\nin the last layer's backward: 27.9 GiB, of which 6.4 GiB is attention workspace\n" in out
    sizes = out.splitlines()[3:9]
    assert [row.split()[0] for row in sizes[1:]] == ["1", "2", "4", "8", "16"]
    assert all(
        row.endswith("  full, logits kept, received KV not kept"[: 19 + 23 * ("not" in row)]) for row in sizes[1:]
    )


def test_a_million_tokens_of_qwen3_8b_on_one_node(capsys):
    """TRL publishes 56.2 GB per GPU for this model, window and number of GPUs."""
    line = f"estimate --model {QWEN3_8B} --window 1048576 --gpus 8"
    code, out, err = run(capsys, line)
    assert (code, err) == (0, "") and "\nproposed: attention-saving, offload  " in out
    assert "\ncp_size 8: predicted to be 2% faster than cp_size 4, the smallest that fits\n" in out
    assert "\npinned memory on the host: 580.5 GiB" in out
    assert (
        """
TrainingArguments(
    activation_checkpointing=True,
    activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": save_attention_context_fn, "offload": True},
    parallelism_config=FlashCPPlugin(cp_size=8),
)
"""
        in out
    )
    found = json.loads(run(capsys, f"{line} --json")[1])
    proposed, remedies = found["proposed"], found["remedies"]
    assert proposed["memory"]["total"] < 56.2e9 and proposed["largest_window"] > 1_500_000
    assert proposed == remedies["attention-saving, offload"]
    least = found["least_memory"]
    assert least["memory"]["total"] < 40e9 and least["step_seconds"] < 1.01 * proposed["step_seconds"]
    assert "\nleast memory: attention-saving, offload, 8 head groups, 16 MLP tiles  " in out
    peaks = {name: choice["memory"]["total"] / 1e9 for name, choice in remedies.items()}
    kept = peaks["no checkpointing, logits kept"]
    assert kept > 1200 > peaks["no checkpointing"] > 500 > peaks["attention-saving"] > peaks["full"] > 80
    assert min(peaks, key=peaks.__getitem__) == "attention-saving, offload"
    steps = {name: choice["step_seconds"] for name, choice in remedies.items()}
    assert steps["no checkpointing"] < steps["attention-saving"] < steps["attention-saving, offload"] < steps["full"]
    assert steps["full"] < steps["full, offload"]
    code, out, _ = run(capsys, f"{line} --cp-size 8 --mlp-tiles 4 --head-groups 8")
    assert code == 0 and "\nproposed: attention-saving, offload, 8 head groups, 4 MLP tiles  " in out
    assert "FlashCPPlugin(cp_size=8, head_groups=8, mlp_tiles=4)" in out


def test_command_as_json(capsys, config):
    line = f"estimate --model {config} --window 65536 --gpus 8 --gradient-checkpointing full"
    line += " --lengths-from pile --cp-size 8 --json"
    code, out, err = run(capsys, line)
    found = json.loads(out)
    assert (code, err) == (0, "") and found["cp_size"] == 8 and found["window"] == 65536 and found["documents"] > 1
    (choice,) = found["choices"]
    assert choice["memory"]["total"] == pytest.approx(sum(choice["memory"]["parts"].values()), abs=8)
    assert all(list(parts) == list(PARTS) for parts in choice["memory"]["moments"].values())
    assert found["setup"]["kernel"] == "torch_flash"
    assert found["proposed"] == choice and choice["setup"]["gradient_checkpointing"] == "full"
    assert all(name.startswith("full") for name in found["remedies"])


def test_command_draws(capsys, config, tmp_path):
    path = tmp_path / "memory.png"
    line = f"estimate --model {config} --window 65536 --gpus 8 --gradient-checkpointing full --plot {path}"
    assert run(capsys, line)[0] == 0
    width, height = png_size(path)
    assert width > 800 and height > 500


@pytest.mark.parametrize(
    "options, message",
    [
        ("--window 4 --gpus 8 --cp-size 8", "A window of 4 tokens is too short for cp_size 8"),
        ("--window 0 --gpus 8", "--window must be at least 1, got 0"),
        ("--window 4096 --gpus 8 --cp-size 3", "cp_size 3 does not divide the 8 GPUs: choose one of 1, 2, 4, 8"),
        ("--window 4096 --gpus 0", "gpus must be at least 1"),
        ("--window 4096 --gpus 8 --hardware abacus", "There is no hardware profile 'abacus'"),
        (
            "--window 4194304 --gpus 8",
            "The largest window that fits has 3,836,928 tokens, with cp_size 8 and attention-saving, offload, 8 ",
        ),
        ("--window 4096 --gpus 8 --sharding ddp --dtype float32", "fewer than 1,024 tokens, with cp_size"),
        ("--window 4096 --gpus 8 --offload --activation-checkpointing none", "need activation checkpointing"),
        ("--window 4096 --gpus 8 --every-n-layers 0", "every_n_layers must be a whole number of at least 1, got 0"),
    ],
)
def test_errors(capsys, config, options, message):
    code, _, err = run(capsys, f"estimate --model {config} {options}")
    assert code == 2 and err.startswith("error: ") and message in err


def test_a_profile_without_memory(capsys, config, tmp_path):
    profile = json.loads((files("hf_flashcp.predict") / "hardware" / "h100.json").read_text())
    del profile["memory_bytes"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(profile))
    code, _, err = run(capsys, f"estimate --model {config} --window 4096 --gpus 8 --hardware {path}")
    assert code == 2 and "has no memory_bytes" in err


def test_a_config_without_sizes(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 64}')
    code, _, err = run(capsys, f"estimate --model {path} --window 4096 --gpus 8")
    assert code == 2 and "num_hidden_layers" in err


def test_unknown_setup():
    with pytest.raises(ConfigurationError, match="sharding is 'zero3': choose one of fsdp2, ddp"):
        TrainingSetup(sharding="zero3")
    with pytest.raises(ConfigurationError, match="device is 'tpu': choose one of cuda, cpu"):
        TrainingSetup(device="tpu")
    for name in ("every_n_layers", "head_groups", "mlp_tiles"):
        for number in (0, 1.5, True):
            with pytest.raises(ConfigurationError, match=f"{name} must be a whole number of at least 1, got {number}"):
                TrainingSetup(**{name: number})
    with pytest.raises(ConfigurationError, match="kernel is 'eager': choose one of torch_flash, "):
        TrainingSetup(kernel="eager")
    with pytest.raises(PlanError, match="There is no varlen kernel 'eager'. Choose one of torch_flash, "):
        backward_buffers(SHAPE, 1, 1, kernel="eager")


def test_estimating_imports_no_torch(config):
    line = f"estimate --model {config} --window 65536 --gpus 8 --gradient-checkpointing full".split()
    code = f"import sys; from hf_flashcp.cli import main; main({line!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
