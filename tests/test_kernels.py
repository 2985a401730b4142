"""Attention kernels against the formulas in fp64, rectangle by rectangle, and the table that chooses among them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp.attention.kernels import (
    CAPABILITIES,
    EXPERIMENTAL,
    TESTED,
    CPUFlashKernel,
    EagerKernel,
    FlashAttn2Kernel,
    TorchFlashKernel,
    VarlenKernel,
    capabilities,
    cpu_flash,
    explain_kernels,
    select_kernel,
    varlen,
)
from hf_flashcp.errors import FlashCPError
from hf_flashcp.layout import Rectangle


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FP64 = 1e-12  # largest difference of out, logsumexp, dq, dk, dv, which are of order 1
SHAPES = [(4, 2, 8, 8), (2, 2, 8, 12), (4, 1, 12, 8)]  # H_q, H_kv, D_k, D_v
SCALE = 0.3


class SmallBlocks(CPUFlashKernel):
    """Every way of cutting, at sizes that the formulas are quick for."""

    _ROWS = 8
    _FULL_ROWS = 16
    _MASK_KEYS = 60
    _FLAG_BY_FOLD = {1: (10, 40), 2: (4, 40), 4: (4, 60)}


class EmulatedVarlen(VarlenKernel):
    """Sequence by sequence by the formulas; particular about what it is given, like the real ones."""

    name = "emulated"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def _check(self, query, key, value, sequences, *more):
        assert query.shape[2] == key.shape[2] == value.shape[2] and query.shape[2] % 8 == 0
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value, *more))
        for cumulative, longest, rows, least in (
            (sequences.cu_seqlens_q, sequences.max_q, query.shape[0], 2),
            (sequences.cu_seqlens_k, sequences.max_k, key.shape[0], 1),
        ):
            assert cumulative.dtype == torch.int32 and cumulative.is_contiguous()
            lengths = cumulative.diff()
            assert cumulative[0] == 0 and cumulative[-1] == rows
            assert lengths.min() > 0 and longest == max(least, lengths.max())
        assert len(sequences.cu_seqlens_q) == len(sequences.cu_seqlens_k)
        self.calls.append(len(sequences.cu_seqlens_q) - 1)

    def _each(self, sequences):
        q, k = sequences.cu_seqlens_q.tolist(), sequences.cu_seqlens_k.tolist()
        for q_start, q_stop, k_start, k_stop in zip(q, q[1:], k, k[1:]):
            yield (
                slice(q_start, q_stop),
                slice(k_start, k_stop),
                (Rectangle(0, q_stop - q_start, 0, k_stop - k_start),),
            )

    def _forward_call(self, query, key, value, sequences, causal, scale, window, softcap):
        self._check(query, key, value, sequences)
        out = query.new_empty(query.shape)
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
        options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
        for q, k, whole in self._each(sequences):
            parts = (tensor.transpose(0, 1) for tensor in (query[q], key[k], value[k]))
            part, lse[:, q] = EagerKernel().forward(*parts, whole, **options)
            out[q] = part.transpose(0, 1)
        return out, lse

    def _backward_call(self, grad_out, query, key, value, out, lse, sequences, causal, scale, window, softcap):
        self._check(query, key, value, sequences, grad_out, out)
        assert lse.is_contiguous() and lse.shape == (query.shape[1], query.shape[0])
        grads = [torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (query, key, value)]
        options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap}
        for q, k, whole in self._each(sequences):
            parts = (x.transpose(0, 1) for x in (grad_out[q], query[q], key[k], value[k], out[q]))
            dq, dk, dv = (grad[rows].transpose(0, 1) for grad, rows in zip(grads, (q, k, k)))
            gradients = {"grad_query": dq, "grad_key": dk, "grad_value": dv}
            EagerKernel().backward(*parts, lse[:, q], whole, **options, **gradients)
        return [grad.to(query.dtype) for grad in grads]


def make(shape, rectangles, dtype=torch.float64, seed=0):
    """query, key, value, grad_out as a model has them: views of (T, H, D)."""
    heads, kv_heads, key_dim, value_dim = shape
    rows = max(r.q_stop for r in rectangles) + 3
    keys = max(r.k_stop for r in rectangles) + 2
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, heads, key_dim), (keys, kv_heads, key_dim), (keys, kv_heads, value_dim), (rows, heads, value_dim)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).transpose(0, 1) for size in sizes]


def run(kernel, inputs, rectangles, whole=None, **options):
    """out, logsumexp, dq, dk, dv; backward from `whole`, a merged out and logsumexp, or from its own."""
    query, key, value, grad_out = inputs
    out, lse = kernel.forward(query, key, value, rectangles, scale=SCALE, **options)
    if whole is None:
        index = torch.cat([torch.arange(r.q_start, r.q_stop) for r in rectangles])
        whole = out.new_zeros(grad_out.shape).index_copy_(1, index, out), lse.new_zeros(query.shape[:2])
        whole[1].index_copy_(1, index, lse)
    # The kernel adds: from 1, not from 0.
    grads = [torch.ones(tensor.shape, dtype=lse.dtype) for tensor in (query, key, value)]
    gradients = dict(zip(("grad_query", "grad_key", "grad_value"), grads))
    kernel.backward(grad_out, query, key, value, *whole, rectangles, scale=SCALE, **options, **gradients)
    return out, lse, *(grad - 1 for grad in grads)


def textbook(inputs, rectangles, causal, window=None, softcap=None):
    """out, logsumexp, dq, dk, dv by autograd over one dense mask a rectangle."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in inputs[:3])
    groups = query.shape[0] // key.shape[0]
    outs, lses, loss = [], [], 0.0
    for q_start, q_stop, k_start, k_stop in rectangles:
        k, v = (tensor[:, k_start:k_stop].repeat_interleave(groups, 0) for tensor in (key, value))
        scores = query[:, q_start:q_stop] @ k.mT * SCALE
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            last = torch.arange(q_stop - q_start)[:, None] + (k_stop - k_start) - (q_stop - q_start)
            distance = last - torch.arange(k_stop - k_start)
            scores = scores.masked_fill((distance < 0) | (distance >= (window or 10**9)), -torch.inf)
        outs.append(scores.softmax(-1) @ v)
        lses.append(scores.logsumexp(-1))
        loss = loss + (outs[-1] * inputs[3][:, q_start:q_stop]).sum()
    loss.backward()
    return torch.cat(outs, 1).detach(), torch.cat(lses, 1).detach(), query.grad, key.grad, value.grad


def difference(ours, reference):
    return max(float((a - b).abs().max()) for a, b in zip(ours, reference))


KERNELS = {
    "cpu_flash": CPUFlashKernel,
    "cpu_flash in small blocks": SmallBlocks,
    "eager": EagerKernel,
    "varlen": EmulatedVarlen,
}
CAUSAL = {
    "squares": [Rectangle(0, 3, 0, 3), Rectangle(3, 14, 3, 14), Rectangle(14, 120, 14, 120)],
    "one square": [Rectangle(0, 50, 0, 50)],
    "squares with gaps": [Rectangle(1, 12, 2, 13), Rectangle(20, 90, 30, 100)],
    "bands": [Rectangle(0, 60, 0, 90), Rectangle(70, 75, 100, 180), Rectangle(75, 76, 180, 181)],
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


FULL = {
    "one": [Rectangle(0, 40, 0, 33)],
    "disjoint keys": [Rectangle(0, 9, 0, 4), Rectangle(9, 10, 4, 60), Rectangle(10, 50, 60, 61)],
    "prefixes of one document": [Rectangle(2, 9, 0, 4), Rectangle(9, 20, 0, 30), Rectangle(25, 26, 0, 41)],
    "prefixes of two": [
        *(Rectangle(0, 4, 3, 8), Rectangle(4, 9, 3, 20)),
        *(Rectangle(12, 13, 20, 21), Rectangle(13, 30, 20, 50), Rectangle(30, 33, 20, 60)),
    ],
}


@pytest.mark.parametrize("rectangles", FULL.values(), ids=FULL)
@pytest.mark.parametrize("kernel", KERNELS)
def test_full_rectangles_are_exact(kernel, rectangles):
    for shape in SHAPES:
        inputs = make(shape, rectangles)
        reference = textbook(inputs, rectangles, causal=False)
        assert difference(run(KERNELS[kernel](), inputs, rectangles, causal=False), reference) < FP64, shape


@pytest.mark.parametrize("threads, fold", [(1, 6), (2, 6), (3, 3), (4, 3), (5, 2), (7, 1), (40, 1)])
def test_every_thread_has_a_head_to_itself(threads, fold):
    """12 heads, 2 KV heads: as many of a group's six share rows as leave a head for each thread."""
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
def test_parts_merged_by_logsumexp_are_the_whole(kernel):
    """Keys in two calls, forward and backward, equal to one call: what an exchange in stages relies on."""
    inputs = query, key, value, grad_out = make((8, 2, 8, 8), [Rectangle(0, 70, 0, 90)])
    whole = textbook([query[:, :70], key, value, grad_out[:, :70]], [Rectangle(0, 70, 0, 90)], causal=False)
    parts = [[Rectangle(0, 70, 0, 37)], [Rectangle(0, 70, 37, 90)]]
    (out, lse), (other, other_lse) = (
        KERNELS[kernel]().forward(query, key, value, part, causal=False, scale=SCALE) for part in parts
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
    for kernel in (SmallBlocks(), EmulatedVarlen()):
        assert difference(run(kernel, inputs, rectangles, causal=False), reference) < FP64


def test_rounds_are_as_few_as_overlapping_keys_need():
    device = torch.device("cpu")
    rounds = varlen._rounds(tuple(FULL["prefixes of two"]), device)
    assert [(r.sequences.max_q, r.sequences.max_k) for r in rounds] == [(4, 5), (17, 30), (3, 40)]
    assert [r.sequences.cu_seqlens_k.tolist() for r in rounds] == [[0, 5, 6], [0, 17, 47], [0, 40]]
    assert len(varlen._rounds(tuple(FULL["disjoint keys"]), device)) == 1


def test_rows_without_gaps_are_not_copied_and_rounds_are_built_once():
    documents = tuple(CAUSAL["squares"])
    (only,) = varlen._rounds(documents, torch.device("cpu"))
    assert (only.q_rows, only.k_rows, only.out_rows) == (slice(0, 120),) * 3
    equal = tuple(Rectangle(*rectangle) for rectangle in documents)
    assert varlen._rounds(equal, torch.device("cpu")) is varlen._rounds(documents, torch.device("cpu"))
    kernel = EmulatedVarlen()
    run(kernel, make((4, 2, 8, 8), documents), documents, causal=True)
    assert kernel.calls == [3, 3]  # one call each way, of three sequences


def relative_errors(ours, reference):
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, reference)]


@pytest.mark.parametrize("shape", [(4, 1, 64, 64), (2, 2, 32, 32), (4, 2, 32, 32), (8, 1, 32, 32)])
@pytest.mark.parametrize(
    "rows, keys, causal, window", [(700, 700, True, None), (900, 900, True, 300), (300, 600, False, None)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_no_worse_than_one_plain_call(shape, rows, keys, causal, window, dtype):
    """Relative error against fp64 of out, dq, dk, dv: at most 1.25 times that of PyTorch's sdpa in one call; without a
    window, where that does not put a mask of its own on every key, 1.05 times."""
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
    """Keys in 1 to 16 calls, outputs merged in fp32 and gradients summed there: relative error against fp64."""
    keys, kernel = 1024, CPUFlashKernel()
    query, key, value, grad_out = make((4, 1, 32, 32), [Rectangle(0, 256, 0, keys)], torch.bfloat16)
    inputs = query[:, :256], key[:, :keys], value[:, :keys], grad_out[:, :256]
    out, _, *grads = textbook([tensor.double() for tensor in inputs], [Rectangle(0, 256, 0, keys)], causal=False)
    errors = {}
    for count in (1, 2, 4, 8, 16):
        size = keys // count
        parts = [(Rectangle(0, 256, start, start + size),) for start in range(0, keys, size)]
        results = [kernel.forward(*inputs[:3], part, causal=False, scale=SCALE) for part in parts]
        lse = torch.stack([part_lse for _, part_lse in results]).logsumexp(0)
        merged = sum(part.float() * (part_lse - lse).exp()[..., None] for part, part_lse in results)
        whole = merged.to(torch.bfloat16), lse
        sums = [run(kernel, inputs, part, whole, causal=False)[2:] for part in parts]
        errors[count] = relative_errors([merged, *(sum(each) for each in zip(*sums))], [out, *grads])
    for error in errors.values():
        assert all(part <= 1.05 * one for part, one in zip(error, errors[1])), errors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", ["cpu_flash", "eager", "varlen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_bitwise_equal(kernel, dtype, threads):
    torch.set_num_threads(threads)
    for rectangles, causal in ((CAUSAL["squares"], True), (FULL["prefixes of two"], False)):
        inputs = make((8, 2, 16, 16), rectangles, dtype)
        first, second = (run(KERNELS[kernel](), inputs, rectangles, causal=causal) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_outputs_have_the_stated_dtypes():
    rectangles = CAUSAL["squares"]
    for kernel in KERNELS.values():
        out, lse, *_ = run(kernel(), make((4, 2, 8, 8), rectangles, torch.bfloat16), rectangles, causal=True)
        assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


CHOICES = [
    # device, dtype, head dims, softcap -> kernel, and the reason against one
    ("cpu", torch.bfloat16, (64, 64), None, "cpu_flash", ("torch_flash", "runs on CUDA only")),
    ("cpu", torch.float64, (192, 128), None, "cpu_flash", None),
    ("cpu", torch.float32, (64, 64), 50.0, "eager", ("cpu_flash", "has no softcap")),
    ("cuda", torch.bfloat16, (128, 128), None, "torch_flash", ("cpu_flash", "runs on CPU only")),
    ("cuda", torch.bfloat16, (192, 128), None, "torch_flash", None),
    ("cuda", torch.bfloat16, (128, 128), 30.0, "eager", ("torch_flash", "has no softcap")),
    ("cuda", torch.bfloat16, (512, 512), None, "eager", ("torch_flash", "takes heads up to 256 wide, not 512")),
    ("cuda", torch.float32, (64, 64), None, "eager", ("torch_flash", "takes float16, bfloat16, not float32")),
    ("mps", torch.float32, (64, 64), None, "eager", None),
]


@pytest.mark.parametrize("device, dtype, dims, softcap, name, against", CHOICES)
def test_the_table_chooses_and_says_why(monkeypatch, device, dtype, dims, softcap, name, against):
    monkeypatch.setattr(capabilities, "_installed_flash_attn", lambda: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    known = {"dtype": dtype, "key_dim": dims[0], "value_dim": dims[1]}
    assert select_kernel(torch.device(device), softcap, **known).name == name
    reasons = dict(explain_kernels(device, softcap, **known))
    assert reasons[name] is None and list(reasons) == list(CAPABILITIES)
    if against:
        assert reasons[against[0]] == against[1]


@pytest.mark.parametrize(
    "installed, chosen", [("2.8.3", "flash_attn_2"), ("2.6.3", "torch_flash"), ("3.0.0b1", "torch_flash")]
)
def test_flash_attn_is_preferred_where_it_is_installed(monkeypatch, installed, chosen):
    monkeypatch.setattr(capabilities, "_installed_flash_attn", lambda: installed)
    assert select_kernel(torch.device("cuda"), dtype=torch.bfloat16, key_dim=128).name == chosen
    if chosen == "flash_attn_2":
        assert select_kernel(torch.device("cuda"), 30.0, dtype=torch.bfloat16).name == chosen
    else:
        assert installed in dict(explain_kernels("cuda"))["flash_attn_2"]


def test_flash_attention_3_and_4_go_before_where_they_are_activated(monkeypatch):
    monkeypatch.setattr(capabilities, "_installed_flash_attn", lambda: "2.8.3")
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4", raising=False)
    assert select_kernel(torch.device("cuda"), dtype=torch.bfloat16).name == "torch_flash"


def test_where_no_kernel_can_run_the_error_says_so():
    with pytest.raises(FlashCPError, match="No attention kernel of flashcp.*float8_e4m3fn.*bfloat16"):
        select_kernel(torch.device("cpu"), dtype=torch.float8_e4m3fn)


def test_kernels_that_no_gpu_has_run_are_experimental():
    statuses = {name: capability.status for name, capability in CAPABILITIES.items()}
    assert statuses == {
        "cpu_flash": TESTED,
        "flash_attn_2": EXPERIMENTAL,
        "torch_flash": EXPERIMENTAL,
        "eager": TESTED,
    }


def test_kernels_are_made_deterministic_on_request():
    chosen = {
        flag: select_kernel(torch.device("cuda"), dtype=torch.bfloat16, deterministic=flag) for flag in (False, True)
    }
    assert [kernel.deterministic for kernel in chosen.values()] == [False, True]
    assert chosen[True] is select_kernel(torch.device("cuda"), dtype=torch.bfloat16, deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert select_kernel(torch.device("cuda"), dtype=torch.bfloat16) is chosen[True]
    finally:
        torch.use_deterministic_algorithms(False)


def test_pytorchs_flash_is_called_as_its_schema_says(monkeypatch):
    """On the meta device: shapes, arguments and their order, forward and backward; nothing is computed."""
    for rectangles, causal, window in (
        (CAUSAL["squares"], True, None),
        (CAUSAL["bands"], True, 5),
        (FULL["one"], False, None),
    ):
        inputs = [x.to("meta") for x in make((4, 2, 12, 8), rectangles, torch.bfloat16)]
        out, lse = TorchFlashKernel().forward(*inputs[:3], rectangles, causal=causal, scale=SCALE, window=window)
        rows = sum(r.q_stop - r.q_start for r in rectangles)
        assert out.shape == (4, rows, 8) and lse.shape == (4, rows) and lse.dtype == torch.float32
        query, key, value, grad_out = inputs
        grads = [torch.zeros(x.shape, device="meta") for x in (query, key, value)]
        TorchFlashKernel(deterministic=True).backward(
            grad_out,
            query,
            key,
            value,
            torch.empty_like(grad_out),
            torch.empty(query.shape[:2], device="meta"),
            rectangles,
            causal=causal,
            scale=SCALE,
            window=window,
            **dict(zip(("grad_query", "grad_key", "grad_value"), grads)),
        )
    assert not torch.are_deterministic_algorithms_enabled()


def test_flash_attn_is_called_as_its_interface_says(monkeypatch):
    """A stand-in with the signatures of flash-attn 2.7 and 2.8, which computes by the formulas: not the package."""
    import sys
    import types

    emulated, seen = EmulatedVarlen(), []

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
    ):
        assert dropout_p == 0.0 and window_size_right == (0 if causal else -1)
        sequences = varlen.Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = None if window_size_left < 0 else window_size_left + 1
        out, lse = emulated._forward_call(q, k, v, sequences, causal, softmax_scale, window, softcap or None)
        return out, lse, None, torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        zero_tensors=False,
    ):
        seen.append(deterministic)
        sequences = varlen.Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = None if window_size_left < 0 else window_size_left + 1
        arguments = (dout, q, k, v, out, softmax_lse, sequences, causal, softmax_scale, window, softcap or None)
        for buffer, grad in zip((dq, dk, dv), emulated._backward_call(*arguments)):
            buffer.copy_(grad)

    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    for rectangles, options in (
        (CAUSAL["squares"], {"causal": True, "softcap": 2.0}),
        (CAUSAL["bands"], {"causal": True, "window": 5}),
        (FULL["prefixes of two"], {"causal": False}),
    ):
        inputs = make((4, 2, 12, 8), rectangles)
        ours = run(FlashAttn2Kernel(deterministic=True), inputs, rectangles, **options)
        assert difference(ours, textbook(inputs, rectangles, **options)) < FP64
    assert set(seen) == {True}
