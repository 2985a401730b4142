"""Stand-ins for the kernels of recurrent and convolutional layers, computed token by token in plain PyTorch.

They are the functions of flash-linear-attention, mamba-ssm and causal-conv1d that modeling files of transformers call
where the packages are installed. Signatures are those of flash-linear-attention 0.6.0, mamba-ssm 2.3.2.post1 and
causal-conv1d 1.7.0. The exceptions are those of these packages; what a package would take and compute wrongly, or what
only older versions refuse, is an AssertionError. As elsewhere, fp64 is accepted so that tests can require errors
below 1e-12.
"""

import contextlib
import functools
import importlib
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from tests.vendor_kernels import modules


CALLS = Counter()
"""Calls of each stand-in since `packages` was entered."""


def counted(function):
    @functools.wraps(function)
    def counting(*args, **kwargs):
        CALLS[function.__name__] += 1
        return function(*args, **kwargs)

    return counting


# flash-linear-attention


@counted
def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    chunk_indices=None,
    cp_context=None,
    **kwargs,
):
    """Stand in for fla/ops/gated_delta_rule/chunk.py; g is (B, T, HV)."""
    if q.shape[2] != k.shape[2]:
        raise ValueError("q and k must have the same number of heads")
    if v.shape[2] % q.shape[2] != 0:
        raise ValueError("For GVA, num_v_heads must be evenly divisible by num_heads")
    if kwargs.pop("chunk_size", 64) not in (16, 32, 64):
        raise ValueError("`chunk_size` must be 16, 32, or 64 for Gated Delta Rule")
    assert g.shape == v.shape[:3] and k.shape[-1] <= 256
    assert not (use_beta_sigmoid_in_kernel or allow_neg_eigval or chunk_indices or cp_context or kwargs)
    return _delta_rule(
        (q, k, v, g[..., None], beta),
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        state_v_first,
        cu_seqlens,
    )


@counted
def chunk_kda(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False,
    use_beta_sigmoid_in_kernel=False,
    allow_neg_eigval=False,
    safe_gate=False,
    lower_bound=None,
    disable_recompute=False,
    return_intermediate_states=False,
    state_v_first=False,
    cu_seqlens=None,
    cu_seqlens_cpu=None,
    cp_context=None,
    use_graph=False,
    max_num_seqs=None,
    **kwargs,
):
    """Stand in for fla/ops/kda/chunk.py; g is (B, T, HV, K)."""
    if initial_state is not None:
        exact = initial_state.dtype == q.dtype == torch.float64
        assert initial_state.dtype == torch.float32 or exact, "initial_state must be in float32."
    if kwargs.pop("chunk_size", 64) not in (32, 64):
        raise ValueError("`chunk_size` must be either 32 or 64 for KDA")
    assert q.shape == k.shape and k.shape[-1] <= 256 and v.shape[2] % k.shape[2] == 0
    assert g.shape == (*v.shape[:3], k.shape[-1])
    assert not (use_gate_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval or safe_gate or kwargs)
    assert not (lower_bound or disable_recompute or return_intermediate_states or cp_context or use_graph)
    return _delta_rule(
        (q, k, v, g, beta),
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        state_v_first,
        cu_seqlens,
    )


def _delta_rule(inputs, scale, initial_state, output_final_state, normalize, state_v_first, cu_seqlens):
    """Return outputs (B, T, HV, V) and, if asked for, final states (N, HV, K, V), one for each sequence.

    With `cu_seqlens`, sequences become the batch, padded by tokens that neither change nor decay the state.
    """
    query, key, value, _, beta = inputs
    batch, length, heads, width = value.shape
    assert query.dtype == key.dtype == value.dtype and beta.shape == value.shape[:3]
    lengths = _lengths(cu_seqlens, batch, length)
    if initial_state is not None:
        if cu_seqlens is not None and len(initial_state) != len(lengths):
            raise ValueError("The number of initial states is expected to be equal to the number of input sequences")
        states = (width, key.shape[-1]) if state_v_first else (key.shape[-1], width)
        assert initial_state.shape == (len(lengths), heads, *states)

    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value, decay, beta = (
        pad_sequence(list(tensor.to(dtype).flatten(0, 1).split(lengths)), batch_first=True) for tensor in inputs
    )
    if normalize:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * (key.shape[-1] ** -0.5 if scale is None else scale)
    query, key = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (query, key))
    if initial_state is None:
        state = value.new_zeros(len(lengths), heads, key.shape[-1], width)
    else:
        state = (initial_state.mT if state_v_first else initial_state).to(dtype)
    outputs = []
    for q, k, v, g, b in zip(*(x.unbind(1) for x in (query, key, value, decay.exp(), beta))):
        state = state * g[..., None]
        correction = (v - torch.einsum("nhk,nhkv->nhv", k, state)) * b[..., None]
        state = state + k[..., None] * correction[..., None, :]
        outputs.append(torch.einsum("nhk,nhkv->nhv", q, state))
    out = torch.cat([rows[:n] for rows, n in zip(torch.stack(outputs, 1), lengths)]).unflatten(0, (batch, length))
    state = state.mT.contiguous() if state_v_first else state
    return out.to(inputs[0].dtype), state if output_final_state else None


def _lengths(cu_seqlens, batch, length):
    if cu_seqlens is None:
        return [length] * batch
    if batch != 1:
        raise ValueError(f"The batch size is expected to be 1 rather than {batch} when using `cu_seqlens`.")
    assert cu_seqlens.dtype in (torch.int32, torch.int64)
    lengths = cu_seqlens.diff().tolist()
    # Tokens after the last end would not be written, and versions before 0.5.1 mix up sequences after an empty one.
    assert cu_seqlens[0] == 0 and sum(lengths) == length and min(lengths) > 0
    return lengths


# mamba-ssm


@counted
def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    """Stand in for mamba_ssm/ops/triton/ssd_combined.py.

    The initial state belongs to the sequence whose index is 0, and the final state to the last sequence of the row.
    """
    batch, length, heads, width = x.shape
    groups, state_size = B.shape[2:]
    assert heads % groups == 0 and B.shape == C.shape == (batch, length, groups, state_size)
    assert dt.shape == (batch, length, heads) and A.shape == (heads,) and x.dtype == B.dtype == C.dtype
    assert z is None or z.shape == x.shape
    assert D is None or D.shape in ((heads,), (heads, width))
    assert dt_bias is None or dt_bias.shape == (heads,)
    assert initial_states is None or initial_states.shape == (batch, heads, width, state_size)
    assert isinstance(chunk_size, int) and chunk_size > 0
    assert not return_varlen_states, "return_varlen_states is not supported in backward"

    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    decay = (dt * A.to(dtype)).exp()
    if seq_idx is not None:
        assert seq_idx.shape == (batch, length)
        steps = F.pad(seq_idx, (1, 0)).diff()
        assert steps.min() >= 0  # tokens of equal index see each other, even with other sequences between them
        decay = decay * (steps == 0)[..., None]
    inputs = x.to(dtype) * dt[..., None]
    keys, queries = (tensor.to(dtype).repeat_interleave(heads // groups, dim=2) for tensor in (B, C))
    if initial_states is None:
        state = inputs.new_zeros(batch, heads, width, state_size)
    else:
        state = initial_states.to(dtype)
    outputs = []
    for value, a, b, c in zip(*(tensor.unbind(1) for tensor in (inputs, decay, keys, queries))):
        state = state * a[..., None, None] + value[..., None] * b[..., None, :]
        outputs.append((state * c[..., None, :]).sum(-1))
    out = torch.stack(outputs, 1)
    if D is not None:
        out = out + x.to(dtype) * D.to(dtype).reshape(heads, -1)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return (out.to(x.dtype), state) if return_final_states else out.to(x.dtype)


@counted
def mamba_split_conv1d_scan_combined(
    zxbcdt,
    conv1d_weight,
    conv1d_bias,
    dt_bias,
    A,
    D,
    chunk_size,
    initial_states=None,
    seq_idx=None,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    activation="silu",
    rmsnorm_weight=None,
    rmsnorm_eps=1e-6,
    outproj_weight=None,
    outproj_bias=None,
    headdim=None,
    ngroups=1,
    norm_before_gate=True,
):
    """Stand in for mamba_ssm/ops/triton/ssd_combined.py: convolution, scan, gated norm and output projection."""
    assert D.dim() == 2 or headdim is not None
    heads, width = (*D.shape, headdim)[:2]
    inner, channels = heads * width, conv1d_weight.shape[0]
    z, xbc, dt = zxbcdt.split([inner, channels, heads], dim=-1)
    assert channels % 8 == 0, "Number of convolution channels is required to be a multiple of 8."
    xbc = xbc if xbc.stride(1) % 8 == 0 else xbc.contiguous()
    xbc = causal_conv1d_fn.__wrapped__(xbc.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT
    x, B, C = xbc.split([inner, (channels - inner) // 2, (channels - inner) // 2], dim=-1)
    gate = z.unflatten(-1, (heads, width))
    out = mamba_chunk_scan_combined.__wrapped__(
        x.unflatten(-1, (heads, width)),
        dt,
        A,
        *(tensor.unflatten(-1, (ngroups, -1)) for tensor in (B, C)),
        chunk_size,
        D,
        gate if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    out, *final_states = out if return_final_states else (out,)
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        dtype = torch.promote_types(out.dtype, torch.float32)
        gate = F.silu(z.to(dtype))
        normed = out.to(dtype) if norm_before_gate else out.to(dtype) * gate
        normed = F.rms_norm(normed.unflatten(-1, (ngroups, -1)), (inner // ngroups,), eps=rmsnorm_eps).flatten(2)
        normed = normed * rmsnorm_weight.to(dtype)
        out = (normed * gate if norm_before_gate else normed).to(out.dtype)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, *final_states) if return_final_states else out


# causal-conv1d


@counted
def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """Stand in for causal_conv1d/causal_conv1d_interface.py and the checks of csrc/causal_conv1d.cpp."""
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError("activation must be None, silu, or swish")
    batch, channels, length = x.shape
    width = weight.shape[-1]
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    channel_last = x.stride(1) == 1 and x.stride(2) > 1
    if seq_idx is not None:
        # Versions before 1.7 refuse initial states here.
        assert initial_states is None and not return_final_states, "seq_idx excludes initial and final states"
        _check(channel_last, "seq_idx is only supported for channel last layout")
        _check(seq_idx.dtype == torch.int32 and seq_idx.shape == (batch, length), "seq_idx")
    if initial_states is not None:
        _check(channel_last, "initial_states is only supported for channel last layout")
        _check(initial_states.dtype == x.dtype and initial_states.shape == (batch, channels, width - 1), "states")
        _check(initial_states.stride(1) == 1, "initial_states.stride(1) == 1")
    if return_final_states:
        assert x.stride(1) == 1, "Only channel-last layout support returning final_states_out"
        assert final_states_out is None
    if channel_last:
        _check(channels % 8 == 0, "causal_conv1d only supports channel dimension divisible by 8 for now")
        _check(x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, "strides must be multiples of 8")
    _check(2 <= width <= 4, "causal_conv1d only supports width between 2 and 4")
    _check(weight.shape[0] == channels and (bias is None or bias.dtype == weight.dtype), "weight, bias")

    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = F.pad(x, (width - 1, 0)) if initial_states is None else torch.cat([initial_states, x], dim=2)
    windows = rows.to(dtype).unfold(2, width, 1)
    if seq_idx is not None:
        same = F.pad(seq_idx, (width - 1, 0), value=-1).unfold(1, width, 1) == seq_idx[..., None]
        windows = windows * same[:, None]
    out = torch.einsum("bctw,cw->bct", windows, weight.to(dtype))
    out = out if bias is None else out + bias.to(dtype)[:, None]
    out = (out if activation is None else F.silu(out)).to(x.dtype)
    if seq_idx is not None:
        out = out * (seq_idx >= 0)[:, None]
    return (out, rows[:, :, length:]) if return_final_states else out


def _check(condition, message):
    """Raise what TORCH_CHECK raises."""
    if not condition:
        raise RuntimeError(message)


PACKAGES = {
    "fla": {"__version__": "0.6.0"},
    "fla.ops": {},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": chunk_gated_delta_rule},
    "fla.ops.kda": {"chunk_kda": chunk_kda},
    "mamba_ssm": {"__version__": "2.3.2.post1"},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
    },
    "causal_conv1d": {"__version__": "1.7.0", "causal_conv1d_fn": causal_conv1d_fn},
}


@contextlib.contextmanager
def packages():
    """Provide the packages to transformers' modeling files inside the context; yield the counted calls.

    A modeling file looks for its kernels when it is imported. Those that were imported before are executed again, so
    enter this context before hf_flashcp changes a modeling file or a model is built. Functions without a stand-in,
    those of decoding and of Mamba-1 layers, stay transformers' own.
    """
    CALLS.clear()
    with contextlib.ExitStack() as stack:
        stack.callback(_execute_modeling_files)
        stack.enter_context(modules(PACKAGES))
        _execute_modeling_files()
        yield CALLS


def _execute_modeling_files():
    """Let every imported modeling file look for its kernels again, and replace its classes where they are cached."""
    holders = [module for name, module in sys.modules.items() if name.split(".")[0] == "transformers"]
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and "use_kernel_func_from_hub_with_fallback" in vars(module):
            importlib.reload(module)
            for holder in holders:
                for attribute, value in list(vars(holder).items()):
                    if isinstance(value, type) and value.__module__ == name:
                        setattr(holder, attribute, getattr(module, attribute, value))
