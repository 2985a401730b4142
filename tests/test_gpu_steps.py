import json
import sys
import time

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import ALL_ATTENTION_FUNCTIONS

from hf_flashcp.bench.calibration import fit as calibration_fit
from hf_flashcp.bench.calibration.fit import Call, fit_device_kernel, root_mean_square
from hf_flashcp.bench.gpu import calibration, calibration_timing, model_step
from hf_flashcp.bench.gpu.settings import OUT_OF_MEMORY, Settings, fits_in_memory, in_worker
from hf_flashcp.bench.step_worker import Trainer
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.planning import CostModel, HardwareProfile, plan_documents
from hf_flashcp.planning.devices import packaged_hardware
from hf_flashcp.predict.hardware_profile import Kernel, Pass
from hf_flashcp.predict.model_shape import AttentionLayers


LAYERS = AttentionLayers(1, 32, 8, 128, 128)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rehearse(step, seconds=float("inf")):
    """Run a step on a CPU in this process. Return its row as it would be written to the file."""
    settings = Settings("cpu", deadline=time.monotonic() + seconds)
    found = step(lambda processes, function, *arguments: [function(settings, *arguments)], settings)
    return json.loads(json.dumps(vars(found)))


def test_a_step_compared_with_single_documents(monkeypatch):
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def counted(module, query, *arguments, **options):
        calls.append(query.shape[2])
        return sdpa(module, query, *arguments, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    found = rehearse(in_worker(model_step.model_step))
    assert found["problems"] == [] and found["cut"] == []
    records = found["tables"].pop(model_step.STEPS)
    assert found["tables"] == {}  # memory is not measured on a CPU
    assert [record["tokens"] for record in records] == [256, 256, 512, 512]
    for packed, alone in zip(records[::2], records[1::2]):
        assert packed["attention"] == "flashcp, cpu_flash" and alone["attention"] == "sdpa, document by document"
        assert packed["documents"] == len(sample_pack("pile", packed["tokens"]))
        assert packed["loss"] == pytest.approx(alone["loss"], rel=2e-2) and packed["gradient norm"] > 0.1
        assert packed["tokens/s"] == pytest.approx(1000 * packed["tokens"] / packed["ms per step"])
        assert packed["speed over sdpa"] == pytest.approx(alone["ms per step"] / packed["ms per step"])
    lengths = sample_pack("pile", 512)
    assert calls[-2 * len(lengths) :] == [length for length in lengths for _ in range(2)]  # two layers


def test_steps_that_disagree_are_a_problem(monkeypatch):
    by_document = model_step._step_by_document
    monkeypatch.setattr(model_step, "FEW_TOKENS", (256,))
    monkeypatch.setattr(model_step, "_step_by_document", lambda *rest: (by_document(*rest)[0], torch.tensor(9.0)))
    (problem,) = rehearse(in_worker(model_step.model_step))["problems"]
    assert problem.startswith("gradient norm of 256 packed tokens is") and "9 with sdpa" in problem


def test_a_step_that_does_not_fit_in_memory(monkeypatch):
    step = Trainer.step

    def step_or_raise(self, batch, layout):
        if batch["input_ids"].shape[1] == 256:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, batch, layout)

    monkeypatch.setattr(Trainer, "step", step_or_raise)
    found = rehearse(in_worker(model_step.model_step))
    first, second, *others = found["tables"][model_step.STEPS]
    assert found["problems"] == [] and first["ms per step"] == OUT_OF_MEMORY
    assert all(isinstance(record["ms per step"], float) for record in (second, *others)) and len(others) == 2


@pytest.mark.parametrize("step", [in_worker(model_step.model_step), calibration.calibrate])
def test_without_time_left_everything_is_left_out(step):
    found = rehearse(step, seconds=-1)
    assert found["problems"] == [] and len(found["cut"]) >= 2
    assert model_step.STEPS not in found["tables"] and "profile" not in found["more"]


def test_memory_of_a_step_compared_with_the_estimate():
    lengths = sample_pack("pile", 16_384)
    measured = model_step.Measured(0.3, 40 * 2**30, 10.0, 1.0)
    record = model_step._memory(measured, lengths, model_step.LLAMA_1B, "torch_flash")
    assert record["measured GiB"] == 40 and 30 < record["estimated GiB"] < 50
    assert record["estimated / measured"] == pytest.approx(record["estimated GiB"] / 40)
    assert model_step._memory(None, lengths, model_step.LLAMA_1B, "torch_flash")["measured GiB"] == OUT_OF_MEMORY


def test_utilization_of_a_gpu_with_a_data_sheet(monkeypatch):
    measured = model_step.Measured(0.25, 0, 10.0, 1.0)
    arguments = measured, [16_384], model_step.LLAMA_1B, torch.device("cpu")
    assert "MFU" not in model_step._figures(*arguments)
    monkeypatch.setattr(model_step, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    parameters = 6 * 1.04e9 * 16_384
    attention = 3 * 16 * 32 * (4 * 64) * 16_384**2 / 2
    expected = (parameters + attention) / 0.25 / 989e12
    assert model_step._figures(*arguments)["MFU"] == pytest.approx(expected, rel=1e-3)


def test_names_of_gpus():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GH200 480GB")
    assert [packaged_hardware(name) for name in names] == ["h100", "h200", "a100", "b200", None]


def test_only_out_of_memory_is_caught():
    assert fits_in_memory(lambda: None)
    with pytest.raises(RuntimeError, match="other"):
        fits_in_memory(lambda: (_ for _ in ()).throw(RuntimeError("other")))


def test_calibration():
    found = rehearse(calibration.calibrate)
    assert found["problems"] == [] and found["cut"] == []
    tables, measurements = found["tables"], found["more"]["measurements"]
    assert len(measurements["calls"]) == len(calibration.REHEARSED.calls)
    assert all(call["forward"] > 0 and call["backward"] > 0 for call in measurements["calls"])
    assert [copy["ranges"] for copy in measurements["copies"]] == ["one", "many"]
    assert [len(layer["seconds"]) for layer in measurements["layers"]] == [4, 4]
    profile = HardwareProfile.from_dict(found["more"]["profile"])
    assert profile.description.startswith("CPU, kernel cpu_flash, bf16, 4/2 heads of 16; measured")
    assert (profile.kernel.units, profile.kernel.tile, profile.peak_flops_per_second) == (1, 128, None)
    model = CostModel(profile, 0.0, (AttentionLayers(1, 4, 2, 16, 16),))
    errors = []
    for pack, record, measured in zip(calibration.REHEARSED_PACKS, tables[calibration.LAYERS], measurements["layers"]):
        plan = plan_documents(sample_pack(pack.corpus, pack.window, seed=pack.seed), 4, strategy=pack.strategy)
        step = model.step_time(plan)
        assert record["predicted ms"] == pytest.approx(1000 * (step.attention + step.copies).max())
        assert record["measured ms"] == pytest.approx(1000 * max(measured["seconds"]))
        errors.append(abs(record["predicted / measured"] - 1))
    (error,) = tables[calibration.ERRORS]
    assert error["largest"] == pytest.approx(max(errors))
    assert found["more"]["profile"]["error"] == {
        "layers": 2,
        "seconds": {name.replace(" ", "_"): value for name, value in error.items()},
    }


def test_calibration_if_memory_runs_out(monkeypatch):
    functions, engine = calibration_timing._Inputs.functions, calibration_timing.RankWork.engine
    layers = []

    def raises():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def largest_raises(self, causal, pairs):
        forward, backward = functions(self, causal, pairs)
        return forward, raises if pairs == ((256, 256),) and not causal else backward

    def first_raises(self):
        layers.append(self.layout)
        return raises() if self.layout is layers[0] else engine(self)

    monkeypatch.setattr(calibration_timing._Inputs, "functions", largest_raises)
    monkeypatch.setattr(calibration_timing.RankWork, "engine", first_raises)
    found = rehearse(calibration.calibrate)
    assert found["problems"] == [] and "profile" in found["more"]
    (call,) = found["tables"][calibration.CALLS]
    assert call == {"causal": "no", "rectangles": 1, "queries": 256, "keys": 256, "ms": OUT_OF_MEMORY}
    first, second = found["tables"][calibration.LAYERS]
    assert first["measured ms"] == OUT_OF_MEMORY and isinstance(second["measured ms"], float)
    assert found["more"]["profile"]["error"]["layers"] == 1


def test_calibration_without_scipy_keeps_the_measurements(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    found = rehearse(calibration.calibrate)
    (problem,) = found["problems"]
    assert "pip install 'hf_flashcp[bench]'" in problem and "profile" not in found["more"]
    assert found["more"]["measurements"]["calls"][0]["forward"] > 0
    assert all(record["measured ms"] > 0 for record in found["tables"][calibration.LAYERS])


KERNELS = [
    Kernel(128, 132, 1e-5, 0.91, Pass(371e12, 80.0, 110.0), Pass(325e12, 250.0, 200.0)),
    Kernel(128, 148, 4e-5, 0.7, Pass(900e12, 200.0, 350.0), Pass(600e12, 20.0, 700.0)),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_the_fit_recovers_the_kernel_of_a_gpu(kernel, noise):
    calls = [Call(*work, 1.0, 1.0) for work in calibration.GPU.calls]
    seconds = calibration_fit._predicted(kernel, calibration_fit._tables(calls), LAYERS)
    seconds *= np.exp(noise * np.random.default_rng(0).standard_normal(seconds.shape))
    calls = [Call(*work, *times) for work, times in zip(calibration.GPU.calls, seconds.tolist())]
    found, ratios = fit_device_kernel(calls, LAYERS, units=kernel.units)
    assert (found.tile, found.units) == (128, kernel.units)
    tolerance = 0.05 if noise else 0.01
    assert root_mean_square(ratios) < 1.2 * noise + 1e-4
    for name in ("call_seconds", "causal_efficiency"):
        assert getattr(found, name) == pytest.approx(getattr(kernel, name), rel=tolerance)
    for name in ("forward", "backward"):
        ours, given = vars(getattr(found, name)), vars(getattr(kernel, name))
        assert ours["flops_per_second"] == pytest.approx(given["flops_per_second"], rel=tolerance)
        for overhead in ("tile_overhead_keys", "causal_tile_overhead_keys"):
            assert ours[overhead] == pytest.approx(given[overhead], rel=0.02, abs=30 if noise else 1)
    steps = [
        predicted_layer(each, plan_documents(sample_pack("pile", 65_536), 8, strategy=strategy))
        for strategy in ("search", "per_doc")
        for each in (kernel, found)
    ]
    assert steps[1::2] == pytest.approx(steps[::2], rel=0.03 if noise else 0.001)


def predicted_layer(kernel, plan):
    hardware = HardwareProfile.load("h100")
    hardware = HardwareProfile(**{**vars(hardware), "kernel": kernel})
    return CostModel(hardware, 0.0, (LAYERS,)).step_time(plan).attention_seconds


def test_a_profile_of_a_gpu_that_is_known():
    kernel = KERNELS[0]
    parts = {
        "device": "NVIDIA H200",
        "units": 132,
        "memory_bytes": 150 * 10**9,
        "kernel": "torch_flash",
        "shape": [32, 8, 128],
        "dtype": "bf16",
        "products": [{"tokens": 8192, "inputs": 4096, "outputs": 4096, "seconds": 2 * 8192 * 4096**2 / 6e14}],
        "copies": [{"rows": 100, "merge": 4e-7, "pack": 1e-7}],
    }
    profile = calibration._profile(kernel, parts, LAYERS)
    packaged, loaded = HardwareProfile.load("h200"), HardwareProfile.from_dict(json.loads(json.dumps(profile)))
    assert loaded.kernel == kernel and loaded.memory_bytes == 150 * 10**9
    assert loaded.linear_flops_per_second == pytest.approx(6e14)
    # fp32 output read and written and a bf16 part read; bf16 keys and values read and written
    moved = 100 * (32 * 128 * 10 + 8 * 256 * 4)
    assert loaded.memory_bytes_per_second == pytest.approx(moved / 5e-7)
    for name in ("intra_node", "inter_node", "ranks_per_node", "peak_flops_per_second"):
        assert getattr(loaded, name) == getattr(packaged, name)
    assert profile["sources"]["links"] == "assumed: as in h200.json"
    assert "NVIDIA H200, kernel torch_flash" in profile["description"]
