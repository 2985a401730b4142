"""The fused kernels: equal to PyTorch's operators, exact in whole layers, bytes moved, and compiled for Hopper."""

import contextlib
import re
import subprocess
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


triton = pytest.importorskip("triton")

from triton._C.libtriton import native_specialize_impl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_flashcp.attention.merge import merge_parts  # noqa: E402
from hf_flashcp.attention.triton_merge import merge_rows  # noqa: E402
from hf_flashcp.exchange import pack_rows  # noqa: E402
from hf_flashcp.layout import Rows, fused  # noqa: E402
from hf_flashcp.layout.sums import sum_parts  # noqa: E402
from hf_flashcp.layout.triton_sums import sum_rows  # noqa: E402
from hf_flashcp.plan.copied_bytes import RowBytes, bytes_copied  # noqa: E402
from hf_flashcp.planning import plan_documents  # noqa: E402
from tests import attention_cases as cases  # noqa: E402
from tests import fused_cases  # noqa: E402
from tests.packs import KNOWN_PACKS, arbitrary_plans  # noqa: E402


# The interpreter rounds fp32 to bf16 towards zero.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


@st.composite
def partial_results(draw):
    """A number of rows, the rows of several parts, of which the first may have all, and a dtype."""
    count = draw(st.integers(1, 40))
    rows = st.lists(st.integers(0, count - 1), unique=True, max_size=count)
    parts = draw(st.lists(rows, max_size=10))
    return (
        count,
        parts,
        draw(st.sampled_from(list(TOLERANCE))),
        draw(st.sampled_from([8, 16, 40])),
        draw(st.booleans()),
    )


def rows_of(count, heads, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, heads, width, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1)
    return rows.contiguous() if seed % 2 else rows  # heads first or rows first in memory


@settings(max_examples=60)
@given(partial_results())
def test_merged_parts_equal_those_of_pytorch(case):
    count, numbers, dtype, width, with_sinks = case
    numbers = [range(count), *numbers]
    where = fused_cases.parts_of(numbers, count)
    accumulated = torch.promote_types(dtype, torch.float32)

    def parts():
        for seed, rows in enumerate(numbers):
            lse = rows_of(len(rows), 3, 1, accumulated, seed + 100)[..., 0].contiguous() * 3
            lse[1:2, :1] = torch.inf if seed else -5.0  # FlashAttention-2 writes inf for rows without keys
            yield rows_of(len(rows), 3, width, dtype, seed), lse

    sinks = torch.tensor([0.5, -1.0, 2.0], dtype=dtype) if with_sinks else None
    expected = merge_parts(list(parts()), where, sinks)
    with fused_cases.on_cpu(), np.errstate(divide="ignore"):
        found = merge_parts(list(parts()), where, sinks)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[ours.dtype], atol=TOLERANCE[ours.dtype])


@settings(max_examples=60)
@given(partial_results(), st.booleans())
def test_summed_parts_equal_those_of_pytorch(case, into_a_buffer):
    count, numbers, dtype, width, begins_whole = case
    numbers = [range(count), *numbers] if begins_whole else numbers
    where = fused_cases.parts_of(numbers, count)
    like = rows_of(1, 2, width, dtype, 0)

    def total():
        parts = [rows_of(len(rows), 2, width, dtype, seed) for seed, rows in enumerate(numbers)]
        out = torch.full((count, 2, width + 8), torch.nan, dtype=dtype)[..., :width].transpose(0, 1)
        return sum_parts(parts, where, like, out if into_a_buffer else None)

    expected = total()
    with fused_cases.on_cpu():
        found = total()
    assert found.dtype == dtype and found.shape == (2, count, width)
    tolerance = TOLERANCE[dtype] * max(1, len(numbers))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("values, total", [((256, 1, 0, 1), 258), ((256, 1, 0, 0, 0, 1), 258)])
def test_sums_are_rounded_once(values, total, fuses):
    """In bf16, 256 + 1 is 256 again. The second case takes two launches."""
    parts = [torch.full((1, 1, 16), value, dtype=torch.bfloat16) for value in values]
    with fused_cases.on_cpu() if fuses else contextlib.nullcontext():
        found = sum_parts(parts, fused_cases.parts_of([[0]] * len(parts), 1), parts[0])
    assert found.dtype == torch.bfloat16 and found.unique().tolist() == [total]


@pytest.mark.parametrize("contiguous", [False, True])
def test_packed_rows_equal_those_of_pytorch(contiguous):
    rows = Rows(np.arange(0, 40, 3))
    key, value = rows_of(40, 2, 24, torch.float32, 0), rows_of(40, 2, 16, torch.float32, 2)
    if not contiguous:  # elements of a head are not next to each other
        key, value = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (key, value))
    expected = pack_rows(key, value, rows, torch.empty(rows.count, 80))
    with fused_cases.on_cpu():
        assert rows.index is not None and torch.equal(
            pack_rows(key, value, rows, torch.empty(rows.count, 80)), expected
        )


@pytest.mark.parametrize("cp_size", [2, 3])
def test_layers_are_exact_with_the_fused_kernels(pool, cp_size):
    """Like tests/test_attention.py, with stages, windows, sinks, nodes and groups of heads."""
    stages = [None, [[offset] for offset in range(1, cp_size)]]
    todo = [
        cases.Case(
            plan_documents(KNOWN_PACKS["ids"], cp_size, strategy=strategy), (4, 2, 8, 12), offset_groups=groups, **more
        )
        for strategy in ("per_doc", "search")
        for groups in stages
        for more in (
            {},
            {"options": {"sinks": True}},
            {"options": {"window": 9, "sinks": True}, "head_groups": 2},
        )
    ]
    for errors in pool.run(cp_size, fused_cases.attention_errors, todo):
        for case, error in zip(todo, errors):
            assert max(error) < 1e-12, (case, error)


# Bytes


NAMED = {
    "one document": plan_documents([64], 2, strategy="per_doc"),
    "zigzag": plan_documents([128], 4, strategy="per_doc"),
    "two documents, gathered": plan_documents([48, 48], 3, strategy="per_doc"),
    "two documents, staged": plan_documents([48, 48], 3, strategy="per_doc").with_offset_groups([[1], [2]]),
    "search": plan_documents([70, 30, 20, 8], 2, strategy="search"),
    "whole documents": plan_documents([32, 32], 2, strategy="whole_doc"),
}


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", NAMED)
def test_bytes_of_named_plans_are_those_of_the_report(name, window):
    plan = NAMED[name]
    report = plan.report(window, kernel="torch_flash", query_heads=4, kv_heads=2, head_dim=16)
    counted = fused_cases.copies_of_a_layer(plan, window)
    assert [each.bytes for each in counted] == report["bytes_copied"]
    for each in counted:
        assert each.others <= {*each.VIEWS, *each.FREE, "normal_"}


# Operators of forward and backward outside of attention kernels, views included, on each rank.
OPERATORS = {
    "one document": [49, 49],
    "zigzag": [61, 61, 61, 61],
    "two documents, gathered": [66, 64, 58],
    "two documents, staged": [88, 82, 76],
    "search": [49, 49],
    "whole documents": [5, 5],
}


@pytest.mark.parametrize("name", NAMED)
def test_a_layer_starts_few_operators(name):
    assert [each.operators for each in fused_cases.copies_of_a_layer(NAMED[name], None)] == OPERATORS[name]


@settings(max_examples=25)
@given(arbitrary_plans(), st.none() | st.integers(2, 45))
def test_bytes_of_arbitrary_plans_are_those_of_the_report(plan, window):
    window = plan.hiding_window(window)
    counted = fused_cases.copies_of_a_layer(plan, window)
    assert [each.bytes for each in counted] == bytes_copied(plan, window, RowBytes.of(4, 2, 16, 2))


# Compilation


def test_another_batch_needs_no_other_kernel():
    """What Triton specializes a kernel for is the same with other numbers of rows, multiples of 16 or not."""

    def specializations(tokens):
        found = []

        def launch(kernel, target, *args, **constants):
            named = dict(zip(kernel.arg_names, (target, *args, target.shape[1])))
            for name, value in named.items():
                general = name in ("place_step", "count")
                found.append((name, native_specialize_impl(CUDABackend, value, False, not general, not general)))

        plan = plan_documents([tokens, tokens // 2], 2, strategy="per_doc")
        with patch.object(fused_cases.CopiedBytes, "launch", lambda self, *args, **more: launch(*args, **more)):
            fused_cases.copies_of_a_layer(plan, None)
        return found

    assert specializations(64) == specializations(74) == specializations(1024)


# Compilation for Hopper


def types_of(count, kind):
    return (kind,) * count


@pytest.mark.parametrize("parts", [0, 1, 2, fused.MOST_AT_ONCE])
@pytest.mark.parametrize("kernel", ["sum", "merge"])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_kernels_compile_for_hopper_without_spills(kernel, parts, width, tmp_path):
    if kernel == "sum" and parts == 0:
        pytest.skip("there is nothing to add")
    constants = {"WIDTH": width, "ROWS": 2048 // width, "COLUMNS": width, "IN_PLACE": True}
    sources = types_of(parts, "*bf16")
    signature = {"target": "*bf16", ("base" if kernel == "sum" else "source"): "*bf16", "parts": sources}
    signature |= {"steps": types_of(2 * parts + 4, "i32"), "places": "*i32", "place_step": "i32", "count": "i32"}
    if kernel == "sum":
        function, constants = sum_rows, {**constants, "HAS_BASE": True, "DOUBLE": False}
    else:
        function, constants = merge_rows, {**constants, "HAS_SINKS": True}
        signature |= {"lse": "*fp32", "part_lses": types_of(parts, "*fp32"), "sinks": "*bf16"}
        signature["lse_steps"] = types_of(2 * parts + 2, "i32")
    signature = {name: signature.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
    options = ["-v", "--gpu-name=sm_90a", str(ptx), "-o", str(tmp_path / "kernel.cubin")]
    said = subprocess.run([get_ptxas(90).path, *options], capture_output=True, text=True, check=True).stderr
    assert re.search(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), said
