"""Stand-in for the package nvidia-cudnn-frontend: its graphs, and what they refuse, computed by the formulas.

Signatures are those of version 1.18 (docstrings of python/pygraph/sdpa.cpp, python/cudnn/__init__.py). Rules are those
of include/cudnn_frontend/node/sdpa_support_surface.h and scaled_dot_product_flash_attention.h for a Hopper GPU with
cuDNN 9.20. As elsewhere, fp64 is accepted so that tests can require errors below 1e-12.
"""

import contextlib
import enum
import types
from typing import NamedTuple
from unittest import mock

import torch

from hf_flashcp.attention.kernels import BackwardInputs, EagerKernel, ScoreOptions, cudnn_graphs
from hf_flashcp.layout import Rectangle


DataType = enum.Enum("data_type", "NOT_SET HALF BFLOAT16 FLOAT DOUBLE INT32 INT64")
DTYPES = {
    DataType.HALF: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.FLOAT: torch.float32,
    DataType.DOUBLE: torch.float64,
    DataType.INT32: torch.int32,
    DataType.INT64: torch.int64,
}
Alignment = enum.Enum("diagonal_alignment", "TOP_LEFT BOTTOM_RIGHT")
HeurMode = enum.Enum("heur_mode", "A B FALLBACK")

SDPA = (
    "q, k, v, is_inference=None, attn_scale=None, bias=None, block_mask=None, use_alibi_mask=False, "
    "use_padding_mask=False, seq_len_q=None, seq_len_kv=None, use_causal_mask=False, "
    "use_causal_mask_bottom_right=False, sliding_window_length=None, diagonal_alignment=None, "
    "diagonal_band_left_bound=None, diagonal_band_right_bound=None, dropout=None, rng_dump=None, "
    "paged_attention_k_table=None, paged_attention_v_table=None, paged_attention_max_seq_len_kv=None, "
    "compute_data_type=None, name='', score_mod=None, generate_stats=None, implementation=None, score_max=None, "
    "score_sum_exp=None"
)
SDPA_BACKWARD = (
    "q, k, v, o, dO, stats, attn_scale=None, bias=None, dBias=None, use_alibi_mask=False, use_padding_mask=False, "
    "seq_len_q=None, seq_len_kv=None, max_total_seq_len_q=None, max_total_seq_len_kv=None, use_causal_mask=False, "
    "use_causal_mask_bottom_right=False, sliding_window_length=None, diagonal_alignment=None, "
    "diagonal_band_left_bound=None, diagonal_band_right_bound=None, dropout=None, rng_dump=None, "
    "use_deterministic_algorithm=False, compute_data_type=None, name=''"
)
_UNUSED = {"bias", "block_mask", "dropout", "rng_dump", "score_mod", "dBias", "paged_attention_k_table"}


class GraphNotSupported(RuntimeError):
    pass


def refuse_if(wrong, message):
    if wrong:
        raise GraphNotSupported(message)


class Tensor:
    """A tensor of a graph, with the setters that return it."""

    def __init__(self, dim=None, stride=None, data_type=None, ragged_offset=None, name=""):
        self.dim, self.stride, self.data_type, self.ragged_offset, self.name = (
            dim,
            stride,
            data_type,
            ragged_offset,
            name,
        )
        self.output = False

    def set_output(self, value):
        self.output = value
        return self

    def set_name(self, value):
        self.name = value
        return self

    def set_dim(self, value):
        self.dim = value
        return self

    def set_stride(self, value):
        self.stride = value
        return self

    def set_data_type(self, value):
        assert isinstance(value, DataType)
        self.data_type = value
        return self

    def set_ragged_offset(self, value):
        self.ragged_offset = value
        return self


class Sequence(NamedTuple):
    """The number of a sequence in the batch, and its lengths."""

    number: int
    queries: int
    keys: int


class Graph:
    """`cudnn.pygraph` with one attention node."""

    steps = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")

    def __init__(self, io_data_type=None, intermediate_data_type=None, compute_data_type=None, handle=None):
        assert intermediate_data_type == compute_data_type == DataType.FLOAT, "internal tensors need a type"
        assert io_data_type is not None
        self._done = 0
        self.call = self.outputs = None

    def tensor(
        self, dim, stride, data_type=DataType.NOT_SET, is_virtual=False, is_pass_by_value=False, ragged_offset=None,
        reordering_type=None, name="", uid=-1,
    ):  # fmt: skip
        assert len(dim) == len(stride) == 4 and all(type(n) is int for n in (*dim, *stride))
        return Tensor(dim, stride, data_type, ragged_offset, name)

    def sdpa(self, **kwargs):
        self.call = self._call(SDPA, kwargs)
        assert self.call.generate_stats is True
        self.outputs = [Tensor(), Tensor()]
        return self.outputs

    def sdpa_backward(self, **kwargs):
        self.call = self._call(SDPA_BACKWARD, kwargs)
        self.outputs = [Tensor(), Tensor(), Tensor()]
        return self.outputs

    @staticmethod
    def _call(parameters, kwargs):
        from tests.vendor_kernels import arguments_of

        call = arguments_of(parameters, (), kwargs)
        assert not any(getattr(call, name, None) for name in _UNUSED)
        assert type(call.attn_scale) is float, "an int raises"
        return call

    def validate(self):
        self._step("validate")
        call, backward = self.call, self.backward
        ports = [call.q, call.k, call.v, *((call.o, call.dO, call.stats) if backward else ()), *self.outputs]
        for tensor in ports:
            assert tensor.output == any(tensor is output for output in self.outputs)
            refuse_if(tensor.stride[3] != 1, f"the stride of the last dimension of {tensor.name} should be 1")
            refuse_if(not call.use_padding_mask, "Ragged offsets are only supported with padding mask.")
            refuse_if(tensor.ragged_offset.dim != [call.q.dim[0] + 1, 1, 1, 1], "ragged dim should match batch + 1")
        refuse_if(len({tensor.ragged_offset.data_type for tensor in ports}) > 1, "all ragged offsets need one type")
        refuse_if(not (call.seq_len_q and call.seq_len_kv), "Padding mask requires seq_len_q and seq_len_kv")
        _, heads, max_q, key_dim = call.q.dim
        _, kv_heads, max_kv, value_dim = call.v.dim
        refuse_if(heads % kv_heads, "heads of keys must be a factor of heads of queries")
        refuse_if(key_dim % 8 or value_dim % 8, "hidden_dim should be multiple of 8")
        left = call.diagonal_band_left_bound
        refuse_if(left is not None and left <= 0, "Left bound should be greater than zero when set.")
        if backward:
            refuse_if(max_q == max_kv == 1, "s_q = s_kv = 1 is not supported.")
            refuse_if(max(key_dim, value_dim) > 256, "hidden_dim should be less than or equal to 256")
            assert not call.use_deterministic_algorithm, "its workspace grows with s_q x s_kv on Hopper"
            assert key_dim % 16 == value_dim % 16 == 0, "otherwise max_total_seq_len is ignored"
        assert max_q > 128 and max_kv > 128, "up to 128 declared rows cuDNN takes kernels of older GPUs"
        bounds = left, call.diagonal_band_right_bound
        assert bounds == (None, None) or call.diagonal_alignment == Alignment.BOTTOM_RIGHT and bounds[1] == 0

    def build_operation_graph(self):
        self._step("build_operation_graph")

    def create_execution_plans(self, modes):
        assert modes == [HeurMode.A]
        self._step("create_execution_plans")

    def check_support(self):
        self._step("check_support")

    def build_plans(self):
        self._step("build_plans")

    def get_workspace_size(self):
        return 1024

    def _step(self, name):
        assert self.steps[self._done] == name, "steps in order"
        self._done += 1

    @property
    def backward(self):
        return hasattr(self.call, "dO")

    def execute(self, buffers, workspace, handle=None):
        assert self._done == len(self.steps) and handle is not None
        assert workspace.dtype == torch.uint8 and workspace.numel() >= 1024
        memory = {tensor.name: (tensor, buffer) for tensor, buffer in buffers.items()}
        for tensor, buffer in buffers.items():
            assert buffer.dtype == DTYPES[tensor.data_type], tensor.name
            step = tensor.stride[2] if tensor.ragged_offset else 1
            assert buffer.data_ptr() % 16 == 0 or step * buffer.element_size() % 16, f"{tensor.name} is not aligned"
            if not tensor.ragged_offset:
                assert buffer.numel() == tensor.dim[0] and buffer.is_contiguous()
        for sequence in self._sequences(memory):
            (self._run_backward if self.backward else self._run_forward)(memory, sequence)

    def _sequences(self, memory):
        queries, keys = (memory[tensor.name][1].tolist() for tensor in (self.call.seq_len_q, self.call.seq_len_kv))
        assert max(queries) <= self.call.q.dim[2] and max(keys) <= self.call.k.dim[2], "declared rows are upper bounds"
        if self.backward:
            assert sum(queries) <= self.call.max_total_seq_len_q and sum(keys) <= self.call.max_total_seq_len_kv
        for number, (rows, columns) in enumerate(zip(queries, keys)):
            assert (rows > 0) == (columns > 0)
            if rows:
                yield Sequence(number, rows, columns)

    def _part(self, memory, tensor, sequence, length):
        """The rows of one sequence in a ragged tensor, (heads, length, D)."""
        buffer, (offsets, _) = memory[tensor.name][1], memory[tensor.ragged_offset.name]
        start = int(memory[offsets.name][1][sequence.number])
        _, heads, _, dim = tensor.dim
        _, head, row, _ = tensor.stride
        return torch.as_strided(buffer, (heads, length, dim), (head, row, 1), buffer.storage_offset() + start)

    def _options(self):
        call = self.call
        return ScoreOptions(call.diagonal_band_right_bound == 0, call.attn_scale, call.diagonal_band_left_bound)

    def _inputs(self, memory, sequence):
        call = self.call
        query = self._part(memory, call.q, sequence, sequence.queries)
        key, value = (self._part(memory, tensor, sequence, sequence.keys) for tensor in (call.k, call.v))
        return query, key, value, (Rectangle(0, sequence.queries, 0, sequence.keys),)

    def _run_forward(self, memory, sequence):
        *tensors, whole = self._inputs(memory, sequence)
        out, lse = EagerKernel().forward(*tensors, whole, self._options())
        for tensor, result in zip(self.outputs, (out, lse.unsqueeze(-1))):
            self._part(memory, tensor, sequence, sequence.queries).copy_(result)

    def _run_backward(self, memory, sequence):
        query, key, value, whole = self._inputs(memory, sequence)
        out, grad_out, stats = (
            self._part(memory, tensor, sequence, sequence.queries)
            for tensor in (self.call.o, self.call.dO, self.call.stats)
        )
        inputs = BackwardInputs(grad_out, query, key, value, out, stats.squeeze(-1))
        grads = EagerKernel().backward(inputs, whole, self._options())
        for tensor, grad in zip(self.outputs, grads):
            self._part(memory, tensor, sequence, grad.shape[1]).copy_(grad)


@contextlib.contextmanager
def cudnn():
    """Provide the module `cudnn`. The context value counts `builds`, and calls as `Vendor` does."""
    from tests.vendor_kernels import modules

    counts = types.SimpleNamespace(builds=0, forwards=0, backwards=0, deterministic=set(), shapes=[])

    class Counted(Graph):
        def build_plans(self):
            counts.builds += 1
            super().build_plans()

        def execute(self, buffers, workspace, handle=None):
            if self.backward:
                counts.backwards += 1
                counts.deterministic.add(self.call.use_deterministic_algorithm)
            else:
                counts.forwards += 1
            counts.shapes.append((self.backward, tuple(self.call.q.dim), tuple(self.call.k.dim)))
            super().execute(buffers, workspace, handle)

    contents = {
        "pygraph": Counted,
        "data_type": DataType,
        "diagonal_alignment": Alignment,
        "heur_mode": HeurMode,
        "create_handle": object,
    }
    with modules({"cudnn": contents}), mock.patch.object(cudnn_graphs, "_graphs", {}):
        cudnn_graphs._handle.cache_clear()
        try:
            yield counts
        finally:
            cudnn_graphs._handle.cache_clear()
