"""The doctor's table of kernels: which one runs each model's layers on each GPU, and why faster ones do not."""

import json

import pytest
import torch

from hf_flashcp.attention.kernels import EXPERIMENTAL, GPUS, TESTED, Device, capabilities, flash_attention_3
from hf_flashcp.cli import main
from hf_flashcp.doctor.diagnosis import diagnose
from hf_flashcp.doctor.layer_groups import devices_to_report, layer_groups
from hf_flashcp.doctor.tiny import default_config


VERSIONS = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36", "nvidia-cudnn-frontend": "1.15.0"}
ALL, CUDNN, NONE = (*VERSIONS, "flash_attn_3"), ("nvidia-cudnn-frontend",), ()
FLASH_ATTN_3_AND_2 = ("flash_attn_3", "flash-attn")


@pytest.fixture
def install(monkeypatch):
    """Return a function that makes kernels see these packages, and no others, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def install(packages):
        monkeypatch.setattr(
            capabilities, "installed_version", lambda name: VERSIONS[name] if name in packages else None
        )
        operators = object() if "flash_attn_3" in packages else None
        monkeypatch.setattr(flash_attention_3, "operators", lambda: operators)

    return install


FULL, SLIDING = "full", "sliding"
# The kernel of each kind of layer on h100, b200 and a100, by model and packages.
CHOSEN = {
    "llama": {
        ALL: {FULL: "flash_attn_3 flash_attn_4 flash_attn_2"},
        FLASH_ATTN_3_AND_2: {FULL: "flash_attn_3 flash_attn_2 flash_attn_2"},
        CUDNN: {FULL: "cudnn cudnn torch_flash"},
        NONE: {FULL: "torch_flash torch_flash torch_flash"},
    },
    "qwen3": {
        ALL: {FULL: "flash_attn_3 flash_attn_4 flash_attn_2"},
        CUDNN: {FULL: "cudnn cudnn torch_flash"},
    },
    "gemma": {  # heads of 256
        ALL: {FULL: "flash_attn_3 flash_attn_4 flash_attn_2"},
        CUDNN: {FULL: "cudnn torch_flash torch_flash"},
    },
    "gemma2": {  # softcap, heads of 256
        ALL: {
            "sliding, softcap": "flash_attn_3 flash_attn_2 flash_attn_2",
            "full, softcap": "flash_attn_3 flash_attn_2 flash_attn_2",
        },
        CUDNN: {"sliding, softcap": "eager eager eager", "full, softcap": "eager eager eager"},
    },
    "gemma3_text": {  # windows, heads of 256
        ALL: {
            SLIDING: "flash_attn_3 flash_attn_2 flash_attn_2",
            FULL: "flash_attn_3 flash_attn_4 flash_attn_2",
        },
        CUDNN: {SLIDING: "cudnn torch_flash torch_flash", FULL: "cudnn torch_flash torch_flash"},
    },
    "gpt_oss": {  # windows and sinks, heads of 64
        ALL: {
            "sliding, sinks": "flash_attn_3 flash_attn_4 flash_attn_2",
            "full, sinks": "flash_attn_3 flash_attn_4 flash_attn_2",
        },
        CUDNN: {"sliding, sinks": "cudnn cudnn torch_flash", "full, sinks": "cudnn cudnn torch_flash"},
    },
    "deepseek_v3": {  # keys of 192, values of 128
        ALL: {FULL: "flash_attn_3 flash_attn_4 flash_attn_2"},
        CUDNN: {FULL: "cudnn cudnn torch_flash"},
        NONE: {FULL: "torch_flash torch_flash torch_flash"},
    },
}


@pytest.mark.parametrize("model_type", CHOSEN)
def test_the_kernels_of_a_model(pool, install, model_type):
    config = default_config(model_type)
    layers = diagnose(config, pool).layers
    for packages, expected in CHOSEN[model_type].items():
        install(packages)
        groups = layer_groups(config, layers, devices_to_report(["h100", "b200", "a100"]))
        found = {
            group["kind"]: " ".join(kernels["kernel"] for kernels in group["kernels"].values()) for group in groups
        }
        assert found == expected, packages


def lines_about(text, device):
    return [line for line in text.splitlines() if line.startswith(f"{device}: ")]


def test_the_report_names_kernels_reasons_and_what_to_install(capsys, install):
    install(CUDNN)
    assert main("doctor gemma3_text --gpu H100 b200".split()) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()[2:5]]
    assert rows[0][-4:] == ["on", "H100", "on", "B200"]
    assert [row[:2] + row[-2:] for row in rows[1:]] == [
        ["22", "sliding", "cudnn", "torch_flash"],
        ["4", "full", "cudnn", "torch_flash"],
    ]
    flash_attn_3, status = lines_about(text, "H100")
    assert flash_attn_3 == (
        "H100: not flash_attn_3, which needs the package flash-attn-3, which is not installed here; it would be "
        "faster (see docs/gpu.md)"
    )
    assert status == f"H100: cudnn is {EXPERIMENTAL}"
    assert lines_about(text, "B200") == [
        "B200: not flash_attn_4, which supports sliding windows on Blackwell for heads up to 128 wide, not 256",
        "B200: not flash_attn_4, which needs the package flash-attn-4, which is not installed here; it would be "
        "faster (pip install --pre flash-attn-4)",
        "B200: not cudnn, which takes heads up to 128 wide, not 256",
        "B200: not flash_attn_2, which needs the package flash-attn, which is not installed here; it would be "
        "faster (pip install flash-attn --no-build-isolation)",
        f"B200: torch_flash is {EXPERIMENTAL}",
    ]
    assert not lines_about(text, "CPU") and "cpu_flash" not in text


def test_the_same_facts_as_json(capsys, install):
    install(("flash-attn",))
    assert main("doctor gemma2 --gpu a100 --json".split()) == 0
    sliding, full = json.loads(capsys.readouterr().out)["layers"]
    assert sliding["kernels"] == full["kernels"]
    kernels = full["kernels"]["a100"]
    assert list(full["kernels"]) == ["a100"] and kernels["kernel"] == "flash_attn_2"
    assert kernels["status"] == EXPERIMENTAL and kernels["faster"] == {}
    assert list(kernels["not"]) == ["flash_attn_4", "flash_attn_3", "cudnn"]
    assert kernels["not"]["flash_attn_3"] == "needs a GPU of compute capability 9.x (Hopper); this one has 8.0"


def test_a_cpu_and_any_gpu_by_default(capsys, install):
    install(NONE)
    assert main("doctor llama".split()) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[2].endswith("on CPU     on CUDA")
    assert not lines_about(text, "CPU"), "nothing comes before cpu_flash, which is tested"
    assert [line.split(", which ")[0] for line in lines_about(text, "CUDA")] == [
        *(f"CUDA: not {name}" for name in ("flash_attn_3", "cudnn", "flash_attn_4", "flash_attn_2")),
        f"CUDA: torch_flash is {EXPERIMENTAL}",
    ]


def test_the_gpu_of_this_machine_by_default(capsys, monkeypatch, install):
    install(CUDNN)
    assert devices_to_report() == {"cpu": Device("cpu"), "cuda": Device("cuda")}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert devices_to_report() == {"NVIDIA H200": Device("cuda", (9, 0))}
    assert devices_to_report(["b200", "B200"]) == {"b200": Device("cuda", GPUS["b200"])}


def test_a_cpu_kernel_that_does_not_run_is_explained(pool, install):
    install(ALL)
    config = default_config("gemma2")
    (group, _) = layer_groups(config, diagnose(config, pool).layers, devices_to_report())
    assert group["kernels"]["cpu"] == {
        "kernel": "eager",
        "status": TESTED,
        "not": {"cpu_flash": "does not support softcap"},
        "faster": {},
    }


@pytest.mark.parametrize(
    "line, message",
    [
        ("doctor llama --gpu h100 h1000", f"The GPU 'h1000' is unknown. Choose one of {', '.join(GPUS)}."),
        ("doctor --gpu h100 llama", "doctor takes one model (a name, "),
        ("doctor --gpu h100 llama", "Write the model before --gpu."),
        ("doctor --all-models --gpu h100", "--gpu goes with one model"),
    ],
)
def test_wrong_gpus_exit_with_2(capsys, line, message):
    assert main(line.split()) == 2
    out, error = capsys.readouterr()
    assert not out and message in error and error.count("\n") == 1
