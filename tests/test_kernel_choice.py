"""Which kernel runs a layer, and that the vendors' kernels are called as their interfaces say."""

import sys
import types

import pytest
import torch

from hf_flashcp.attention.kernels import (
    CAPABILITIES,
    EXPERIMENTAL,
    TESTED,
    FlashAttn2Kernel,
    TorchFlashKernel,
    capabilities,
    explain_kernels,
    select_kernel,
    varlen,
)
from hf_flashcp.errors import FlashCPError
from tests.kernel_cases import CAUSAL, FP64, FULL, SCALE, EmulatedVarlen, difference, make, run, textbook


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


def test_a_gpu_without_a_fused_kernel_is_told_once(caplog):
    capabilities._say_why_slow.cache_clear()
    for _ in range(3):
        assert select_kernel(torch.device("cuda"), dtype=torch.float64, key_dim=64, value_dim=64).name == "eager"
        select_kernel(torch.device("cpu"), 30.0)
    (message,) = caplog.messages
    assert "slow and memory hungry: cpu_flash runs on CPU only; flash_attn_2" in message
    assert "torch_flash takes float16, bfloat16, not float64" in message


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


def test_pytorchs_flash_is_called_as_its_schema_says():
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


@pytest.mark.devices("cpu", "cuda")
def test_flash_attn_is_called_as_its_interface_says(monkeypatch):
    """A stand-in with the signatures of flash-attn 2.7 and 2.8, which computes by the formulas: not the package."""
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
