"""Stand-ins for the vendors' kernels: their signatures and rules, computed by the formulas.

A call that the vendor's interface would reject fails here as well. Signatures and rules were read from these files:

    PyTorch 2.13                 the schemas of its operators
    flash-attn 2.7.3, 2.8.3      flash_attn/flash_attn_interface.py, csrc/flash_attn/flash_api.cpp
    xformers 0.0.34              xformers/flash_attn_3/_C.so (the schemas that it registers)
    flash-attn3 version 1        hopper/flash_api_stable.cpp in kernels-community, loaded by the package kernels 0.17
    flash-attn-4 4.0.0b10, b18,  flash_attn/cute/interface.py
      b20, b28, b36

Where the vendors require fp16 or bf16, the stand-ins also accept fp64, so that tests can require errors below 1e-12.
"""

import contextlib
import importlib.machinery
import inspect
import sys
import types

import torch

from hf_flashcp.attention.kernels import BackwardInputs, ScoreOptions, flash_attention_3
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
    """Counts calls, and remembers what backward was asked for.

    Attributes:
        deterministic: whether backward was to be deterministic.
        backward_shapes: shapes of the queries and keys of each backward.
    """

    def __init__(self, common_width=True):
        self.forwards = self.backwards = 0
        self.deterministic = set()
        self.backward_shapes = []
        self._emulated = EmulatedVarlen(common_width)

    def forward(self, call, causal, window, softcap=None):
        self.forwards += 1
        self._check(call.q, call.k, call.v)
        options = ScoreOptions(causal, call.softmax_scale, window, softcap or None)
        return self._emulated._forward_call(call.q, call.k, call.v, self._sequences(call), options)

    def backward(self, call, lse, causal, window, softcap=None):
        self.backwards += 1
        self.deterministic.add(call.deterministic)
        self.backward_shapes.append((tuple(call.q.shape), tuple(call.k.shape)))
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
    """Provide modules with these names and attributes inside the context; keep others that are imported there."""
    made = {name: types.ModuleType(name) for name in contents}
    for name, attributes in contents.items():
        vars(made[name]).update(attributes, __spec__=importlib.machinery.ModuleSpec(name, None))
    before = {name: sys.modules.pop(name) for name in contents if name in sys.modules}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in contents:
            sys.modules.pop(name, None)
        sys.modules.update(before)


# FlashAttention-3: schemas of its operators

FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
)

FA3_LATER_BACKWARD = FA3_BACKWARD.rpartition("->")[0] + "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
"""The schema after flash-attn 2.8.3: it returns no gradients, which are written to the arguments."""
FA3_LATER_BACKWARD = FA3_LATER_BACKWARD.replace("(dq!)", "(a!)").replace("(dk!)", "(b!)").replace("(dv!)", "(c!)")


def _by_name(schema, args):
    """Return an operator's arguments by name.

    The dispatcher passes them in schema order, without defaults at the end.
    """
    arguments = torch._C.parse_schema(f"flash_attn_3::{schema}").arguments
    values = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    values.update(zip((argument.name for argument in arguments), args))
    return types.SimpleNamespace(**values)


@contextlib.contextmanager
def flash_attn_3(namespace="flash_attn_3", schema=FA3_BACKWARD):
    vendor = Vendor()

    def forward(*args):
        call = _by_name(FA3_FORWARD, args)
        assert call.num_splits == 1
        seen = visible(call.is_causal, call.window_size_left, call.window_size_right, -1)
        out, lse = vendor.forward(call, *seen, call.softcap)
        return out, lse, lse.new_empty(0), lse.new_empty(0)

    def backward(*args):
        call = _by_name(schema, args)
        # hopper/flash_api_stable.cpp: "Deterministic backward not supported for hdim 256." (from 193 up)
        assert not (call.deterministic and call.q.shape[2] > 192)
        seen = visible(call.is_causal, call.window_size_left, call.window_size_right, -1)
        grads = vendor.backward(call, call.softmax_lse, *seen, call.softcap)
        for buffer, grad in zip((call.dq, call.dk, call.dv), grads):
            buffer.copy_(grad)
        unused = [call.dq.new_empty(0) for _ in range(5)]
        return (call.dq, call.dk, call.dv, *unused) if returns_gradients else tuple(unused)

    returns_gradients = "dq!" in schema.rpartition("->")[2]
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define(FA3_FORWARD)
        library.define(schema)
        library.impl("fwd", forward, "CPU")
        library.impl("bwd", backward, "CPU")
        yield vendor


@contextlib.contextmanager
def flash_attn_3_from_the_hub(cached=True):
    """Provide FlashAttention-3 through the package `kernels`, whose builds have a namespace of their own.

    If it is not `cached`, it has to be downloaded.
    """
    namespace = "_flash_attn3_stand_in"

    def install_kernel(repo_id, *, revision=None, version=None, local_files_only=False):
        assert (repo_id, revision, version) == ("kernels-community/flash-attn3", None, 1)
        if local_files_only and not cached:
            raise FileNotFoundError("no cached kernel")

    def get_kernel(repo_id, *, revision=None, version=None):
        install_kernel(repo_id, revision=revision, version=version)
        vendor.downloads += not cached
        return types.SimpleNamespace(ops=getattr(torch.ops, namespace))

    flash_attention_3.load.cache_clear()
    with flash_attn_3(namespace, FA3_LATER_BACKWARD) as vendor:
        with modules({"kernels": {"install_kernel": install_kernel, "get_kernel": get_kernel}}):
            vendor.downloads = 0
            try:
                assert (flash_attention_3.load() is None) == cached
                yield vendor
            finally:
                flash_attention_3._from_hub.clear()
                flash_attention_3.load.cache_clear()


# PyTorch's own operators


def _of_pytorch(operator, args, kwargs):
    values = {each.name: each.default_value for each in operator._schema.arguments if each.has_default_value()}
    names = [each.name for each in operator._schema.arguments]
    return types.SimpleNamespace(**{**values, **dict(zip(names, args)), **kwargs})


@contextlib.contextmanager
def torch_flash():
    vendor = Vendor()

    def described(call):
        call.q, call.k, call.v, call.softmax_scale = call.query, call.key, call.value, call.scale
        call.cu_seqlens_q, call.cu_seqlens_k = call.cum_seq_q, call.cum_seq_k
        call.max_seqlen_q, call.max_seqlen_k = call.max_q, call.max_k
        assert call.dropout_p == 0.0
        return visible(call.is_causal, call.window_size_left, call.window_size_right, None)

    def forward(*args, **kwargs):
        call = _of_pytorch(torch.ops.aten._flash_attention_forward.default, args, kwargs)
        out, lse = vendor.forward(call, *described(call))
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(*args, **kwargs):
        call = _of_pytorch(torch.ops.aten._flash_attention_backward.default, args, kwargs)
        call.dout, call.deterministic = call.grad_out, torch.are_deterministic_algorithms_enabled()
        assert call.rng_state.dtype == torch.uint64 and call.rng_state.shape == (2,)
        return tuple(vendor.backward(call, call.logsumexp, *described(call)))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
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
def flash_attn_4(version="4.0.0b36", blackwell=False):
    forward_parameters, backward_parameters, results = FA4[version]
    vendor = Vendor(common_width=not blackwell)

    def forward(*args, **kwargs):
        call = arguments_of(forward_parameters, args, kwargs)
        assert call.return_lse
        seen = visible(call.causal, call.window_size_left, call.window_size_right, None)
        if blackwell:  # `_validate_head_dims`, and what its backward for heads of 256 asserts
            widths = call.q.shape[2], call.v.shape[2]
            assert max(widths) <= 128 or widths in ((192, 128), (256, 256)), widths
            assert widths != (256, 256) or not (seen[1] or call.softcap)
        out, lse = vendor.forward(call, *seen, call.softcap)
        return out, lse, *[None] * (results - 2)

    def backward(*args, **kwargs):
        call = arguments_of(backward_parameters, args, kwargs)
        seen = visible(call.causal, call.window_size_left, call.window_size_right, None)
        return vendor.backward(call, call.lse, *seen, call.softcap)

    functions = {"_flash_attn_fwd": forward, "_flash_attn_bwd": backward}
    with modules({"flash_attn": {}, "flash_attn.cute": {}, "flash_attn.cute.interface": functions}):
        yield vendor
