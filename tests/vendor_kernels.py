"""Stand-ins for the vendors' kernels: their signatures and rules, computed by the formulas.

A call that the vendor's interface would reject fails here as well. Signatures and rules were read from these files:

    flash-attn 2.7.3, 2.8.3      flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp
    xformers 0.0.34              xformers/flash_attn_3/_C.so (the schemas that it registers)
    flash-attn-4 4.0.0b10, b18,  flash_attn/cute/interface.py
      b20, b28, b36

Where the vendors require fp16 or bf16, the stand-ins also accept fp64, so that tests can require errors below 1e-12.
"""

import contextlib
import inspect
import sys
import types
from unittest import mock

import torch

from hf_flashcp.attention.kernels import BackwardInputs, ScoreOptions
from hf_flashcp.attention.kernels.varlen import Sequences
from tests.kernel_cases import EmulatedVarlen


DTYPES = (torch.float16, torch.bfloat16, torch.float64)


def signature(parameters):
    return inspect.signature(eval(f"lambda {parameters}: None"))


def arguments_of(parameters, args, kwargs):
    """Return the arguments by name, including defaults. Raises a TypeError if the vendor's function would."""
    bound = signature(parameters).bind(*args, **kwargs)
    bound.apply_defaults()
    return types.SimpleNamespace(**bound.arguments)


class Vendor:
    """Counts calls and remembers whether backward was asked to be deterministic."""

    def __init__(self):
        self.forwards = self.backwards = 0
        self.deterministic = set()
        self._emulated = EmulatedVarlen()

    def forward(self, call, causal, window, softcap=None):
        self.forwards += 1
        self._check(call.q, call.k, call.v)
        options = ScoreOptions(causal, call.softmax_scale, window, softcap or None)
        return self._emulated._forward_call(call.q, call.k, call.v, self._sequences(call), options)

    def backward(self, call, lse, causal, window, softcap=None):
        self.backwards += 1
        self.deterministic.add(call.deterministic)
        self._check(call.q, call.k, call.v, call.out, call.dout)
        assert lse.shape == (call.q.shape[1], call.q.shape[0]) and lse.is_contiguous()
        assert lse.dtype == torch.promote_types(call.q.dtype, torch.float32)
        inputs = BackwardInputs(call.dout, call.q, call.k, call.v, call.out, lse)
        options = ScoreOptions(causal, call.softmax_scale, window, softcap or None)
        return self._emulated._backward_call(inputs, self._sequences(call), options)

    def _check(self, *tensors):
        assert len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype in DTYPES
        assert tensors[0].shape[2] <= 256

    def _sequences(self, call):
        return Sequences(call.cu_seqlens_q, call.cu_seqlens_k, call.max_seqlen_q, call.max_seqlen_k)


def visible(causal, left, right, none):
    """Return `(causal, window)` of our interface. `none` is the vendor's value for a side without a bound."""
    assert right == (0 if causal or left != none else none), (causal, left, right)
    return right == 0, None if left == none else left + 1


# flash-attn 2: the same in both versions

FA2_FORWARD = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
    "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
    "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False"
)
FA2_BACKWARD = (
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, "
    "softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, "
    "rng_state=None, zero_tensors=False"
)


@contextlib.contextmanager
def flash_attn_2():
    vendor = Vendor()

    def forward(*args, **kwargs):
        call = arguments_of(FA2_FORWARD, args, kwargs)
        assert call.dropout_p == 0.0
        seen = visible(call.causal, call.window_size_left, call.window_size_right, -1)
        return *vendor.forward(call, *seen, call.softcap), None, torch.zeros(2)

    def backward(*args, **kwargs):
        call = arguments_of(FA2_BACKWARD, args, kwargs)
        seen = visible(call.causal, call.window_size_left, call.window_size_right, -1)
        grads = vendor.backward(call, call.softmax_lse, *seen, call.softcap)
        for buffer, grad in zip((call.dq, call.dk, call.dv), grads):
            assert buffer.dtype == grad.dtype and buffer.stride(-1) == 1
            buffer.copy_(grad)
        return torch.zeros(2)

    functions = {"_flash_attn_varlen_forward": forward, "_flash_attn_varlen_backward": backward}
    with modules({"flash_attn": {}, "flash_attn.flash_attn_interface": functions}):
        yield vendor


@contextlib.contextmanager
def modules(contents):
    """Provide modules with these names and attributes inside the context."""
    made = {name: types.ModuleType(name) for name in contents}
    for name, attributes in contents.items():
        vars(made[name]).update(attributes)
    with mock.patch.dict(sys.modules, made):
        yield


# FlashAttention-3: schemas of its operators

FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0., bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0., bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _by_name(schema, args):
    """Return an operator's arguments by name.

    The dispatcher passes them in schema order, without defaults at the end.
    """
    arguments = torch._C.parse_schema(f"flash_attn_3::{schema}").arguments
    values = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    values.update(zip((argument.name for argument in arguments), args))
    return types.SimpleNamespace(**values)


@contextlib.contextmanager
def flash_attn_3():
    vendor = Vendor()

    def forward(*args):
        call = _by_name(FA3_FORWARD, args)
        assert call.softcap == 0.0 and call.num_splits == 1
        out, lse = vendor.forward(call, *visible(call.is_causal, call.window_size_left, call.window_size_right, -1))
        return out, lse, lse.new_empty(0), lse.new_empty(0)

    def backward(*args):
        call = _by_name(FA3_BACKWARD, args)
        # hopper/flash_api_stable.cpp: "Deterministic backward not supported for hdim 256." (from 193 up)
        assert not (call.deterministic and call.q.shape[2] > 192)
        seen = visible(call.is_causal, call.window_size_left, call.window_size_right, -1)
        for buffer, grad in zip((call.dq, call.dk, call.dv), vendor.backward(call, call.softmax_lse, *seen)):
            buffer.copy_(grad)
        return (call.dq, call.dk, call.dv, *(call.dq.new_empty(0) for _ in range(5)))

    with torch.library._scoped_library("flash_attn_3", "FRAGMENT") as library:
        library.define(FA3_FORWARD)
        library.define(FA3_BACKWARD)
        library.impl("fwd", forward, "CPU")
        library.impl("bwd", backward, "CPU")
        yield vendor


# flash-attn-4

_FA4_FORWARD = (
    "qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, "
    "window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
    "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, "
    "block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, {scalars}q_descale=None, "
    "k_descale=None, v_descale=None, gather_kv_indices=None{more}"
)
_FA4_BACKWARD = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, "
    "window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, "
    "num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, "
    "AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
    "score_mod_bwd=None, mask_mod=None, aux_tensors=None, {scalars}block_sparse_tensors=None, dlse=None{more}"
)
_SCALARS = "aux_scalars=None, "
_METADATA = ", scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False"
_SINK = ", learnable_sink=None"
FA4 = {
    # version: parameters of _flash_attn_fwd and _flash_attn_bwd, number of results of _flash_attn_fwd
    "4.0.0b10": ("q, k, v, " + _FA4_FORWARD.format(scalars="", more=""), _FA4_BACKWARD.format(scalars="", more=""), 2),
    "4.0.0b18": (
        "q, k, v, " + _FA4_FORWARD.format(scalars=_SCALARS, more=""),
        _FA4_BACKWARD.format(scalars=_SCALARS, more=""),
        2,
    ),
    "4.0.0b20": (
        "q, k, v, " + _FA4_FORWARD.format(scalars=_SCALARS, more=""),
        _FA4_BACKWARD.format(scalars=_SCALARS, more=""),
        4,
    ),
    "4.0.0b28": (
        "q, k, v, " + _FA4_FORWARD.format(scalars=_SCALARS, more=_METADATA),
        _FA4_BACKWARD.format(scalars=_SCALARS, more=_SINK),
        4,
    ),
    "4.0.0b36": (
        "q, k, v, " + _FA4_FORWARD.format(scalars=_SCALARS, more=_METADATA + ", gather_bwd_recompute_p=False"),
        _FA4_BACKWARD.format(scalars=_SCALARS, more=_SINK),
        5,
    ),
}


@contextlib.contextmanager
def flash_attn_4(version="4.0.0b36"):
    forward_parameters, backward_parameters, results = FA4[version]
    vendor = Vendor()

    def forward(*args, **kwargs):
        call = arguments_of(forward_parameters, args, kwargs)
        assert call.return_lse and not call.softcap
        out, lse = vendor.forward(call, *visible(call.causal, call.window_size_left, call.window_size_right, None))
        return out, lse, *[None] * (results - 2)

    def backward(*args, **kwargs):
        call = arguments_of(backward_parameters, args, kwargs)
        seen = visible(call.causal, call.window_size_left, call.window_size_right, None)
        return vendor.backward(call, call.lse, *seen)

    functions = {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}
    with modules({"flash_attn": {}, "flash_attn.cute": {}, "flash_attn.cute.interface": functions}):
        yield vendor
