"""The vendors' kernels are called according to their interfaces, and their results are interpreted correctly."""

import functools
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flashcp.attention.kernels import (
    CudnnKernel,
    EagerKernel,
    FlashAttn2Kernel,
    FlashAttn3Kernel,
    FlashAttn4Kernel,
    TorchFlashKernel,
    varlen,
)
from hf_flashcp.bench.kernels import RankWork
from hf_flashcp.integrations.gradient_check import relative_error
from hf_flashcp.layout import Rectangle
from hf_flashcp.plan import Topology
from hf_flashcp.planning import plan_documents
from tests import attention_cases, cudnn_stand_in, determinism_cases, vendor_cases, vendor_kernels
from tests.fake_cuda import FAKE, fake_cuda, forward_and_backward
from tests.kernel_cases import CAUSAL, FP64, FULL, EmulatedVarlen, difference, make, run, textbook


# The vendor's stand-in, the kernel that calls it, and whether it supports softcap and deterministic gradients.
VENDORS = {
    "PyTorch": (vendor_kernels.torch_flash, TorchFlashKernel, False, True),
    "flash-attn 2": (vendor_kernels.flash_attn_2, FlashAttn2Kernel, True, True),
    "FlashAttention-3": (vendor_kernels.flash_attn_3, FlashAttn3Kernel, True, True),
    "FlashAttention-3 from the hub": (vendor_kernels.flash_attn_3_from_the_hub, FlashAttn3Kernel, True, True),
    **{
        f"flash-attn-4 {version}": (
            functools.partial(vendor_kernels.flash_attn_4, version),
            FlashAttn4Kernel,
            True,
            True,
        )
        for version in vendor_kernels.FA4
    },
    "cuDNN": (cudnn_stand_in.cudnn, CudnnKernel, False, False),
}
CALLS = [
    (CAUSAL["squares"], {"causal": True}),
    (CAUSAL["squares"], {"causal": True, "window": 6}),
    (CAUSAL["bands"], {"causal": True, "window": 1}),
    (CAUSAL["bands"], {"causal": True}),
    (FULL["disjoint keys"], {"causal": False}),
    (FULL["prefixes of two"], {"causal": False}),
    ([Rectangle(2, 9, 0, 40), Rectangle(9, 20, 40, 80)], {"causal": False}),  # more than twice as many keys
]
SOFTCAPS = [
    (CAUSAL["squares"], {"causal": True, "softcap": 2.0}),
    (FULL["disjoint keys"], {"causal": False, "softcap": 2.0}),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", VENDORS)
def test_calls_fit_the_vendors_interface_and_results_are_exact(name, deterministic):
    stand_in, kernel, softcap, repeats = VENDORS[name]
    if deterministic and not repeats:
        pytest.skip("has no deterministic gradients")
    calls = CALLS + SOFTCAPS * softcap
    with stand_in() as vendor:
        for rectangles, options in calls:
            for shape in ((4, 2, 12, 8), (3, 3, 8, 8), (6, 2, 8, 20)):
                inputs = make(shape, rectangles)
                ours = run(kernel(deterministic=deterministic), inputs, rectangles, **options)
                assert difference(ours, textbook(inputs, rectangles, **options)) < FP64, (options, shape)
    assert vendor.forwards == vendor.backwards >= 3 * len(calls)
    assert vendor.deterministic == {deterministic}


@pytest.mark.parametrize("dims, widths", [((96, 80), (96, 96)), ((192, 128), (192, 128)), ((136, 8), (192, 128))])
def test_flash_attention_4_gets_the_widths_that_it_has_on_blackwell(dims, widths):
    rectangles, kernel = CAUSAL["squares"], FlashAttn4Kernel(blackwell=True)
    assert kernel.widths(*dims) == widths and kernel.widths(200, 200) == kernel.widths(192, 192) == (256, 256)
    with vendor_kernels.flash_attn_4(blackwell=True):
        inputs = make((4, 2, *dims), rectangles)
        ours = run(kernel, inputs, rectangles, causal=True, window=6)
        assert difference(ours, textbook(inputs, rectangles, causal=True, window=6)) < 10 * FP64


@pytest.mark.parametrize("cp_size", [2, 3, 4])
@pytest.mark.parametrize("stand_in", vendor_cases.STAND_INS)
def test_layers_over_ranks_are_exact_through_every_vendors_kernel(pool, stand_in, cp_size):
    """Covers stages, nodes, windows, sinks, KV that is fetched again, more keys than queries, and heads whose values
    are not aligned in received rows."""
    stages = [[offset] for offset in range(1, cp_size)]
    packs = ([70, 9, 33], [40] * 7) if cp_size < 4 else ([70, 9, 33],)
    nodes = Topology(2) if cp_size == 4 else None
    todo = [
        attention_cases.Case(plan_documents(lengths, cp_size, strategy=strategy, topology=nodes), shape, **more)
        for lengths in packs
        for strategy in ("per_doc", "search")
        for shape in ((4, 2, 8, 8), (3, 3, 12, 16))
        for more in (
            {},
            {"offset_groups": stages, "keep_received_kv": False},
            {"options": {"window": 9, "sinks": True}},
        )
    ]
    for errors, (forwards, backwards) in pool.run(cp_size, vendor_cases.layer_errors, stand_in, todo):
        for case, error in zip(todo, errors):
            assert max(error) < FP64, (case, error)
        assert backwards >= forwards >= len(todo)


def received_rows(rows, heads, key_dim, value_dim):
    """Return keys and values as received from another rank: contiguous for each token, the keys of all heads first."""
    packed = torch.randn(rows, heads * (key_dim + value_dim), generator=torch.Generator().manual_seed(0))
    keys, values = packed.bfloat16().split([heads * key_dim, heads * value_dim], dim=1)
    return keys.unflatten(1, (heads, key_dim)).transpose(0, 1), values.unflatten(1, (heads, value_dim)).transpose(0, 1)


@pytest.mark.parametrize("kernel", [EmulatedVarlen, FlashAttn2Kernel])
@pytest.mark.parametrize("heads, key_dim, value_dim", [(3, 12, 16), (1, 4, 8), (5, 20, 24), (2, 8, 8), (3, 16, 12)])
def test_inputs_of_kernels_are_aligned(kernel, heads, key_dim, value_dim):
    """Values start after 3 x 12 keys, at byte 72 of a row, which is not aligned to 16 bytes.

    The stand-ins check that.
    """
    key, value = received_rows(20, heads, key_dim, value_dim)
    query, grad_out = (torch.randn(9, heads, width).bfloat16().transpose(0, 1) for width in (key_dim, value_dim))
    inputs, rectangles = (query, key, value, grad_out), [Rectangle(0, 9, 0, 20)]
    with vendor_kernels.flash_attn_2():
        ours = run(kernel(), inputs, rectangles, causal=False)
    expected = run(EagerKernel(), inputs, rectangles, causal=False)
    assert difference(ours, expected) < 2e-2  # rounded to bf16


def test_aligned_rows_are_not_copied():
    key, value = received_rows(20, 2, 16, 16)
    for tensor, given in zip(varlen._rows_first(16, key, value), (key, value)):
        assert tensor.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


@pytest.mark.parametrize("rectangles, options", CALLS, ids=str)
def test_pytorchs_flash_accepts_our_calls(rectangles, options):
    """Its meta kernels check arguments and their order, shapes, dtypes and devices, forward and backward.

    Nothing is computed; tensors are fake CUDA tensors if PyTorch has CUDA. A side without a bound must be `None`: -1
    would be a bound for some implementations of these operators.
    """
    with fake_cuda(), seen_windows() as windows:
        kernel = TorchFlashKernel(deterministic=True)
        out, lse = forward_and_backward(kernel, (4, 2, 12, 8), rectangles, **options)
    rows = sum(r.q_stop - r.q_start for r in rectangles)
    assert out.shape == (4, rows, 8) and out.dtype == torch.bfloat16 and out.device.type == FAKE.type
    assert lse.shape == (4, rows) and lse.dtype == torch.float32
    left = options["window"] - 1 if "window" in options else None
    assert set(windows) == {(left, 0 if options["causal"] else None)}


class seen_windows(TorchDispatchMode):
    """Records the windows with which flash operators are called."""

    def __enter__(self):
        super().__enter__()
        self.found = []
        return self.found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_flash_attention" in func.__name__:
            self.found.append((kwargs.get("window_size_left"), kwargs.get("window_size_right")))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not (torch.version.cuda and find_spec("flash_attn") and find_spec("flash_attn.cute")),
    reason="needs flash-attn-4 and a PyTorch build with CUDA",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (256, 256), (12, 16)])
def test_flash_attention_4_compiles_our_calls_for_hopper(monkeypatch, dims):
    """The real package checks its arguments and compiles forward and backward for fake CUDA tensors, without a GPU."""
    for name, value in (("FLASH_ATTENTION_ARCH", "sm_90"), ("CUTE_DSL_ARCH", "sm_90a")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FLASH_ATTENTION_NUM_SMS", "132")
    for rectangles, options in CALLS[1], CALLS[3], CALLS[4], SOFTCAPS[0]:
        with fake_cuda():
            out, lse = forward_and_backward(FlashAttn4Kernel(), (8, 2, *dims), rectangles, **options)
        rows = sum(r.q_stop - r.q_start for r in rectangles)
        assert out.shape == (8, rows, dims[1]) and lse.shape == (8, rows)


# EagerKernel uses autocast, which does not exist for meta tensors.
@pytest.mark.parametrize("kernel", [TorchFlashKernel, EagerKernel] if torch.version.cuda else [TorchFlashKernel])
@pytest.mark.parametrize("strategy, stages", [("per_doc", 1), ("per_doc", 3), ("search", 1)])
def test_a_ranks_layer_stays_on_its_device(strategy, stages, kernel):
    """Packing, kernels, merges and additions of every rank run on fake CUDA tensors if PyTorch has CUDA.

    Operators would refuse tensors on two devices.
    """
    plan = plan_documents([300, 40, 70, 9, 12, 33], 4, strategy=strategy, num_stages=stages)
    for rank in range(4):
        with fake_cuda():
            RankWork(plan, rank, kernel(), (4, 2, 16), torch.bfloat16, FAKE).engine()


# Deterministic algorithms


def test_a_deterministic_layer_sorts_no_index_and_fills_no_memory(pool):
    """The engine turns PyTorch's switch off for index operators and new tensors in forward and backward.

    That is safe, because rows are distinct and all of them are written. Afterwards the switch is restored.
    """
    names = set()
    for inside, restored in pool.run(
        4, determinism_cases.switches_in_a_layer, plan_documents([40] * 14, 4, strategy="per_doc")
    ):
        names |= {name for name, *_ in inside}
        assert restored == (True, True)
        assert {(on, filled) for _, on, filled in inside} == {(False, False)}
    assert names >= {"index_add_", "index_copy_", "index_select", "new_empty"}


def test_only_pytorchs_flash_backward_sees_the_switch():
    seen = determinism_cases.switches_in_pytorchs_flash()
    assert {name for name, on, filled in seen if on} == {"_flash_attention_backward"}
    assert ("_flash_attention_backward", True, False) in seen


# Grouped queries in backward


FOLDS = {"PyTorch": True, "flash-attn 2": True, "FlashAttention-3": False, "flash-attn-4 4.0.0b36": False}


@pytest.mark.parametrize("name", FOLDS)
def test_kernels_that_expand_gradients_of_keys_fold_query_heads_instead(name):
    """With more than twice as many keys as queries and no mask, backward gets the heads of a group as further rows.

    The keys keep their heads, so that no gradient of theirs is expanded to all query heads. Results are exact.
    """
    stand_in, kernel, *_ = VENDORS[name]
    heads, kv_heads, rows, keys = 6, 2, 18, 40
    few, many = [Rectangle(2, 2 + rows, 0, keys)], [Rectangle(2, 2 + rows, 0, 2 * rows)]  # queries for their keys
    with stand_in() as vendor:
        for rectangles, options in ((few, {"causal": False}), (many, {"causal": False}), (few, {"causal": True})):
            inputs = make((heads, kv_heads, 8, 8), rectangles)
            ours = run(kernel(), inputs, rectangles, **options)
            assert difference(ours, textbook(inputs, rectangles, **options)) < FP64
    folded = (rows * heads // kv_heads, kv_heads, 8) if FOLDS[name] else (rows, heads, 8)
    assert vendor.backward_shapes == [
        (folded, (keys, kv_heads, 8)),
        ((rows, heads, 8), (2 * rows, kv_heads, 8)),
        ((rows, heads, 8), (keys, kv_heads, 8)),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_heads_are_no_less_accurate(dtype):
    """Folded and not, the relative errors of dq, dk and dv against fp64 are the same within 10%."""
    rectangles, shape = [Rectangle(0, 40, 0, 300)], (8, 2, 16, 16)
    inputs = make(shape, rectangles, dtype)
    exact = textbook([tensor.double() for tensor in inputs], rectangles, causal=False)[2:]
    errors = []
    for folds in (True, False):
        kernel = EmulatedVarlen()
        kernel.expands_kv_gradients = folds
        ours = run(kernel, inputs, rectangles, causal=False)[2:]
        errors.append([relative_error(a, b) for a, b in zip(ours, exact)])
    for folded, plain in zip(*errors):
        assert folded < 1.1 * plain
