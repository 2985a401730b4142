"""The choice of the kernel for a layer, and the reasons against the others. tests/test_vendor_kernels.py tests the
calls."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from hf_flashcp import attach
from hf_flashcp.attention.kernels import (
    CAPABILITIES,
    EXPERIMENTAL,
    TESTED,
    Device,
    Layer,
    capabilities,
    explain_kernels,
    faster_kernels,
    flash_attention_3,
    load_kernel_library,
    require_kernel,
    select_kernel,
    selection,
)
from hf_flashcp.errors import ConfigurationError, FlashCPError
from tests import vendor_kernels
from tests.determinism_cases import deterministic_algorithms
from tests.models import build_model


BF16, CUDA = torch.bfloat16, torch.device("cuda")
LAYER = Layer(BF16, 128, 128)
ALL = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36", "nvidia-cudnn-frontend": "1.18.0"}


def install(monkeypatch, **versions):
    """Let exactly these packages be installed; underscores stand for hyphens."""
    found = {name.replace("_", "-"): version for name, version in versions.items()}
    monkeypatch.setattr(capabilities, "installed_version", found.get)


def gpu(monkeypatch, *capability):
    """Let PyTorch report a GPU with this compute capability, and cuDNN 9.19."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 91900)
    flash_attention_3.load.cache_clear()


def activate(monkeypatch, name):
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: name, raising=False)


def chosen(layer=LAYER, name=None, device=CUDA):
    return select_kernel(device, layer, name).name


CHOICES = [
    # device, layer -> chosen kernel, and the reason against another one
    ("cpu", Layer(BF16, 64, 64), "cpu_flash", None),
    ("cpu", Layer(torch.float64, 192, 128), "cpu_flash", None),
    ("cpu", Layer(torch.float32, 64, 64, softcap=True), "eager", ("cpu_flash", "does not support softcap")),
    ("cuda", LAYER, "torch_flash", ("cpu_flash", "runs on CPU only")),
    ("cuda", Layer(BF16, 192, 128), "torch_flash", None),
    ("cuda", Layer(BF16, 128, 128, softcap=True), "eager", ("torch_flash", "does not support softcap")),
    ("cuda", Layer(BF16, 512, 512), "eager", ("torch_flash", "takes heads up to 256 wide, not 512")),
    (
        "cuda",
        Layer(torch.float32, 64, 64),
        "eager",
        ("torch_flash", "takes float16, bfloat16, not float32"),
    ),
    ("mps", Layer(torch.float32, 64, 64), "eager", ("torch_flash", "runs on CUDA only")),
]


@pytest.mark.parametrize("device, layer, name, against", CHOICES)
def test_the_chosen_kernel_and_the_reasons_against_others(monkeypatch, device, layer, name, against):
    install(monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen(layer, device=torch.device(device)) == name
    reasons = explain_kernels(Device(device), layer)
    assert reasons[name] is None and set(reasons) == set(CAPABILITIES)
    if against:
        assert reasons[against[0]] == against[1]


RULE = {
    # compute capability: kernels in order of speed; those of other generations cannot run
    (8, 0): ["flash_attn_2", "torch_flash"],
    (8, 9): ["flash_attn_2", "torch_flash"],
    (9, 0): ["flash_attn_3", "cudnn", "flash_attn_4", "flash_attn_2", "torch_flash"],
    (10, 0): ["flash_attn_4", "cudnn", "flash_attn_2", "torch_flash"],
    (10, 3): ["flash_attn_4", "cudnn", "flash_attn_2", "torch_flash"],
    (12, 0): ["flash_attn_2", "torch_flash"],
}
PACKAGES = {"flash_attn_2": "flash-attn", "flash_attn_4": "flash-attn-4", "cudnn": "nvidia-cudnn-frontend"}


@pytest.mark.parametrize("capability", RULE)
def test_the_fastest_installed_kernel_is_chosen_whatever_is_installed(monkeypatch, capability):
    """Every set of installed packages; the faster kernels that are missing are named."""
    gpu(monkeypatch, *capability)
    order = RULE[capability]
    for present in itertools.product([False, True], repeat=len(order) - 1):
        found = [name for name, there in zip(order, (*present, True)) if there]
        monkeypatch.setattr(
            flash_attention_3, "load", lambda found=found: None if "flash_attn_3" in found else "is not there"
        )
        versions = {PACKAGES[name]: ALL[PACKAGES[name]] for name in found if name in PACKAGES}
        monkeypatch.setattr(capabilities, "installed_version", versions.get)
        assert chosen() == found[0], found
        here = Device("cuda", capability)
        assert faster_kernels(here, LAYER) == order[: order.index(found[0])]
        assert [name for name, reason in explain_kernels(here, LAYER).items() if reason is None] == [*found, "eager"]


LIMITS = [
    # kernel, compute capability, layer, what must be said, or None if the kernel runs the layer
    ("flash_attn_4", (9, 0), Layer(BF16, 256, 256, window=True, softcap=True), None),
    ("flash_attn_4", (9, 0), Layer(BF16, 264, 128), "takes heads up to 256 wide, not 264"),
    ("flash_attn_4", (10, 0), Layer(BF16, 128, 128, window=True, softcap=True, deterministic=True), None),
    ("flash_attn_4", (10, 0), Layer(BF16, 192, 128, window=True), None),
    ("flash_attn_4", (10, 0), Layer(BF16, 256, 256), None),
    (
        "flash_attn_4",
        (10, 0),
        Layer(BF16, 256, 256, window=True),
        "supports sliding windows on Blackwell for heads up to 128 wide, not 256",
    ),
    (
        "flash_attn_4",
        (10, 0),
        Layer(BF16, 192, 192, softcap=True),
        "supports softcap on Blackwell for heads up to 128 wide, not 192",
    ),
    (
        "flash_attn_4",
        (8, 0),
        LAYER,
        "needs a GPU of compute capability 9.x (Hopper) or 10.x (Blackwell); this one has 8.0",
    ),
    ("flash_attn_3", (9, 0), Layer(BF16, 256, 256, window=True, softcap=True), None),
    ("flash_attn_3", (9, 0), Layer(BF16, 192, 128, deterministic=True), None),
    (
        "flash_attn_3",
        (9, 0),
        Layer(BF16, 64, 224, deterministic=True),
        "has deterministic gradients for heads up to 192 wide, not 224",
    ),
    ("flash_attn_3", (10, 0), LAYER, "needs a GPU of compute capability 9.x (Hopper); this one has 10.0"),
    ("cudnn", (9, 0), Layer(torch.float16, 256, 256, window=True), None),
    ("cudnn", (9, 0), Layer(BF16, 128, 128, softcap=True), "does not support softcap"),
    (
        "cudnn",
        (9, 0),
        Layer(BF16, 128, 128, deterministic=True),
        "has no deterministic gradients whose memory does not grow with the square of the sequence",
    ),
    ("cudnn", (10, 0), Layer(BF16, 192, 128, deterministic=True), None),
    ("cudnn", (10, 0), Layer(BF16, 256, 256), "takes heads up to 128 wide, not 256"),
    ("flash_attn_2", (12, 0), Layer(BF16, 256, 256, window=True, softcap=True, deterministic=True), None),
    (
        "torch_flash",
        (7, 5),
        LAYER,
        "needs a GPU of compute capability 8.x (Ampere) or 9.x (Hopper) or 10.x (Blackwell) or 12.x (Blackwell for "
        "workstations); this one has 7.5",
    ),
]


@pytest.mark.parametrize("name, capability, layer, said", LIMITS)
def test_the_limits_of_each_kernel(name, capability, layer, said):
    assert CAPABILITIES[name].reason_against(Device("cuda", capability), layer) == said


@pytest.mark.parametrize(
    "installed, expected", [("2.8.3", "flash_attn_2"), ("2.6.3", "torch_flash"), ("3.0.0b1", "torch_flash")]
)
def test_flash_attn_is_preferred_if_its_version_fits(monkeypatch, installed, expected):
    install(monkeypatch, flash_attn=installed)
    assert chosen() == expected
    if expected == "torch_flash":
        assert explain_kernels(Device("cuda"))["flash_attn_2"] == (
            f"needs flash-attn 2.7 or a later 2.x, not {installed}"
        )


def test_cudnn_must_be_recent_enough(monkeypatch):
    install(monkeypatch, nvidia_cudnn_frontend="1.18.0")
    gpu(monkeypatch, 9, 0)
    assert chosen() == "cudnn"
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 90501)
    assert chosen() == "torch_flash"
    assert explain_kernels(Device.here("cuda"))["cudnn"] == "needs cuDNN 9.10.2 or later, not 90501"


# FlashAttention-3 comes from one of several packages


def test_flash_attention_3_is_used_as_soon_as_its_operators_are_registered(monkeypatch):
    install(monkeypatch, flash_attn="2.8.3")
    gpu(monkeypatch, 9, 0)
    assert chosen() == "flash_attn_2"
    with vendor_kernels.flash_attn_3():
        assert chosen() == chosen(LAYER._replace(softcap=True)) == "flash_attn_3"
    assert "needs its library" in explain_kernels(Device.here("cuda"))["flash_attn_3"]


def test_flash_attention_3_is_loaded_from_the_cache_of_the_hub(monkeypatch):
    install(monkeypatch)
    gpu(monkeypatch, 9, 0)
    with vendor_kernels.flash_attn_3_from_the_hub() as vendor:
        assert chosen() == "flash_attn_3" and not vendor.downloads
    flash_attention_3.load.cache_clear()
    with vendor_kernels.flash_attn_3_from_the_hub(cached=False) as vendor:
        assert chosen() == "torch_flash" and not vendor.downloads
        reason = explain_kernels(Device.here("cuda"))["flash_attn_3"]
        assert reason == "needs its library, which kernels does not load: no cached kernel"
        assert chosen(name="flash_attn_3") == "flash_attn_3" and vendor.downloads == 1
        assert chosen() == "flash_attn_3", "it stays registered"


def test_an_installed_flash_attention_3_is_imported_on_hopper_only(monkeypatch):
    install(monkeypatch)
    imported = []
    monkeypatch.setattr(flash_attention_3, "find_spec", lambda name: name == "flash_attn_3" or None)
    monkeypatch.setattr(flash_attention_3, "_import", lambda: imported.append(1))
    for capability in ((8, 0), (10, 0)):
        gpu(monkeypatch, *capability)
        assert chosen() == "torch_flash" and not imported
    gpu(monkeypatch, 9, 0)
    assert chosen() == "torch_flash" and imported == [1], "it registers nothing here"


def test_an_installed_flash_attention_3_counts_for_a_stated_gpu(monkeypatch):
    """The machine that asks has no such GPU, but training may run on another one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    install(monkeypatch)
    assert "not installed here" in explain_kernels(Device.named("h100"))["flash_attn_3"]
    install(monkeypatch, flash_attn_3="3.0.0")
    assert explain_kernels(Device.named("h100"))["flash_attn_3"] is None


@pytest.mark.parametrize("later", [False, True])
def test_old_versions_of_flash_attention_3_ignore_that_gradients_must_be_deterministic(monkeypatch, later):
    install(monkeypatch)
    gpu(monkeypatch, 9, 0)
    schema = vendor_kernels.FA3_LATER_BACKWARD if later else vendor_kernels.FA3_BACKWARD
    with vendor_kernels.flash_attn_3(schema=schema):
        assert chosen() == "flash_attn_3"
        with deterministic_algorithms():
            assert chosen() == ("flash_attn_3" if later else "torch_flash")
            assert chosen(Layer(BF16, 256, 256)) == "torch_flash"
        reason = explain_kernels(Device.here("cuda"), LAYER._replace(deterministic=True))["flash_attn_3"]
        said = "has no deterministic gradients in this version; they need a version after 2.8.3"
        assert reason == (None if later else said)


# What the user asks for


def test_a_kernel_that_the_user_asks_for_is_used_or_refused_with_the_reason(monkeypatch):
    install(monkeypatch, nvidia_cudnn_frontend="1.18.0")
    gpu(monkeypatch, 9, 0)
    assert chosen() == "cudnn" and chosen(name="torch_flash") == "torch_flash" and chosen(name="eager") == "eager"
    refusals = {
        "flash_attn_2": "needs the package flash-attn, which is not installed here. Install it (pip install flash-attn"
        " --no-build-isolation), or leave kernel out",
        "cpu_flash": "runs on CPU only. Leave kernel out to use the fastest kernel that can run",
    }
    for name, said in refusals.items():
        with pytest.raises(ConfigurationError) as error:
            chosen(name=name)
        assert str(error.value) == f'FlashCPPlugin has kernel="{name}", but {name} {said}.'
    with pytest.raises(ConfigurationError, match="There is no kernel 'fa3'. Choose one of cpu_flash, flash_attn_4"):
        require_kernel("fa3", Device("cuda"))
    with pytest.raises(ConfigurationError, match="There is no kernel \\['cudnn'\\]"):
        require_kernel(["cudnn"], Device("cuda"))


def test_unknown_gpus_are_refused_by_name():
    assert Device.named("H100") == ("cuda", (9, 0))
    with pytest.raises(ConfigurationError, match="The GPU 'h1000' is unknown. Choose one of a100, l40s, h100"):
        Device.named("h1000")


# PyTorch's switch


@pytest.mark.parametrize(
    "name, capability, kernel", [("FA3", (9, 0), "flash_attn_3"), ("FA4", (10, 0), "flash_attn_4")]
)
def test_an_activated_kernel_is_called_directly(monkeypatch, name, capability, kernel):
    """PyTorch's operators, whose implementation has been replaced, are never called."""
    gpu(monkeypatch, *capability)
    install(monkeypatch, flash_attn_4="4.0.0b36")
    activate(monkeypatch, name)
    with vendor_kernels.flash_attn_3():
        assert chosen() == kernel
    reason = explain_kernels(Device.here("cuda"))["torch_flash"]
    assert reason == f"is replaced by {name}, which was activated in PyTorch"


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
        assert chosen(device=torch.device("cpu")) == "cpu_flash"


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
        chosen(Layer(torch.float8_e4m3fn), device=torch.device("cpu"))


def test_a_gpu_without_a_fused_kernel_warns_once(caplog):
    selection._say_why_slow.cache_clear()
    for _ in range(3):
        assert chosen(Layer(torch.float64, 64, 64)) == "eager"
        chosen(Layer(softcap=True), device=torch.device("cpu"))
    (message,) = caplog.messages
    assert "exact but slow on a GPU: cpu_flash runs on CPU only; flash_attn_3" in message
    assert "torch_flash takes float16, bfloat16, not float64" in message


def test_kernels_that_no_gpu_has_run_are_experimental():
    statuses = {name: capability.status for name, capability in CAPABILITIES.items()}
    assert statuses == {
        "cpu_flash": TESTED,
        "flash_attn_4": EXPERIMENTAL,
        "flash_attn_3": EXPERIMENTAL,
        "cudnn": EXPERIMENTAL,
        "flash_attn_2": EXPERIMENTAL,
        "torch_flash": EXPERIMENTAL,
        "eager": TESTED,
    }


def test_kernels_are_deterministic_if_pytorchs_switch_is_on(monkeypatch):
    install(monkeypatch)
    plain = select_kernel(CUDA, LAYER)
    with deterministic_algorithms():
        first, second = (select_kernel(CUDA, LAYER) for _ in range(2))
    assert (plain.deterministic, first.deterministic) == (False, True)
    assert first is second and plain is select_kernel(CUDA, LAYER)


def test_the_page_has_the_order_and_the_status_of_every_kernel():
    page = (Path(__file__).parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    for title, capability in (("Hopper (9.x)", (9, 0)), ("Blackwell (10.x)", (10, 0)), ("Ampere, Ada (8.x)", (8, 0))):
        row = re.search(rf"^\| {re.escape(title)}.*\| (.*) \|$", page, re.MULTILINE)[1]
        usable = [
            name
            for name in selection.kernels_in_order(Device("cuda", capability))
            if CAPABILITIES[name].reason_against(Device("cuda", capability), LAYER) is None
        ]
        assert row == ", ".join(f"`{name}`" for name in usable)
    for name, capability in CAPABILITIES.items():
        status = re.search(rf"^\| `{name}`: .*\| ([^|]*) \|$", page, re.MULTILINE)[1]
        assert status.startswith("tested" if capability.status == TESTED else "experimental"), name
