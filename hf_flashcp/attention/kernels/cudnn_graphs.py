"""Builds cuDNN's graphs for attention over packed sequences (package nvidia-cudnn-frontend), and keeps them.

cuDNN compiles a graph for fixed dimensions, which takes about a second, but it gets the lengths and offsets of the
sequences at run time. So dimensions are upper bounds. They are rounded up, and a graph that was built for larger
dimensions is used again unless it would start many more empty blocks. After a few packs, new graphs are rare.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch

from ...errors import ConfigurationError
from ...plan.kernel_calls import declared_rows, power_of_two


SPARE_BLOCKS = 32768
"""The most empty blocks for which a larger graph is used again, if they are more than the useful ones. They take at
most about 0.2 milliseconds (estimated, not measured)."""

TILE = 128
"""Queries per block in forward, and keys per block in backward. The plans of cuDNN 9.20 for Hopper GPUs contain the
number of blocks: batch x query heads x max_queries / 128 in forward, and with max_keys in backward."""

Steps = tuple[int, int]
"""Strides of a tensor (rows, heads, D) in elements: from row to row and from head to head."""


class Sizes(NamedTuple):
    """Sizes of a call, or the upper bounds of a graph. Backward alone depends on the totals."""

    batch: int
    max_queries: int
    max_keys: int
    total_queries: int
    total_keys: int

    def rounded(self, backward: bool) -> Sizes:
        """Return upper bounds: powers of two, and of 16 for the axis on which the number of blocks does not depend.

        Up to 128 declared rows, cuDNN takes kernels of older GPUs on Blackwell.
        """
        coarse = tuple(next(bound for bound in _COARSE if bound >= count) for count in self[1:3])
        return Sizes(
            power_of_two(self.batch, 8),
            coarse[0] if backward else power_of_two(self.max_queries, 512),
            power_of_two(self.max_keys, 512) if backward else coarse[1],
            declared_rows(self.total_queries) if backward else 0,
            declared_rows(self.total_keys) if backward else 0,
        )

    def blocks(self, backward: bool) -> int:
        """Return the number of blocks that a graph with these bounds starts per query head."""
        return self.batch * -(-(self.max_keys if backward else self.max_queries) // TILE)

    def cover(self, other: Sizes) -> bool:
        """Return whether a call of other sizes fits into these bounds."""
        return all(bound >= size for bound, size in zip(self, other))


_COARSE = tuple(16**exponent for exponent in range(4, 8))


class GraphKey(NamedTuple):
    """Everything except sizes that a graph depends on.

    `steps` holds the strides of query, key and value, in backward also of output and its gradient. Other tensors are
    contiguous.
    """

    backward: bool
    dtype: torch.dtype
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    steps: tuple[Steps, ...]
    causal: bool
    window: int | None
    scale: float
    deterministic: bool
    device: torch.device


class Graph(NamedTuple):
    """A compiled graph with its bounds, its tensors by name, and the bytes of workspace that it needs."""

    sizes: Sizes
    graph: Any
    tensors: dict[str, Any]
    workspace: int

    def run(self, buffers: dict[str, torch.Tensor], device: torch.device) -> None:
        """Run on the current stream. `buffers` has the memory of each tensor."""
        handle = _handle(device)
        if device.type == "cuda":
            _cudnn().set_stream(handle, torch.cuda.current_stream(device).cuda_stream)
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        self.graph.execute({self.tensors[name]: buffer for name, buffer in buffers.items()}, workspace, handle)


_graphs: dict[GraphKey, list[Graph]] = {}


def graph_for(key: GraphKey, sizes: Sizes) -> Graph:
    """Return a graph for a call of these sizes, built if no earlier one fits."""
    graphs = _graphs.setdefault(key, [])
    totals = sizes if key.backward else sizes._replace(total_queries=0, total_keys=0)
    fitting = [graph for graph in graphs if graph.sizes.cover(totals)]
    if fitting:
        best = min(fitting, key=lambda graph: graph.sizes.blocks(key.backward))
        needed = key.query_heads * sizes.blocks(key.backward)
        if key.query_heads * best.sizes.blocks(key.backward) - needed <= max(SPARE_BLOCKS, needed):
            return best
    graphs.append(_built(key, sizes.rounded(key.backward)))
    return graphs[-1]


def _built(key: GraphKey, sizes: Sizes) -> Graph:
    builder = _Builder(key, sizes)
    for output in builder.backward() if key.backward else builder.forward():
        output.set_output(True)
    graph = builder.graph
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([_cudnn().heur_mode.A])
        graph.check_support()
        graph.build_plans()
    except Exception as error:
        raise ConfigurationError(
            f"cuDNN does not support an attention call with {key} and {sizes}: {' '.join(str(error).split())[:300]}. "
            'Choose another kernel, for example FlashCPPlugin(kernel="torch_flash").'
        ) from None
    return Graph(sizes, graph, builder.tensors, graph.get_workspace_size())


class _Builder:
    def __init__(self, key: GraphKey, sizes: Sizes):
        cudnn = _cudnn()
        self._key, self._sizes, self._type = key, sizes, _data_type(key.dtype)
        self._int32, self._int64, self._float = cudnn.data_type.INT32, cudnn.data_type.INT64, cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=self._type,
            intermediate_data_type=self._float,
            compute_data_type=self._float,
            handle=_handle(key.device),
        )
        self.tensors: dict[str, Any] = {}

    def forward(self) -> list[Any]:
        """Add the forward pass, and return its outputs."""
        key = self._key
        query, keys, value = self._inputs()
        out, stats = self.graph.sdpa(
            name="sdpa", q=query, k=keys, v=value, generate_stats=True, **self._options(), **self._mask()
        )
        self._describe("out", out, key.query_heads, self._sizes.max_queries, key.value_dim)
        self._describe("stats", stats, key.query_heads, self._sizes.max_queries, 1, self._statistics_type)
        return [out, stats]

    def backward(self) -> list[Any]:
        """Add the backward pass, and return its outputs."""
        key = self._key
        query, keys, value = self._inputs()
        out, grad_out = (
            self._input(name, key.query_heads, self._sizes.max_queries, key.value_dim, steps)
            for name, steps in zip(("out", "grad_out"), key.steps[3:])
        )
        steps = (key.query_heads, 1)
        stats = self._input("stats", key.query_heads, self._sizes.max_queries, 1, steps, self._statistics_type)
        grads = self.graph.sdpa_backward(
            name="sdpa_backward",
            q=query,
            k=keys,
            v=value,
            o=out,
            dO=grad_out,
            stats=stats,
            max_total_seq_len_q=self._sizes.total_queries,
            max_total_seq_len_kv=self._sizes.total_keys,
            use_deterministic_algorithm=key.deterministic,
            **self._options(),
            **self._mask(),
        )
        self._describe("grad_query", grads[0], key.query_heads, self._sizes.max_queries, key.key_dim)
        self._describe("grad_key", grads[1], key.kv_heads, self._sizes.max_keys, key.key_dim)
        self._describe("grad_value", grads[2], key.kv_heads, self._sizes.max_keys, key.value_dim)
        return list(grads)

    @property
    def _statistics_type(self) -> Any:
        return _data_type(torch.promote_types(self._key.dtype, torch.float32))

    def _inputs(self) -> list[Any]:
        key = self._key
        shapes = (
            ("query", key.query_heads, self._sizes.max_queries, key.key_dim),
            ("key", key.kv_heads, self._sizes.max_keys, key.key_dim),
            ("value", key.kv_heads, self._sizes.max_keys, key.value_dim),
        )
        return [self._input(*shape, steps) for shape, steps in zip(shapes, key.steps)]

    def _input(self, name: str, heads: int, rows: int, dim: int, steps: Steps, data_type: Any = None) -> Any:
        row, head = steps
        self.tensors[name] = self.graph.tensor(
            name=name,
            dim=[self._sizes.batch, heads, rows, dim],
            stride=[rows * row, head, row, 1],
            data_type=data_type or self._type,
            ragged_offset=self._offsets(name),
        )
        return self.tensors[name]

    def _describe(self, name: str, output: Any, heads: int, rows: int, dim: int, data_type: Any = None) -> None:
        """Set the layout of an output, which is contiguous as (rows, heads, dim)."""
        output.set_name(name).set_dim([self._sizes.batch, heads, rows, dim])
        output.set_stride([rows * heads * dim, dim, heads * dim, 1])
        output.set_data_type(data_type or self._type).set_ragged_offset(self._offsets(name))
        self.tensors[name] = output

    def _offsets(self, name: str) -> Any:
        return self._whole_numbers(f"{name} offsets", self._sizes.batch + 1, self._int64)

    def _whole_numbers(self, name: str, count: int, data_type: Any) -> Any:
        self.tensors[name] = self.graph.tensor(
            name=name, dim=[count, 1, 1, 1], stride=[1, 1, 1, 1], data_type=data_type
        )
        return self.tensors[name]

    def _options(self) -> dict[str, Any]:
        batch = self._sizes.batch
        return {
            "attn_scale": self._key.scale,
            "use_padding_mask": True,  # ragged offsets need it, as it brings the lengths
            "seq_len_q": self._whole_numbers("queries", batch, self._int32),
            "seq_len_kv": self._whole_numbers("keys", batch, self._int32),
        }

    def _mask(self) -> dict[str, Any]:
        if not self._key.causal:
            return {}
        mask = {"diagonal_alignment": _cudnn().diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
        return mask if self._key.window is None else {**mask, "diagonal_band_left_bound": self._key.window}


def _cudnn() -> Any:
    import cudnn

    return cudnn


def _data_type(dtype: torch.dtype) -> Any:
    names = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT", torch.float64: "DOUBLE"}
    return getattr(_cudnn().data_type, names[dtype])


@cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _cudnn().create_handle()
