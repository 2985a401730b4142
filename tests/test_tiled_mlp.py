"""Feed-forward blocks in tiles of tokens, compared with per-document runs and with blocks of all tokens."""

import copy
import io
import logging

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Config

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach
from hf_flashcp.errors import BatchError, ConfigurationError
from hf_flashcp.integrations.models import tiled_mlp
from hf_flashcp.integrations.models.checkpointing import enable_checkpointing
from hf_flashcp.integrations.models.tiled_mlp import TiledBlock
from tests import tiled_mlp_cases, wrapper_cases
from tests.models import HYBRIDS, build_model, gradients, make_documents


LENGTHS = [40, 3, 17, 9, 25, 1, 30, 7, 12]
EXACT = 1e-12  # relative Frobenius norm of each parameter's gradient, and loss, in fp64
EXACT_WITH_OWN_LOSS = 1e-6  # with the models' own fp32 loss

# Gated blocks, without a gate and with biases, with gate and up in one weight, with adapters, between norms, in a
# hybrid, and beside experts.
MODELS = [
    ("llama", {"mlp_bias": True}),
    ("starcoder2", {}),
    ("phi3", {}),
    ("llama + adapters", {}),
    ("gemma2", {}),
    ("deepseek_v3", {}),
    *[(name, {}) for name in ("qwen3_5", "nemotron_h") if name in HYBRIDS],
]


@pytest.mark.parametrize(
    "cp_size, tiles, options",
    [(1, 4, {}), (2, 5, {"skip_logits": True}), (4, 3, {"head_groups": 2})],
)
def test_gradients_are_exact(pool, cp_size, tiles, options):
    """The last tile is shorter than the others on some ranks."""
    models = MODELS if cp_size == 2 else MODELS[:2] + MODELS[-1:]
    for found in pool.run(cp_size, tiled_mlp_cases.errors, models, LENGTHS, tiles, options):
        assert max(map(max, found.values())) < EXACT, found


@pytest.mark.parametrize("family", ["llama", "llama + adapters"])
def test_checkpointing_changes_no_bit_and_runs_no_block_again(pool, family):
    """A block runs in forward and once more in backward, also in layers that run again, except under the reentrant
    kind."""
    for error, found in pool.run(2, tiled_mlp_cases.checkpointed, 4, family):
        assert 0 < error < EXACT
        for (kind, _), (difference, runs) in found.items():
            assert difference == 0 and runs == (3 if kind == "reentrant" else 2), found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_tensor_has_the_inner_activations_of_all_tokens(pool, checkpointing):
    for found, tile, whole in pool.run(2, tiled_mlp_cases.largest_tensor, LENGTHS, 2, checkpointing):
        assert found == tile < whole
    for found, _, whole in pool.run(2, tiled_mlp_cases.largest_tensor, LENGTHS, 1, checkpointing):
        assert found == whole


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16(pool, autocast):
    for ours, single in pool.run(2, tiled_mlp_cases.bf16_errors, LENGTHS, 24, autocast):
        assert ours < 2 * single


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fsdp": {"activation_checkpointing": True}, "selective": True},
        {"fsdp": {}, "cp_size": 1, "gradient_accumulation_steps": 2},
    ],
)
def test_ddp_and_fsdp2(pool, options):
    for found in pool.run(2, wrapper_cases.step, {"sizes": {"mlp_tiles": 3}, **options}):
        assert found["gradient_error"] < EXACT_WITH_OWN_LOSS and found["type"].endswith(("FSDP", "MULTI_CPU"))


def test_units_of_fsdp2_inside_layers(pool):
    for found in pool.run(2, tiled_mlp_cases.fully_sharded, LENGTHS, "blocks"):
        assert max(found) < EXACT_WITH_OWN_LOSS
    for message in pool.run(2, tiled_mlp_cases.fully_sharded, LENGTHS, "parts"):
        assert message.startswith(
            "ConfigurationError: mlp_tiles needs whole weights, but FSDP2 shards parts of LlamaM"
        )


@pytest.mark.load
def test_compiled_layers(pool):
    packs = [[40, 3, 17, 1, 25], [30, 9], [64, 5, 7]]
    for errors, graphs, breaks in pool.run(2, tiled_mlp_cases.compiled, packs):
        assert max(errors) < EXACT and graphs == graphs[:1] * 3
        assert len(breaks) == 2 and "flashcp_attention" in breaks


def attached(family="llama", tiles=4, **overrides):
    model = build_model(family, **overrides).train()
    return model, attach(model, None, plugin=FlashCPPlugin(cp_size=1, mlp_tiles=tiles))


def tiles_of(model):
    return [
        layer.mlp.forward._tiles if isinstance(layer.mlp.forward, TiledBlock) else None for layer in model.model.layers
    ]


def test_attach_again_and_remove():
    model, first = attached()
    second = attach(model, None, plugin=FlashCPPlugin(cp_size=1, mlp_tiles=3))
    assert tiles_of(model) == [3, 3] and model.model.layers[0].mlp.forward._own is None
    first.remove()
    assert tiles_of(model) == [3, 3]
    attach(model, None, plugin=FlashCPPlugin(cp_size=1))
    second.remove()
    assert tiles_of(model) == [None, None] and all("forward" not in vars(each.mlp) for each in model.model.layers)


def test_a_forward_of_the_instance_comes_back():
    model = build_model("llama").train()
    for layer in model.model.layers:
        layer.mlp.forward = type(layer.mlp).forward.__get__(layer.mlp)
    before = [layer.mlp.forward for layer in model.model.layers]
    handle = attach(model, None, plugin=FlashCPPlugin(cp_size=1, mlp_tiles=4))
    assert tiles_of(model) == [4, 4]
    handle.remove()
    assert [layer.mlp.forward for layer in model.model.layers] == before


def test_copied_and_saved_models_have_their_own_weights():
    model, _ = attached()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    batch = FlashCPCollator(1)(make_documents([30, 12]))
    for other in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert tiles_of(other) == [4, 4]
        assert all(layer.mlp.forward._module is layer.mlp for layer in other.model.layers)
        other(**batch).loss.backward()
        assert not gradients(model) and gradients(other).keys() == dict(model.named_parameters()).keys()


def test_a_single_block():
    """GPT-2's block; some weights are frozen, one gets no gradient, and the input needs none."""
    torch.manual_seed(0)
    block = GPT2MLP(48, GPT2Config(n_embd=16, resid_pdrop=0.0)).double()
    block.unused = nn.Linear(4, 4)
    block.c_fc.weight.requires_grad_(False)
    hidden, grad = torch.randn(2, 1, 11, 16, dtype=torch.float64)
    for needs in (True, False):
        of_input = hidden.clone().requires_grad_(needs)
        block(of_input).backward(grad)
        expected = [of_input.grad, *(parameter.grad for parameter in block.parameters())]
        block.zero_grad()
        tiled, of_input = TiledBlock(block, 4), hidden.clone().requires_grad_(needs)
        output = block(of_input)
        assert type(output.grad_fn).__name__ == "_TilesBackward"
        output.backward(grad, retain_graph=True)
        found = [of_input.grad, *(parameter.grad for parameter in block.parameters())]
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
        assert block.unused.weight.grad is None and (of_input.grad is None) == (not needs)
        output.backward(grad)
        torch.testing.assert_close(block.c_fc.bias.grad, 2 * expected[2], rtol=EXACT, atol=EXACT)
        block.zero_grad()
        tiled.remove()


def test_sums_of_bf16_gradients_are_rounded_once():
    torch.manual_seed(0)
    block = build_model("llama", dtype=torch.bfloat16).model.layers[0].mlp
    hidden, grad = torch.randn(2, 1, 64, 32, dtype=torch.bfloat16)
    expected = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in block.parameters()]
    for part, of_part in zip(hidden.split(2, dim=1), grad.split(2, dim=1)):
        for total, gradient in zip(expected, torch.autograd.grad(block(part), list(block.parameters()), of_part)):
            total += gradient
    TiledBlock(block, 32)
    block(hidden).backward(grad)
    assert all(torch.equal(each.grad, total.bfloat16()) for each, total in zip(block.parameters(), expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_layers_do_not_keep_inputs_of_blocks(checkpointing):
    model, _ = attached()
    inputs = []
    if checkpointing:
        enable_checkpointing(model, {"use_reentrant": False})
    for layer in model.model.layers:
        keep = lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage()))  # noqa: E731
        layer.mlp.register_forward_pre_hook(keep)
    loss = model(**FlashCPCollator(1)(make_documents([30, 12]))).loss
    assert [each.expired() for each in inputs] == [checkpointing] * 2
    loss.backward()


def test_forwards_outside_of_training_are_those_of_the_model():
    """Padded batches, single tokens and generation compute all tokens at once."""
    model, _ = attached()
    calls = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.arange(1, 13)
    for batch, grad, expected in ((ids.view(2, 6), True, 1), (ids[None, :3], True, 1), (ids[None], False, 1)):
        model.train(grad)
        with torch.set_grad_enabled(grad):
            model.model(batch)
        assert len(calls) == expected
        calls.clear()
    with torch.no_grad():
        model(**FlashCPCollator(1)(make_documents([30, 12])))
    assert len(calls) == 4


def test_autocast_casts_each_weight_once_and_leaves_no_cast_without_a_graph():
    block = build_model("llama").float().model.layers[0].mlp
    hidden, casts = torch.randn(1, 12, 32, requires_grad=True), []

    class Casts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == block.up_proj.weight.shape:
                casts.append(kwargs["dtype"])
            return func(*args, **(kwargs or {}))

    TiledBlock(block, 4)
    with Casts():
        with torch.autocast("cpu", torch.bfloat16):
            output = block(hidden)
            short = block(hidden[:, :2])  # in one piece, in the same region
        assert casts.count(torch.bfloat16) == 4  # of gate and up, in each call
        output.backward(torch.ones_like(output), inputs=[hidden])
        assert casts.count(torch.bfloat16) == 6
        short.sum().backward()
    assert output.dtype == torch.bfloat16 and all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize(
    "family, overrides, reason",
    [
        ("qwen3_moe", {}, "Qwen3MoeSparseMoeBlock contains Qwen3Moe"),
        ("starcoder2", {"residual_dropout": 0.1}, "Starcoder2MLP has dropout (residual_dropout is 0.1), which backw"),
    ],
)
def test_models_without_a_block_that_can_be_tiled(family, overrides, reason):
    with pytest.raises(ConfigurationError) as caught:
        attached(family, **overrides)
    name = type(build_model(family)).__name__
    assert str(caught.value).startswith(f"mlp_tiles is 4, but {name} has no feed-forward block that can")
    assert reason in str(caught.value)


def test_log_of_a_model_with_dense_and_expert_layers(caplog):
    with caplog.at_level(logging.INFO, tiled_mlp.logger.name):
        model, _ = attached("deepseek_v3")
    assert tiles_of(model) == [4, None]
    (line,) = [record.getMessage() for record in caplog.records if record.name == tiled_mlp.logger.name]
    assert line.startswith("DeepseekV3ForCausalLM computes 1 feed-forward block in 4 tiles of tokens. 1 block cannot:")
    assert "DeepseekV3MoE contains" in line


@pytest.mark.parametrize("tiles", [0, -1, 1.5, "2", None])
def test_a_number_of_tiles_that_is_none(tiles):
    with pytest.raises(ConfigurationError, match="mlp_tiles must be a positive integer, got"):
        FlashCPPlugin(cp_size=1, mlp_tiles=tiles)


def test_ranks_with_different_tiles(pool):
    for error in pool.errors(2, tiled_mlp_cases.tiles_on_one_rank):
        assert type(error) is BatchError
        assert "Ranks disagree on the batch: mlp_tiles is 1 on rank 0 and 2 on rank 1" in str(error)
