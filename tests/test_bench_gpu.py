"""`flashcp bench gpu` on a CPU: every step runs, and a step that fails does not affect the others."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_flashcp.attention.kernels import CPUFlashKernel
from hf_flashcp.bench.gpu import environment, kernels, launch, rectangles, runner
from hf_flashcp.bench.gpu import settings as settings_module
from hf_flashcp.bench.gpu.report import shown, table_of, text
from hf_flashcp.bench.gpu.runner import Pools, Results, run_steps
from hf_flashcp.bench.gpu.settings import Found, Settings, Step
from hf_flashcp.bench.gpu.steps import CLUSTER_STEPS, CORRECTNESS, STEPS, choose
from hf_flashcp.cli import main
from hf_flashcp.errors import ConfigurationError
from hf_flashcp.layout import Rectangle


ROOT = Path(__file__).parents[1]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rehearsal(forked, tmp_path_factory):
    """Run the command on a CPU. Returns its exit code, its output and its folder."""
    folder = tmp_path_factory.mktemp("gpu") / "new"
    done = subprocess.run(
        [sys.executable, "-m", "hf_flashcp", "bench", "gpu", "--device", "cpu", "--output", folder],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, folder


def test_every_step_passes_on_a_cpu(rehearsal):
    code, out, folder = rehearsal
    rows = rows_of(folder)
    assert [(row["step"], row["status"], row["problems"], row["cut"]) for row in rows] == [
        (step.name, "passed", [], []) for step in STEPS
    ]
    assert code == 0 and (folder / "report.txt").read_text() == out
    for row, step in zip(rows, STEPS):
        assert row["tables"] and all(records for records in row["tables"].values())
        assert all(title in out for title in row["tables"]) and step.shows in out


def test_steps_that_have_passed_are_not_run_again(rehearsal, capsys):
    _, out, folder = rehearsal
    before = (folder / "steps.jsonl").read_text()
    assert main(["bench", "gpu", "--device", "cpu", "--output", str(folder), "--steps", "device", "host"]) == 0
    assert (folder / "steps.jsonl").read_text() == before
    assert "host" in capsys.readouterr().out


def test_limits_fit_into_nine_minutes_and_correctness_into_three():
    assert sum(step.seconds for step in STEPS) <= runner.TOTAL_SECONDS == 540
    assert sum(step.seconds for step in STEPS if step.group == CORRECTNESS) <= 180


# Steps that fail


def succeed(settings, value):
    return value


def fail_on_purpose(settings):
    raise ConfigurationError("this machine is wrong")


def stumble(settings):
    return [][1]


def use_too_much(settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def crash(settings):
    os._exit(3)


def take_too_long(settings):
    time.sleep(60)


def step_of(name, function, *args, seconds=20):
    def run(run, settings):
        found = Found()
        found.add("Values", {"value": run(1, function, *args)[0]})
        return found

    return Step(name, CORRECTNESS, seconds, "nothing", run)


def unhappy(run, settings):
    found = Found()
    found.require(True, "never said")
    found.require(False, "two and two are five")
    assert not found.has_time(settings.until(time.monotonic()), 1, "the rest")
    return found


def test_a_failing_step_does_not_affect_the_others(forked):
    steps = [
        step_of("a", fail_on_purpose),
        step_of("b", stumble),
        step_of("c", use_too_much),
        step_of("d", crash),
        step_of("e", take_too_long, seconds=1),
        Step("f", CORRECTNESS, 20, "", unhappy),
        step_of("g", succeed, 5),
    ]
    seen = []
    results = Results(None, {"device": "a CPU"})
    run_steps(steps, Settings("cpu"), Pools("cpu"), results, lambda step, row: seen.append((step.name, row is None)))
    assert seen == [(name, waiting) for name in "abcdefg" for waiting in (True, False)]
    rows = results.rows("abcdefg")
    statuses = ["failed", "failed", "out of memory", "crashed", "out of time", "failed", "passed"]
    assert [row["status"] for row in rows] == statuses
    for row, said in zip(rows, ("this machine is wrong", "IndexError", "20 GiB", "exit code 3", "in time", "", "")):
        assert said in row["message"]
    assert rows[0]["message"] == "this machine is wrong"
    assert rows[5]["problems"] == ["two and two are five"] and rows[5]["cut"] == ["the rest"]
    assert rows[6]["tables"] == {"Values": [{"value": 5}]}
    report = text(rows, {step.name: step.shows for step in steps})
    for said in ("two and two are five", "left out for lack of time: the rest", "exit code 3", "Values"):
        assert said in report


def cut(run, settings):
    found = Found()
    found.add("Values", {"value": 1})
    found.cut.append("the second value")
    return found


def test_a_step_that_was_cut_short_has_not_passed(forked, tmp_path):
    """A step that left something out for lack of time runs again."""
    machine, steps = {"device": "a CPU"}, [Step("a", CORRECTNESS, 20, "", cut)]
    for times in (1, 2):
        run_steps(steps, Settings("cpu"), Pools("cpu"), Results(tmp_path, machine), lambda *_: None)
        assert [row["status"] for row in rows_of(tmp_path)] == ["cut short"] * times


@pytest.mark.parametrize(
    "line", ['{"step": "device", "sta', "[]", "null", '{"step": "device"}', '{"machine": 1, "step": "device"}']
)
def test_lines_that_are_not_results_are_named(tmp_path, line):
    """A run that was killed while writing leaves such a last line."""
    (tmp_path / "steps.jsonl").write_text(line + "\n")
    with pytest.raises(
        ConfigurationError, match=r"Line 1 of .*steps.jsonl is not the result of a step. Delete the line"
    ):
        Results(tmp_path, {"device": "a CPU"})


def test_a_folder_that_cannot_be_created(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert (
        main(["bench", "gpu", "--device", "cpu", "--steps", "device", "--output", str(tmp_path / "file" / "x")]) == 2
    )
    assert "cannot be used: " in capsys.readouterr().err


def test_a_library_for_another_gpu_is_a_problem(monkeypatch):
    monkeypatch.setattr(settings_module, "load_kernel_library", lambda file: None)
    problems = environment.device(Settings("cpu", kernel_library="fa3.so")).problems
    assert problems == ["the kernel library was loaded, but flash_attn_3 runs on CUDA only"]


def test_a_failed_step_runs_again_and_a_run_respects_its_time_limit(forked, tmp_path, monkeypatch):
    machine = {"device": "a CPU"}
    steps = [step_of("a", succeed, 1), step_of("b", fail_on_purpose)]
    run_steps(steps, Settings("cpu"), Pools("cpu"), Results(tmp_path, machine), lambda *_: None)
    assert [row["status"] for row in rows_of(tmp_path)] == ["passed", "failed"]
    monkeypatch.setattr(runner, "TOTAL_SECONDS", 0)
    steps = [step_of("a", succeed, 2), step_of("b", succeed, 3)]
    results = Results(tmp_path, machine)
    run_steps(steps, Settings("cpu"), Pools("cpu"), results, lambda *_: None)
    assert [row["status"] for row in results.rows("ab")] == ["passed", "not run"]
    assert results.rows("a")[0]["tables"] == {"Values": [{"value": 1}]}
    with pytest.raises(
        ConfigurationError, match="has results of a CPU, but this machine is an H100. Pass another --output"
    ):
        Results(tmp_path, {"device": "an H100"})


@pytest.mark.parametrize(
    "options, said",
    [
        (["--steps", "nonsense", "host"], "There is no step nonsense. Choose from"),
        (["--device", "cpu", "--kernel-library", "missing.so"], "The kernel library missing.so does not exist"),
    ],
)
def test_errors_about_options_are_one_line(capsys, options, said):
    assert main(["bench", "gpu", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_error_on_a_machine_without_a_gpu(forked, capsys):
    assert main(["bench", "gpu", "--steps", "device"]) == 2
    assert "PyTorch sees no GPU here. Run this on a machine with a GPU" in capsys.readouterr().err


@pytest.fixture
def one_thread():
    """Run on one thread: such small operators gain nothing from more, and a busy machine makes threads wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_wrong_kernel_is_found(monkeypatch, one_thread):
    """One of the gradients is 2% too large."""
    right = CPUFlashKernel._backward_block

    def wrong(self, *args):
        dq, dk, dv = right(self, *args)
        return dq, dk * 1.02, dv

    monkeypatch.setattr(CPUFlashKernel, "_backward_block", wrong)
    problems = kernels.kernels(Settings("cpu")).problems
    assert all(problem.startswith(("dK of cpu_flash", "cpu_flash in torch")) for problem in problems)
    assert len(problems) == 2 * (kernels.FEW + 1) and problems[-1].endswith("more like these")


# Several ranks


def rehearse_together():
    ranks = launch.join(Settings("cpu"))
    results = Results(None, {"device": "CPUs"}) if launch.is_first() else None
    launch.run_together(CLUSTER_STEPS, Settings("cpu"), ranks, results, lambda *_: None)
    return results and results.rows(step.name for step in CLUSTER_STEPS)


def the_command(folder):
    return main(["bench", "gpu", "--device", "cpu", "--steps", "links", "--output", folder])


def fail_on_one_rank():
    def run(ranks, settings):
        if not launch.is_first():
            raise ConfigurationError("this rank is wrong")
        return Found()

    step = CLUSTER_STEPS[0]._replace(run=run)
    results = Results(None, {"device": "CPUs"}) if launch.is_first() else None
    launch.run_together([step], Settings("cpu"), launch.join(Settings("cpu")), results, lambda *_: None)
    return results and results.rows([step.name])


def test_steps_of_several_ranks(pool):
    rows, nothing = pool.run(2, rehearse_together)
    assert nothing is None
    assert [(row["step"], row["status"]) for row in rows] == [(step.name, "passed") for step in CLUSTER_STEPS]
    assert {"shared with DDP", "its own"} == {
        record["the exchange's group"] for record in rows[2]["tables"]["A training step"]
    }


def test_the_command_under_a_launcher(pool, tmp_path):
    """When torchrun starts the command, the first rank writes the files."""
    assert pool.run(2, the_command, str(tmp_path)) == [0, 0]
    assert [(row["step"], row["status"]) for row in rows_of(tmp_path)] == [("links", "passed")]
    assert "one node" in (tmp_path / "report.txt").read_text()


def test_a_rank_that_fails_is_named(pool):
    (row,), _ = pool.run(2, fail_on_one_rank)
    assert row["status"] == "failed" and row["message"] == "rank 1: ConfigurationError: this rank is wrong"


def fail_while_others_wait():
    def run(ranks, settings):
        if not launch.is_first():
            raise ConfigurationError("this rank is wrong")
        dist.barrier(ranks.group)
        return Found()

    def meet(ranks, settings):
        dist.barrier(ranks.group)
        return Found()

    steps = [CLUSTER_STEPS[0]._replace(run=run), CLUSTER_STEPS[1]._replace(run=meet)]
    results = Results(None, {"device": "CPUs"}) if launch.is_first() else None
    ranks = launch.join(Settings("cpu"), step_seconds=2)
    launch.run_together(steps, Settings("cpu"), ranks, results, lambda *_: None)
    return results and results.rows(step.name for step in steps)


def test_ranks_go_on_after_waiting_for_one_that_failed(pool):
    (row, following), _ = pool.run(2, fail_while_others_wait)
    assert row["status"] == "failed" and "rank 1: ConfigurationError: this rank is wrong" in row["message"]
    assert "rank 0: " in row["message"] and row["seconds"] < 20
    assert following["status"] == "passed"


def test_cluster_steps_need_a_launch():
    assert "links" in {step.name for step in choose(["cluster", "device"], STEPS + CLUSTER_STEPS)}
    with pytest.raises(ConfigurationError, match="There is no step cluster"):
        choose(["cluster"], STEPS)
    assert [step.name for step in choose(["host", "correctness"], STEPS)][-1] == "host"


# Counts and tables


def test_blocks_are_counted_call_by_call():
    """Count blocks of 128 queries for 32 heads.

    Rectangles with disjoint keys share a call, in which every sequence gets as many blocks as the longest one.
    Prefixes of the same keys need calls of their own.
    """
    disjoint = [Rectangle(0, 1024, 0, 10), Rectangle(1024, 1025, 10, 20), Rectangle(1025, 1153, 20, 30)]
    assert rectangles.started_blocks(disjoint, 32) == 32 * 3 * 8
    assert rectangles.useful_blocks(disjoint, 32) == 32 * (8 + 1 + 1)
    assert [len(group) for group in rectangles.length_classes(disjoint)] == [1, 2]
    assert sum(rectangles.started_blocks(group, 32) for group in rectangles.length_classes(disjoint)) == 32 * 10
    prefixes = [Rectangle(0, 1024, 0, 10), Rectangle(1024, 1025, 0, 20)]
    assert rectangles.started_blocks(prefixes, 32) == rectangles.useful_blocks(prefixes, 32) == 32 * 9


def test_tables():
    records = [{"name": "a", "value": 1234567, "ratio": 0.123456}, {"name": "long", "ratio": 1e-15}]
    assert table_of(records).splitlines() == [
        "name      value    ratio",
        "a     1,234,567   0.1235",
        "long             1.0e-15",
    ]
    assert [shown(value) for value in (0.0, 12345.6, 1e9, 3, "x")] == ["0", "12,346", "1.0e+09", "3", "x"]


def test_values_that_are_not_finite_are_null_in_json():
    found = Found()
    found.add("Errors", {"error": float("inf"), "bound": 1.0}, {"error": float("nan"), "bound": 1.0})
    row = runner.row_of(STEPS[0], {"device": "a CPU"}, "failed", 1.0, found)
    assert [record["error"] for record in json.loads(json.dumps(row, allow_nan=False))["tables"]["Errors"]] == [
        None
    ] * 2
    assert "not finite" in text([row], {})
