"""The choice of the kernel for a layer, and the reasons against the others. tests/test_vendor_kernels.py tests the
calls."""

import pytest
import torch

from hf_flashcp import attach
from hf_flashcp.attention.kernels import (
    CAPABILITIES,
    EXPERIMENTAL,
    TESTED,
    capabilities,
    explain_kernels,
    load_kernel_library,
    select_kernel,
)
from hf_flashcp.errors import ConfigurationError, FlashCPError
from tests import vendor_kernels
from tests.determinism_cases import deterministic_algorithms
from tests.models import build_model


CHOICES = [
    # device, dtype, head dims, softcap -> chosen kernel, and the reason against another one
    ("cpu", torch.bfloat16, (64, 64), None, "cpu_flash", ("torch_flash", "runs on CUDA only")),
    ("cpu", torch.float64, (192, 128), None, "cpu_flash", None),
    ("cpu", torch.float32, (64, 64), 50.0, "eager", ("cpu_flash", "does not support softcap")),
    ("cuda", torch.bfloat16, (128, 128), None, "torch_flash", ("cpu_flash", "runs on CPU only")),
    ("cuda", torch.bfloat16, (192, 128), None, "torch_flash", None),
    ("cuda", torch.bfloat16, (128, 128), 30.0, "eager", ("torch_flash", "does not support softcap")),
    ("cuda", torch.bfloat16, (512, 512), None, "eager", ("torch_flash", "takes heads up to 256 wide, not 512")),
    ("cuda", torch.float32, (64, 64), None, "eager", ("torch_flash", "takes float16, bfloat16, not float32")),
    ("mps", torch.float32, (64, 64), None, "eager", None),
]


@pytest.mark.parametrize("device, dtype, dims, softcap, name, against", CHOICES)
def test_the_chosen_kernel_and_the_reasons_against_others(monkeypatch, device, dtype, dims, softcap, name, against):
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
def test_flash_attn_is_preferred_if_installed(monkeypatch, installed, chosen):
    monkeypatch.setattr(capabilities, "_installed_flash_attn", lambda: installed)
    assert select_kernel(torch.device("cuda"), dtype=torch.bfloat16, key_dim=128).name == chosen
    if chosen == "flash_attn_2":
        assert select_kernel(torch.device("cuda"), 30.0, dtype=torch.bfloat16).name == chosen
    else:
        assert installed in dict(explain_kernels("cuda"))["flash_attn_2"]


def gpu(monkeypatch, *capability):
    """Let PyTorch report a GPU with this compute capability."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)


def activate(monkeypatch, name):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: name, raising=False)


def chosen(**known):
    return select_kernel(torch.device("cuda"), **{"dtype": torch.bfloat16, "key_dim": 128, "value_dim": 128, **known})


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3)])
def test_flash_attention_4_is_called_directly_if_activated(monkeypatch, capability):
    """It is never called through PyTorch's operators, which it has replaced."""
    gpu(monkeypatch, *capability)
    assert chosen().name == "torch_flash"
    activate(monkeypatch, "FA4")
    assert chosen().name == "flash_attn_4"
    assert dict(explain_kernels("cuda"))["torch_flash"] == "is replaced by FA4, which was activated in PyTorch"


@pytest.mark.parametrize("capability, limit", [((9, 0), 256), ((10, 0), 128)])
def test_flash_attention_4_takes_wider_heads_on_hopper(monkeypatch, capability, limit):
    gpu(monkeypatch, *capability)
    activate(monkeypatch, "FA4")
    assert chosen(key_dim=limit, value_dim=limit).name == "flash_attn_4"
    reasons = dict(explain_kernels("cuda", dtype=torch.bfloat16, key_dim=264, value_dim=limit))
    assert reasons["flash_attn_4"] == f"takes heads up to {limit} wide, not 264"


def test_flash_attention_3_runs_if_its_operators_are_registered(monkeypatch):
    gpu(monkeypatch, 9, 0)
    monkeypatch.setattr(capabilities, "_installed_flash_attn", lambda: "2.8.3")
    assert chosen().name == "flash_attn_2"
    with vendor_kernels.flash_attn_3():
        assert chosen().name == "flash_attn_3"
        assert select_kernel(torch.device("cuda"), 30.0, dtype=torch.bfloat16).name == "flash_attn_2"
    assert "needs its library" in dict(explain_kernels("cuda"))["flash_attn_3"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_flash_attention_3_needs_a_hopper_gpu(monkeypatch, capability):
    gpu(monkeypatch, *capability)
    with vendor_kernels.flash_attn_3():
        assert chosen().name == "torch_flash"
        said = "needs a GPU of compute capability 9.x (Hopper); this one has {}.{}".format(*capability)
        assert dict(explain_kernels("cuda"))["flash_attn_3"] == said


@pytest.mark.parametrize("name, capability", [("FA3", (8, 0)), ("FA3", (10, 0)), ("FA4", (8, 0)), ("FA4", (12, 0))])
def test_an_activated_kernel_that_cannot_run_is_an_error(monkeypatch, name, capability):
    """There is no silent fallback to the formulas, because PyTorch's own kernel has been replaced."""
    gpu(monkeypatch, *capability)
    activate(monkeypatch, name)
    said = f"{name} was activated in PyTorch, but it needs a GPU of .*this one has {capability[0]}"
    with vendor_kernels.flash_attn_3():
        with pytest.raises(ConfigurationError, match=said):
            chosen()
        with pytest.raises(ConfigurationError, match=said):
            attach(build_model("llama"), None)
        assert select_kernel(torch.device("cpu"), dtype=torch.bfloat16).name == "cpu_flash"


@pytest.mark.parametrize("key_dim, value_dim", [(128, 128), (192, 128), (192, 192), (256, 256), (64, 224)])
def test_flash_attention_3_is_not_deterministic_for_the_widest_heads(monkeypatch, key_dim, value_dim):
    gpu(monkeypatch, 9, 0)
    wide = max(key_dim, value_dim) > 192
    known = {"key_dim": key_dim, "value_dim": value_dim}
    with vendor_kernels.flash_attn_3():
        assert chosen(**known).name == "flash_attn_3"
        with deterministic_algorithms():
            assert chosen(**known).name == ("torch_flash" if wide else "flash_attn_3")
        if wide:
            reason = dict(explain_kernels("cuda", **known, deterministic=True))["flash_attn_3"]
            assert reason == f"has deterministic gradients for heads up to 192 wide, not {max(key_dim, value_dim)}"


def test_kernel_libraries_that_cannot_be_loaded(monkeypatch, tmp_path):
    with pytest.raises(ConfigurationError, match="missing.so does not exist: pass the path of FlashAttention-3's."):
        load_kernel_library(tmp_path / "missing.so")
    (tmp_path / "_C.so").write_bytes(b"no library")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigurationError, match="needs a PyTorch build with CUDA; this one is"):
        load_kernel_library(tmp_path / "_C.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigurationError, match="cannot be loaded: .*nvidia-cuda-runtime-cu12"):
        load_kernel_library(tmp_path / "_C.so")
    (tmp_path / "_C.so.xz").write_bytes(b"not compressed")
    with pytest.raises(ConfigurationError, match="is not a complete .xz file"):
        load_kernel_library(tmp_path / "_C.so.xz")


def test_the_error_if_no_kernel_can_run():
    with pytest.raises(FlashCPError, match="No attention kernel of flashcp.*float8_e4m3fn.*bfloat16"):
        select_kernel(torch.device("cpu"), dtype=torch.float8_e4m3fn)


def test_a_gpu_without_a_fused_kernel_warns_once(caplog):
    capabilities._say_why_slow.cache_clear()
    for _ in range(3):
        assert select_kernel(torch.device("cuda"), dtype=torch.float64, key_dim=64, value_dim=64).name == "eager"
        select_kernel(torch.device("cpu"), 30.0)
    (message,) = caplog.messages
    assert "exact but slow on a GPU: cpu_flash runs on CPU only; flash_attn_4" in message
    assert "torch_flash takes float16, bfloat16, not float64" in message


def test_kernels_that_no_gpu_has_run_are_experimental():
    statuses = {name: capability.status for name, capability in CAPABILITIES.items()}
    assert statuses == {
        "cpu_flash": TESTED,
        "flash_attn_4": EXPERIMENTAL,
        "flash_attn_3": EXPERIMENTAL,
        "flash_attn_2": EXPERIMENTAL,
        "torch_flash": EXPERIMENTAL,
        "eager": TESTED,
    }


def test_kernels_are_deterministic_if_pytorchs_switch_is_on():
    cuda = torch.device("cuda")
    plain = select_kernel(cuda, dtype=torch.bfloat16)
    with deterministic_algorithms():
        first, second = (select_kernel(cuda, dtype=torch.bfloat16) for _ in range(2))
    assert (plain.deterministic, first.deterministic) == (False, True)
    assert first is second and plain is select_kernel(cuda, dtype=torch.bfloat16)
