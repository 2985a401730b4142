"""The stand-ins for recurrent kernels compute what transformers' own functions do, sequence by sequence, and refuse
what the packages refuse."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.bamba import modeling_bamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.qwen3_next import modeling_qwen3_next

from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.doctor.gradients import LENGTHS as CHECKED
from hf_flashcp.errors import ConfigurationError
from hf_flashcp.recurrence.package_kernels import takes
from tests import recurrent_kernel_cases, recurrent_kernels
from tests.recurrent_kernels import (
    causal_conv1d_fn,
    chunk_gated_delta_rule,
    chunk_kda,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)


LENGTHS = (70, 1, 64, 9)
FP64 = 1e-12
DELTA_RULES = {
    # the stand-in, transformers' function, numbers of key and value heads
    "gated delta rule": (chunk_gated_delta_rule, modeling_qwen3_next.torch_chunk_gated_delta_rule, 2, 2),
    "more value heads": (chunk_gated_delta_rule, modeling_qwen3_next.torch_chunk_gated_delta_rule, 2, 4),
    "kimi delta attention": (chunk_kda, modeling_kimi_linear.chunk_kimi_delta_attention, 2, 2),
}


def random(*shape, seed=0, dtype=torch.float64, positive=False):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return (values.sigmoid() if positive else values).requires_grad_()


def delta_rule_inputs(name, length, batch=1, dtype=torch.float64):
    """Return q, k, v, g and beta; the state halves about every 50 tokens."""
    function, _, heads, value_heads = DELTA_RULES[name]
    decay = (batch, length, value_heads) + (8,) * (function is chunk_kda)
    return (
        random(batch, length, heads, 8, seed=1, dtype=dtype),
        random(batch, length, heads, 8, seed=2, dtype=dtype),
        random(batch, length, value_heads, 12, seed=3, dtype=dtype),
        (-0.03 * random(*decay, seed=4, positive=True)).to(dtype).detach().requires_grad_(),
        random(batch, length, value_heads, seed=5, dtype=dtype, positive=True).detach().requires_grad_(),
    )


def with_as_many_key_heads(inputs):
    """Return the inputs for functions that do not repeat key heads themselves."""
    q, k, v, *others = inputs
    return *(x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k)), v, *others


def ends(lengths, dtype=torch.int32):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(dtype)


def indices(lengths):
    return torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]


def gradients(outputs, inputs):
    """Return the gradients of a sum of all outputs with random weights."""
    loss = sum((out * random(*out.shape, seed=20 + i).detach()).sum() for i, out in enumerate(outputs))
    return torch.autograd.grad(loss, inputs)


def assert_equal(ours, expected):
    for index, (x, y) in enumerate(zip(ours, expected, strict=True)):
        assert x.shape == y.shape and x.dtype == y.dtype == torch.float64
        assert float((x - y).norm().detach()) <= FP64 * float(y.norm().detach()), index


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", DELTA_RULES)
def test_delta_rules_of_sequences_in_a_row(name, dtype, v_first):
    ours, reference, _, value_heads = DELTA_RULES[name]
    inputs = delta_rule_inputs(name, sum(LENGTHS))
    states = random(len(LENGTHS), value_heads, 8, 12, seed=6)
    out, final = ours(
        *inputs,
        initial_state=states.mT if v_first else states,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        state_v_first=v_first,
        cu_seqlens=ends(LENGTHS, dtype),
    )
    found = (out, final.mT if v_first else final)
    with float64_throughout():
        pieces = [
            reference(*rows, initial_state=state[None], output_final_state=True, use_qk_l2norm_in_kernel=True)
            for *rows, state in zip(*(x.split(LENGTHS, 1) for x in with_as_many_key_heads(inputs)), states)
        ]
    expected = torch.cat([piece for piece, _ in pieces], 1), torch.cat([state for _, state in pieces])
    assert_equal(found, expected)
    assert_equal(gradients(found, (*inputs, states)), gradients(expected, (*inputs, states)))


@pytest.mark.parametrize("name", DELTA_RULES)
def test_delta_rules_of_a_batch_of_sequences(name):
    ours, reference, _, _ = DELTA_RULES[name]
    inputs = delta_rule_inputs(name, 70, batch=3)
    found = ours(*inputs, output_final_state=True)
    with float64_throughout():
        expected = reference(*with_as_many_key_heads(inputs), output_final_state=True)
    assert_equal(found, expected)
    assert_equal(gradients(found, inputs), gradients(expected, inputs))
    assert ours(*inputs)[1] is None


@pytest.mark.parametrize("name", DELTA_RULES)
def test_one_call_returns_how_a_state_passes_through(name):
    """With values [v | 0] and an initial state [0 | I], the final state is [B | A]: a state S ends as A S + B."""
    ours, _, heads, value_heads = DELTA_RULES[name]
    q, k, v, g, beta = delta_rule_inputs(name, sum(LENGTHS))
    options = {"output_final_state": True, "cu_seqlens": ends(LENGTHS)}
    states = random(len(LENGTHS), value_heads, 8, 12, seed=6)
    unit = torch.eye(8, dtype=torch.float64).expand(len(LENGTHS), value_heads, 8, 8)
    out, final = ours(
        q, k, F.pad(v, (0, 8)), g, beta, initial_state=torch.cat([torch.zeros_like(states), unit], -1), **options
    )
    out, correction = out.split([12, 8], -1)
    B, A = final.split([12, 8], -1)
    entering = states.repeat_interleave(torch.tensor(LENGTHS), 0)[None]
    found = out + torch.einsum("bthk,bthkv->bthv", correction, entering), A @ states + B
    assert_equal(found, ours(q, k, v, g, beta, initial_state=states, **options))


def test_results_of_delta_rules_have_the_dtypes_of_the_packages():
    inputs = delta_rule_inputs("kimi delta attention", 9, dtype=torch.bfloat16)
    states = random(1, 2, 8, 12, dtype=torch.float32)
    out, final = chunk_kda(*inputs, initial_state=states, output_final_state=True)
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    (out.float().sum() + final.sum()).backward()
    assert states.grad.dtype == torch.float32 and inputs[3].grad.dtype == torch.bfloat16


def scan_inputs(length, batch=1):
    """Return x, dt, A, B, C, D and dt_bias for 4 heads of 6, 2 groups and 8 states, with slow decays."""
    return (
        random(batch, length, 4, 6, seed=1),
        random(batch, length, 4, seed=2),
        (-0.05 * random(4, seed=3, positive=True)).detach().requires_grad_(),
        random(batch, length, 2, 8, seed=4),
        random(batch, length, 2, 8, seed=5),
        random(4, seed=6),
        random(4, seed=7),
    )


SCAN_OPTIONS = {"dt_softplus": True, "dt_limit": (0.2, 2.0), "return_final_states": True}


def per_sequence(scan, lengths, inputs, state):
    """Return outputs of all sequences and the last one's final state; the first sequence starts from `state`."""
    x, dt, A, B, C, D, dt_bias = inputs
    pieces = [
        scan(
            *rows[:2],
            A,
            *rows[2:],
            chunk_size=16,
            D=D,
            dt_bias=dt_bias,
            initial_states=state if index == 0 else None,
            **SCAN_OPTIONS,
        )
        for index, rows in enumerate(zip(*(tensor.split(lengths, 1) for tensor in (x, dt, B, C))))
    ]
    return torch.cat([out for out, _ in pieces], 1), pieces[-1][1]


@pytest.mark.parametrize("lengths", [LENGTHS, (37,)])
def test_the_scan_of_sequences_in_a_row_returns_the_last_state(lengths):
    inputs, state = scan_inputs(sum(lengths)), random(1, 4, 6, 8, seed=8)
    x, dt, A, B, C, D, dt_bias = inputs
    found = mamba_chunk_scan_combined(
        x, dt, A, B, C, 16, D, None, dt_bias, state, indices(lengths), **SCAN_OPTIONS
    )  # fmt: skip
    with float64_throughout():
        expected = per_sequence(modeling_bamba.mamba2_chunk_scan, lengths, inputs, state)
    assert_equal(found, expected)
    assert_equal(gradients(found, (*inputs, state)), gradients(expected, (*inputs, state)))


def test_the_scan_starts_from_the_initial_state_only_if_the_first_index_is_zero():
    x, dt, A, B, C, D, dt_bias = scan_inputs(9)
    state, seq_idx = random(1, 4, 6, 8, seed=8), torch.ones(1, 9, dtype=torch.int32)
    without = mamba_chunk_scan_combined(x, dt, A, B, C, 16, seq_idx=seq_idx)
    assert_equal([mamba_chunk_scan_combined(x, dt, A, B, C, 16, initial_states=state, seq_idx=seq_idx)], [without])
    assert not torch.equal(mamba_chunk_scan_combined(x, dt, A, B, C, 16, initial_states=state), without)


def test_the_scan_of_a_batch_and_its_gate():
    inputs, state, gate = scan_inputs(37, batch=2), random(2, 4, 6, 8, seed=8), random(2, 37, 4, 6, seed=9)
    x, dt, A, B, C, D, dt_bias = inputs
    found = mamba_chunk_scan_combined(x, dt, A, B, C, 16, D, gate, dt_bias, state, dt_softplus=True)
    with float64_throughout():
        expected = modeling_bamba.mamba2_chunk_scan(
            x, dt, A, B, C, 16, D, dt_bias=dt_bias, initial_states=state, dt_softplus=True
        ) * F.silu(gate)  # fmt: skip
    assert_equal([found], [expected])
    assert_equal(gradients([found], (*inputs, gate, state)), gradients([expected], (*inputs, gate, state)))


@pytest.mark.parametrize("before_gate, normed", [(True, True), (False, True), (False, False)])
def test_the_fused_mixer_equals_its_steps(before_gate, normed):
    """The convolution has 4 x 6 + 2 x 2 x 8 channels; norms are those of 2 groups."""
    length, lengths = sum(LENGTHS), LENGTHS
    weight, bias, norm, projection = random(56, 4), random(56, seed=1), random(24, seed=2), random(10, 24, seed=3)
    _, _, A, _, _, D, dt_bias = scan_inputs(length)
    row = random(1, length, 24 + 56 + 4, seed=4)
    inputs = (row, weight, bias, dt_bias, A, D, projection, *[norm] * normed)
    found = mamba_split_conv1d_scan_combined(
        row,
        weight,
        bias,
        dt_bias,
        A,
        D,
        16,
        seq_idx=indices(lengths),
        rmsnorm_weight=norm if normed else None,
        outproj_weight=projection,
        headdim=6,
        ngroups=2,
        norm_before_gate=before_gate,
    )
    pieces = []
    with float64_throughout():
        for piece in row.split(lengths, 1):
            gate, mixed, dt = piece.split([24, 56, 4], -1)
            mixed = modeling_bamba.causal_conv1d_fn(mixed.mT, weight, bias, activation="silu").mT
            x, B, C = (t.unflatten(-1, (n, -1)) for t, n in zip(mixed.split([24, 16, 16], -1), (4, 2, 2)))
            out = modeling_bamba.mamba2_chunk_scan(x, dt, A, B, C, 16, D, dt_bias=dt_bias, dt_softplus=True).flatten(2)
            out = out if before_gate else out * F.silu(gate)
            if normed:
                grouped = out.unflatten(-1, (2, 12))
                out = (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(2) * norm
            out = out * F.silu(gate) if before_gate else out
            pieces.append(out @ projection.T)
    expected = torch.cat(pieces, 1)
    assert_equal([found], [expected])
    assert_equal(gradients([found], inputs), gradients([expected], inputs))


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolutions_of_sequences_in_a_row(width, activation):
    row, weight, bias = random(1, sum(LENGTHS), 16), random(16, width, seed=1), random(16, seed=2)
    found = causal_conv1d_fn(row.mT, weight, bias, indices(LENGTHS), activation=activation)
    expected = torch.cat(
        [
            modeling_bamba.causal_conv1d_fn(piece.mT, weight, bias, activation=activation)
            for piece in row.split(LENGTHS, 1)
        ],
        2,
    )
    assert_equal([found], [expected])
    assert_equal(gradients([found], (row, weight, bias)), gradients([expected], (row, weight, bias)))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolutions_with_initial_and_final_states(length):
    rows, states, weight = random(2, length, 16), random(2, 3, 16, seed=1), random(16, 4, seed=2)
    found = causal_conv1d_fn(rows.mT, weight, initial_states=states.mT, return_final_states=True)
    whole = torch.cat([states, rows], 1).mT
    expected = modeling_bamba.causal_conv1d_fn(whole, weight)[:, :, 3:], whole[:, :, -3:]
    assert_equal(found, expected)
    assert_equal(gradients(found, (rows, states, weight)), gradients(expected, (rows, states, weight)))


def test_convolutions_leave_out_padding():
    seq_idx = torch.tensor([[0, 0, -1, -1, 1]], dtype=torch.int32)
    out = causal_conv1d_fn(random(1, 5, 8).mT, random(8, 4), random(8), seq_idx, activation="silu")
    assert (out[..., 2:4] == 0).all() and (out[..., [0, 1, 4]] != 0).any()


def state_of(sequences, width=8, dtype=torch.float32):
    return random(sequences, 2, 8, width, dtype=dtype)


def delta(function, heads=2, length=9, batch=1, state=None, dtype=torch.float32, **options):
    decay = (batch, length, 2) + (8,) * (function is chunk_kda)
    q, k = (random(batch, length, heads, 8, dtype=dtype) for _ in "qk")
    v, g, beta = (random(*shape, dtype=dtype) for shape in ((batch, length, 2, 8), decay, (batch, length, 2)))
    return function(q, k, v, g, beta, initial_state=state, **options)


def scan(chunk_size=16, **options):
    x, dt, A, B, C, _, _ = scan_inputs(9)
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **options)


def convolution(row=None, width=4, activation=None, bias_dtype=torch.float64, **options):
    row = random(1, 9, 8).mT if row is None else row
    channels = row.shape[1]
    return causal_conv1d_fn(
        row, random(channels, width), random(channels, dtype=bias_dtype), activation=activation, **options
    )


REFUSED = [
    # exception, what the package says, call
    *(
        case
        for function in (chunk_gated_delta_rule, chunk_kda)
        for case in (
            (ValueError, "batch size", lambda f=function: delta(f, batch=2, cu_seqlens=ends([9]))),
            (ValueError, "initial states", lambda f=function: delta(f, state=state_of(1), cu_seqlens=ends([4, 5]))),
            (ValueError, "chunk_size", lambda f=function: delta(f, chunk_size=128)),
            (AssertionError, None, lambda f=function: delta(f, cu_seqlens=ends([4, 0, 5]))),
            (AssertionError, None, lambda f=function: delta(f, cu_seqlens=ends([4, 4]))),
            (AssertionError, None, lambda f=function: delta(f, cp_context=object())),
            (AssertionError, None, lambda f=function: delta(f, state=state_of(1, width=9))),
        )
    ),
    (ValueError, "GVA", lambda: delta(chunk_gated_delta_rule, heads=3)),
    (ValueError, "chunk_size", lambda: delta(chunk_kda, chunk_size=16)),
    (AssertionError, "float32", lambda: delta(chunk_kda, state=state_of(1, dtype=torch.bfloat16))),
    (AssertionError, "float32", lambda: delta(chunk_kda, state=state_of(1, dtype=torch.float64))),
    (AssertionError, "varlen_states", lambda: scan(cu_seqlens=ends([9]), return_varlen_states=True)),
    (AssertionError, None, lambda: scan(chunk_size=0)),
    (AssertionError, None, lambda: scan(seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 0]]))),
    (AssertionError, None, lambda: scan(initial_states=random(2, 4, 6, 8))),
    (NotImplementedError, "activation", lambda: convolution(activation="gelu")),
    (RuntimeError, "channel last", lambda: convolution(random(1, 8, 9), seq_idx=indices([9]))),
    (RuntimeError, "channel last", lambda: convolution(random(1, 8, 9), initial_states=random(1, 3, 8).mT)),
    (RuntimeError, "seq_idx", lambda: convolution(seq_idx=indices([9]).long())),
    (RuntimeError, "seq_idx", lambda: convolution(seq_idx=indices([8]))),
    (AssertionError, "seq_idx", lambda: convolution(seq_idx=indices([9]), initial_states=random(1, 3, 8).mT)),
    (AssertionError, "seq_idx", lambda: convolution(seq_idx=indices([9]), return_final_states=True)),
    (RuntimeError, "stride", lambda: convolution(initial_states=random(1, 8, 3))),
    (RuntimeError, "width", lambda: convolution(width=5)),
    (RuntimeError, "bias", lambda: convolution(bias_dtype=torch.float32)),
    (RuntimeError, "divisible by 8", lambda: convolution(random(1, 9, 12).mT)),
    (RuntimeError, "multiples of 8", lambda: convolution(random(1, 9, 12)[..., :8].mT)),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_refusals(index):
    exception, message, call = REFUSED[index]
    with pytest.raises(exception, match=message):
        call()


def test_every_refusal_differs_from_a_call_that_is_accepted():
    for function in (chunk_gated_delta_rule, chunk_kda):
        state = state_of(2)
        delta(function, state=state, cu_seqlens=ends([4, 5]), chunk_size=32)
        delta(function, dtype=torch.bfloat16, state=state, cu_seqlens=ends([4, 5]), chunk_size=64)
    scan(seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 3, 3, 3]]), initial_states=random(1, 4, 6, 8))
    convolution(seq_idx=indices([9]), activation="swish")
    convolution(random(1, 12, 9))
    convolution(random(1, 9, 16)[..., :8].mT, initial_states=random(1, 3, 8).mT)


MIXER = {"mamba_split_conv1d_scan_combined": 2}
STEPS = {"causal_conv1d_fn": 2, "mamba_chunk_scan_combined": 2}
CALLS = {
    ("qwen3_next", True): {"causal_conv1d_fn": 1, "chunk_gated_delta_rule": 1},
    ("kimi_linear", True): {"causal_conv1d_fn": 1, "chunk_kda": 1},
    ("bamba", True): MIXER,
    ("bamba", False): STEPS,
}


@pytest.mark.parametrize("family, training", CALLS)
def test_models_run_on_the_packages_in_a_worker(pool, family, training):
    """A modeling file is executed again if the worker has imported it before."""
    for _ in "twice":
        ((calls, errors),) = pool.run(1, recurrent_kernel_cases.kernel_calls, family, training)
        assert calls == CALLS[family, training] and max(errors) < FP64


SHARDED = ("bamba", "falcon_h1", "kimi_linear", "lfm2", "nemotron_h", "qwen3_next", "qwen3_5_text")


@pytest.mark.parametrize("cp_size", [2, 3])
@pytest.mark.parametrize("family", SHARDED)
def test_cut_documents_on_the_packages(pool, family, cp_size):
    """A layer convolves all slices in one call, and scans them in one call per group."""
    documents = len(CHECKED)
    for found, calls in pool.run(cp_size, recurrent_kernel_cases.sharded_errors, family, "per_doc"):
        assert found["error"] is None, found["error"]
        assert found["gradient_error"] < FP64 and found["loss_error"] < FP64
        layers, rest = divmod(calls.pop("causal_conv1d_fn"), documents + 1)  # the reference runs one at a time
        assert layers > 0 and rest == 0
        for scans in calls.values():
            assert layers * (documents + 1) <= scans <= layers * (documents + 3)


@pytest.mark.parametrize("family, package, version", [("qwen3_next", "fla", "0.4.2"), ("bamba", "mamba_ssm", "2.2.4")])
def test_packages_with_wrong_results_are_refused(pool, family, package, version):
    for error in pool.errors(1, recurrent_kernel_cases.attached_with, family, package, version):
        assert isinstance(error, ConfigurationError) and f"{package} {version}" in str(error)


def test_kernels_from_the_hub_are_recognized():
    """They replace the forward of a module around transformers' wrapper, and take arguments of their own."""
    with recurrent_kernels.packages():
        func = modeling_bamba.mamba2_chunk_scan

        class Layer(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)

        layer = Layer()
        assert takes(layer, "seq_idx") and not takes(layer, "cu_seqlens_q")
        layer.forward = lambda *args, **kwargs: None
        assert not takes(layer, "seq_idx")
