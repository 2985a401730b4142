"""Attention kernels compared with the formulas in fp64, for many kinds of rectangles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.attention.kernels import (
    CPUFlashKernel,
    Device,
    EagerKernel,
    Layer,
    ScoreOptions,
    cpu_flash,
    explain_kernels,
    varlen,
)
from hf_flashcp.integrations.gradient_check import relative_error
from hf_flashcp.layout import Rectangle
from hf_flashcp.plan.kernel_calls import Grid
from tests.device import DEVICE, ON_CPU, fused_kernels, make_kernel
from tests.kernel_cases import CAUSAL, FP64, FULL, SCALE, SHAPES, EmulatedVarlen, difference, make, run, textbook
from tests.rounded_formulas import rounded_formulas


pytestmark = [pytest.mark.devices("cpu", "cuda"), pytest.mark.smoke]
of_the_cpu_kernel = pytest.mark.skipif(not ON_CPU, reason="measures the kernel for CPU")


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread, because tensors are small and more threads cost time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


DENSE = Grid(128, "queries", padded=False)


class SmallBlocks(CPUFlashKernel):
    """A kernel with small blocks, so that small tensors cover every way of splitting."""

    _ROWS = 8
    _FULL_ROWS = 16
    _MASK_KEYS = 60
    _FLAG_BY_FOLD = {1: (10, 40), 2: (4, 40), 4: (4, 60)}


KERNELS = {
    **({"cpu_flash": CPUFlashKernel, "cpu_flash in small blocks": SmallBlocks} if ON_CPU else {}),
    "eager": EagerKernel,
    "varlen": EmulatedVarlen,
}


@pytest.mark.parametrize("rectangles", CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("kernel", KERNELS)
def test_causal_rectangles_and_windows_are_exact(kernel, rectangles):
    for shape in SHAPES:
        for window in (None, 1, 6, 17, 70, 1000):
            inputs = make(shape, rectangles)
            reference = textbook(inputs, rectangles, causal=True, window=window)
            ours = run(KERNELS[kernel](), inputs, tuple(rectangles), causal=True, window=window)
            assert difference(ours, reference) < FP64, (shape, window)


@pytest.mark.parametrize("rectangles", FULL.values(), ids=FULL)
@pytest.mark.parametrize("kernel", KERNELS)
def test_full_rectangles_are_exact(kernel, rectangles):
    for shape in SHAPES:
        inputs = make(shape, rectangles)
        reference = textbook(inputs, rectangles, causal=False)
        assert difference(run(KERNELS[kernel](), inputs, rectangles, causal=False), reference) < FP64, shape


@of_the_cpu_kernel
@pytest.mark.parametrize("threads, fold", [(1, 6), (2, 6), (3, 3), (4, 3), (5, 2), (7, 1), (40, 1)])
def test_every_thread_has_a_head_to_itself(threads, fold):
    """With 12 heads and 2 KV heads, as many of a group's six heads share rows as leave one head for each thread."""
    torch.set_num_threads(threads)
    assert cpu_flash._fold(12, 6) == fold
    for rectangles, causal in ((CAUSAL["squares"], True), (FULL["prefixes of two"], False)):
        inputs = make((12, 2, 8, 8), rectangles)
        for window in (None, 9) if causal else (None,):
            reference = textbook(inputs, rectangles, causal=causal, window=window)
            ours = run(SmallBlocks(), inputs, rectangles, causal=causal, window=window)
            assert difference(ours, reference) < FP64


@pytest.mark.parametrize("kernel", ["eager", "varlen"])
@pytest.mark.parametrize("window", [None, 6])
def test_softcap_is_exact(kernel, window):
    rectangles = CAUSAL["squares with gaps"]
    inputs = make((4, 2, 8, 8), rectangles)
    options = {"causal": True, "window": window, "softcap": 0.8}
    reference = textbook(inputs, rectangles, **options)
    assert difference(run(KERNELS[kernel](), inputs, rectangles, **options), reference) < FP64


@pytest.mark.parametrize("kernel", KERNELS)
def test_parts_merged_by_logsumexp_equal_one_call(kernel):
    """Two calls on parts of the keys, forward and backward, equal one call. The exchange in stages relies on this."""
    inputs = query, key, value, grad_out = make((8, 2, 8, 8), [Rectangle(0, 70, 0, 90)])
    whole = textbook([query[:, :70], key, value, grad_out[:, :70]], [Rectangle(0, 70, 0, 90)], causal=False)
    parts = [[Rectangle(0, 70, 0, 37)], [Rectangle(0, 70, 37, 90)]]
    (out, lse), (other, other_lse) = (
        KERNELS[kernel]().forward(query, key, value, part, ScoreOptions(False, SCALE)) for part in parts
    )
    merged_lse = torch.logaddexp(lse, other_lse)
    merged = out * (lse - merged_lse).exp()[..., None] + other * (other_lse - merged_lse).exp()[..., None]
    assert difference((merged, merged_lse), whole) < FP64
    inputs = query[:, :70], key, value, grad_out[:, :70]
    sums = [run(KERNELS[kernel](), inputs, part, (merged, merged_lse), causal=False)[2:] for part in parts]
    assert difference([a + b for a, b in zip(*sums)], whole[2:]) < FP64


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_arbitrary_rectangles_are_exact(data):
    rectangles, row, start, stop = [], 0, 0, 0
    for _ in range(data.draw(st.integers(1, 6))):
        row += data.draw(st.integers(0, 4))
        if rectangles and data.draw(st.booleans()):  # a longer prefix of the same keys
            stop += data.draw(st.integers(0, 9))
        else:
            start = stop + data.draw(st.integers(0, 4))
            stop = start + data.draw(st.integers(1, 30))
        rows = data.draw(st.integers(1, 25))
        rectangles.append(Rectangle(row, row + rows, start, stop))
        row += rows
    inputs = make((4, 2, 8, 8), rectangles)
    reference = textbook(inputs, rectangles, causal=False)
    for kernel in (SmallBlocks() if ON_CPU else EagerKernel(), EmulatedVarlen()):
        assert difference(run(kernel, inputs, rectangles, causal=False), reference) < FP64


def calls_of(rectangles, grid=DENSE):
    keys = max(rectangle.k_stop for rectangle in rectangles)
    return varlen.varlen_calls(tuple(rectangles), grid, 8, keys, DEVICE).calls


def test_there_are_no_more_rounds_than_overlapping_keys_need():
    rounds = calls_of(FULL["prefixes of two"])
    assert [(r.sequences.max_seqlen_q, r.sequences.max_seqlen_k) for r in rounds] == [(4, 5), (17, 30), (3, 40)]
    assert [r.sequences.cu_seqlens_k.tolist() for r in rounds] == [[0, 5, 6], [0, 17, 47], [0, 40]]
    assert len(calls_of(FULL["disjoint keys"])) == 1


def test_rows_without_gaps_are_not_copied_and_rounds_are_built_once():
    documents = tuple(CAUSAL["squares"])
    (only,) = calls_of(documents)
    assert [rows.ranges for rows in (only.queries, only.keys)] == [((0, 120),)] * 2
    rows = torch.zeros(120, 2)
    assert only.queries.take(rows).data_ptr() == rows.data_ptr()
    equal = tuple(Rectangle(*rectangle) for rectangle in documents)
    assert calls_of(equal) is calls_of(documents)
    kernel = EmulatedVarlen()
    run(kernel, make((4, 2, 8, 8), documents), documents, causal=True)
    assert kernel.calls == [3, 3]  # one call with three sequences, in forward and in backward


def relative_errors(ours, reference):
    return [relative_error(a, b) for a, b in zip(ours, reference)]


@of_the_cpu_kernel
@pytest.mark.parametrize("shape", [(4, 1, 64, 64), (2, 2, 32, 32), (4, 2, 32, 32), (8, 1, 32, 32)])
@pytest.mark.parametrize(
    "rows, keys, causal, window", [(700, 700, True, None), (900, 900, True, 300), (300, 600, False, None)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_no_worse_than_one_plain_call(shape, rows, keys, causal, window, dtype):
    """Relative errors of out, dq, dk, dv against fp64 are at most 1.25 times those of PyTorch's sdpa in one call.

    Without a window, for which sdpa needs a mask over all keys, the factor is 1.05.
    """
    rectangles = [Rectangle(0, rows, 0, keys)]
    inputs = [x[:, :n] for x, n in zip(make(shape, rectangles, dtype), (rows, keys, keys, rows))]
    reference = textbook([tensor.double() for tensor in inputs], rectangles, causal=causal, window=window)
    ours = run(CPUFlashKernel(), inputs, rectangles, causal=causal, window=window)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
    mask = None
    if window is not None:
        mask = torch.ones(rows, keys, dtype=torch.bool).tril().triu(1 - window)
    single = torch.nn.functional.scaled_dot_product_attention(
        *(leaf[None] for leaf in leaves), mask, is_causal=causal and mask is None, scale=SCALE, enable_gqa=True
    )[0]
    single.backward(inputs[3])
    plain = [single.detach(), *(leaf.grad for leaf in leaves)]
    out, _, *grads = ours
    expected, _, *expected_grads = reference
    errors = relative_errors([out, *grads], [expected, *expected_grads])
    for error, single_error in zip(errors, relative_errors(plain, [expected, *expected_grads])):
        assert error <= (1.25 if window else 1.05) * single_error, errors


def test_the_error_in_bf16_does_not_grow_with_the_number_of_parts():
    """Relative errors against fp64 with keys in 1 to 16 calls, merged outputs in fp32 and summed gradients in fp32."""
    names = [CPUFlashKernel.name] if ON_CPU else fused_kernels(key_dim=32, value_dim=32)
    if not names:
        pytest.skip("no fused kernel runs here")
    for name in names:
        _check_errors_of_parts(make_kernel(name))


def _check_errors_of_parts(kernel):
    keys, limit = (
        1024,
        1.05 if ON_CPU else 1.1,
    )  # on a GPU, a kernel's own error is smaller compared with the rounding of the parts
    query, key, value, grad_out = make((4, 1, 32, 32), [Rectangle(0, 256, 0, keys)], torch.bfloat16)
    inputs = query[:, :256], key[:, :keys], value[:, :keys], grad_out[:, :256]
    out, _, *grads = textbook([tensor.double() for tensor in inputs], [Rectangle(0, 256, 0, keys)], causal=False)
    errors = {}
    for count in (1, 2, 4, 8, 16):
        size = keys // count
        parts = [(Rectangle(0, 256, start, start + size),) for start in range(0, keys, size)]
        results = [kernel.forward(*inputs[:3], part, ScoreOptions(False, SCALE)) for part in parts]
        lse = torch.stack([part_lse for _, part_lse in results]).logsumexp(0)
        merged = sum(part.float() * (part_lse - lse).exp()[..., None] for part, part_lse in results)
        whole = merged.to(torch.bfloat16), lse
        sums = [[x.float() for x in run(kernel, inputs, part, whole, causal=False)[2:]] for part in parts]
        errors[count] = relative_errors([merged, *(sum(each) for each in zip(*sums))], [out, *grads])
    for error in errors.values():
        assert all(part <= limit * one for part, one in zip(error, errors[1])), (kernel.name, errors)


@pytest.mark.parametrize("threads", [1, 2] if ON_CPU else [1])
@pytest.mark.parametrize("kernel", [name for name in KERNELS if "small" not in name])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(kernel, dtype, threads):
    torch.set_num_threads(threads)
    for rectangles, causal in ((CAUSAL["squares"], True), (FULL["prefixes of two"], False)):
        inputs = make((8, 2, 16, 16), rectangles, dtype)
        first, second = (run(KERNELS[kernel](), inputs, rectangles, causal=causal) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


FUSED = fused_kernels() or [pytest.param("", marks=pytest.mark.skip(reason="no fused kernel for CUDA runs here"))]
LONG = {"long": [Rectangle(0, 300, 0, 700), Rectangle(300, 301, 700, 701)]}
LONG_FULL = {"long": [Rectangle(0, 300, 0, 500), Rectangle(300, 700, 0, 700)]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_dim, value_dim", [(64, 64), (80, 80), (128, 128), (256, 256), (192, 128)])
@pytest.mark.parametrize("name", FUSED)
def test_errors_of_fused_kernels_are_at_most_twice_the_unavoidable(name, key_dim, value_dim, dtype):
    """Relative errors against fp64 are at most twice those of the formulas with the rounding that no kernel can avoid.

    This holds for out, dq, dk and dv. The logsumexp, which is not rounded, is within 1e-3. If the kernel can be
    deterministic, two runs are bitwise equal.
    """
    if name not in fused_kernels(key_dim, value_dim):
        pytest.skip(f"{name} {explain_kernels(Device.here(DEVICE), Layer(torch.bfloat16, key_dim, value_dim))[name]}")
    kernel, deterministic = make_kernel(name), make_kernel(name, deterministic=True)
    repeats = name in fused_kernels(key_dim, value_dim, deterministic=True)
    todo = [(rectangles, {"causal": False}) for rectangles in (FULL | LONG_FULL).values()]
    for window in (None, 6, 70):
        todo += [(rectangles, {"causal": True, "window": window}) for rectangles in (CAUSAL | LONG).values()]
    for kv_heads in (8, 2, 1):
        for rectangles, options in todo:
            inputs = make((8, kv_heads, key_dim, value_dim), rectangles, dtype)
            exact = textbook([tensor.double() for tensor in inputs], rectangles, **options)
            least = rounded_formulas(inputs, rectangles, **options)
            where = kv_heads, rectangles, options
            check_errors(run(kernel, inputs, rectangles, **options), least, exact, where)
            if repeats:
                first, second = (run(deterministic, inputs, rectangles, **options) for _ in range(2))
                assert all(torch.equal(a, b) for a, b in zip(first, second)), where
                check_errors(first, least, exact, where)
        check_merged_parts(kernel, make((8, kv_heads, key_dim, value_dim), [Rectangle(0, 197, 0, 698)], dtype))


def check_errors(ours, least, exact, where):
    assert float((ours[1].double() - exact[1]).abs().max()) < 1e-3, where
    errors = (relative_errors([x[0], *x[2:]], [exact[0], *exact[2:]]) for x in (ours, least))
    for name, error, least_error in zip(("out", "dq", "dk", "dv"), *errors):
        assert error <= 2 * least_error, (name, error, least_error, where)


def check_merged_parts(kernel, inputs):
    """Run backward of two parts from the merged out and logsumexp of both."""
    query, key, *_ = inputs
    parts = [[Rectangle(0, query.shape[1], 0, 300)], [Rectangle(0, query.shape[1], 300, key.shape[1])]]
    whole = [Rectangle(0, query.shape[1], 0, key.shape[1])]
    exact = textbook([tensor.double() for tensor in inputs], whole, causal=False)

    def merged(forward):
        (out, lse), (other, other_lse) = (forward(part)[:2] for part in parts)
        total = torch.logaddexp(lse, other_lse)
        out = out * (lse - total).exp()[..., None] + other * (other_lse - total).exp()[..., None]
        return out.to(query.dtype), total

    def results(forward, backward):
        both = merged(forward)
        sums = [backward(part, both)[2:] for part in parts]
        return *both, *(a + b for a, b in zip(*sums))

    ours = results(
        lambda part: kernel.forward(*inputs[:3], part, ScoreOptions(False, SCALE)),
        lambda part, both: run(kernel, inputs, part, both, causal=False),
    )
    least = results(
        lambda part: rounded_formulas(inputs, part, causal=False),
        lambda part, both: rounded_formulas(inputs, part, causal=False, whole=both),
    )
    check_errors(ours, least, exact, "two parts")


def test_outputs_have_the_stated_dtypes():
    rectangles = CAUSAL["squares"]
    for kernel in KERNELS.values():
        out, lse, *_ = run(kernel(), make((4, 2, 8, 8), rectangles, torch.bfloat16), rectangles, causal=True)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
