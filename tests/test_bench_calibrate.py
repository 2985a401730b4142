import json

import pytest

from hf_flashcp.bench.calibration import calibrate
from hf_flashcp.bench.calibration.fit import EFFICIENCIES, Call, fit_kernel, fit_line, root_mean_square
from hf_flashcp.planning import HardwareProfile
from hf_flashcp.predict.hardware_profile import Kernel, Pass
from hf_flashcp.predict.layer_work import Rectangles, call_seconds
from hf_flashcp.predict.model_shape import AttentionLayers
from tests.test_cli import run


LAYERS = AttentionLayers(1, 4, 2, 16, 16)


def call(kernel, causal, rectangles):
    table = Rectangles.of([(0, queries, 0 if causal else keys) for queries, keys in rectangles])
    options = {"cp_size": 1, "layers": LAYERS, "window": None, "causal": causal}
    times = [float(call_seconds(kernel, table, backward=backward, **options)[0]) for backward in (False, True)]
    return Call(causal, rectangles, *times)


def test_the_fit_recovers_the_kernel_behind_the_times():
    forward, backward = Pass(7e10, 30.0, 90.0), Pass(6e10, 12.0, 70.0)
    kernel = Kernel(32, 1, 2e-4, float(EFFICIENCIES[17]), forward, backward)
    calls = [call(kernel, *shape) for shape in calibrate._calls()]
    found, ratios = fit_kernel(calls, LAYERS)
    assert (found.tile, found.units) == (32, 1)
    for name in ("call_seconds", "causal_efficiency"):
        assert getattr(found, name) == pytest.approx(getattr(kernel, name), rel=1e-6)
    for name in ("forward", "backward"):
        assert vars(getattr(found, name)) == pytest.approx(vars(getattr(kernel, name)), rel=1e-6)
    assert root_mean_square(ratios) < 1e-9


def test_a_fitted_line_never_falls():
    assert fit_line([10, 1000, 100_000], [2e-3 + size / 5e6 for size in (10, 1000, 100_000)]) == pytest.approx(
        (2e-3, 5e6)
    )
    start, rate = fit_line([1, 2, 3], [3.0, 2.0, 1.0])
    assert start > 0 and rate > 0


def test_command(capsys, tmp_path, monkeypatch):
    for name, sizes in {"LENGTHS": (16, 64), "QUERIES": (16,), "KEYS": (16, 64), "ROWS": (16,)}.items():
        monkeypatch.setattr(calibrate, name, sizes)
    for name, sizes in {"BYTES": (64, 4096), "WIDTHS": (32,), "TOKENS": 32, "_WHOLE": 128}.items():
        monkeypatch.setattr(calibrate, name, sizes)
    path = tmp_path / "profile.json"
    line = f"bench calibrate --lengths-from pile wlb_llm --window 256 --packs 3 --rounds 1 --heads 2 --output {path}"
    code, out, err = run(capsys, f"{line} --head-dim 16 --json")
    assert code == 0 and err == f"profile written to {path}\n"
    found = json.loads(out)
    assert [(row["corpus"], row["strategy"], row["seed"]) for row in found["layers"]] == [
        ("pile", "search", 0),
        ("wlb_llm", "search", 1),
        ("pile", "per_doc", 2),
    ]
    for clock in ("seconds", "cpu_seconds"):
        errors = [abs(row[clock]["predicted"] / row[clock]["measured"] - 1) for row in found["layers"]]
        assert found["error"][clock]["largest"] == max(errors)
    profile = HardwareProfile.load(path)
    assert profile.ranks_per_node == 2 and profile.kernel.units == 1
    assert json.loads(path.read_text())["error"] == {"layers": 3, **found["error"]}
    assert "3 packs of 256 tokens on 2 ranks" in calibrate.text(found)
    code, out, _ = run(capsys, f"simulate --lengths 300,200,100 --cp-size 2 --hardware {path} --json")
    (cell,) = json.loads(out)["cells"]
    assert code == 0 and "measured by flashcp bench calibrate" in cell["description"]
    # Without a peak from a data sheet there is no MFU.
    assert {row["mfu"] for row in cell["schemes"].values()} == {None}


@pytest.mark.parametrize("option", ["--packs 0", "--rounds 0", "--cp-size 1"])
def test_invalid_options(capsys, option):
    code, out, err = run(capsys, f"bench calibrate {option}")
    assert code == 2 and out == "" and "must be at least" in err
