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

from hf_flashcp.attention.kernels import CAPABILITIES, CPUFlashKernel, EagerKernel, ScoreOptions
from hf_flashcp.attention.kernels.capabilities import Capability
from hf_flashcp.bench.gpu import divided_calls, environment, kernels, launch, rectangles, runner
from hf_flashcp.bench.gpu import settings as settings_module
from hf_flashcp.bench.gpu.report import shown, table_of, text
from hf_flashcp.bench.gpu.runner import Pools, Results, run_steps
from hf_flashcp.bench.gpu.settings import Found, Settings, Step
from hf_flashcp.bench.gpu.steps import CLUSTER_STEPS, CORRECTNESS, STEPS, choose
from hf_flashcp.cli import main
from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.errors import ConfigurationError
from hf_flashcp.layout import Rectangle
from hf_flashcp.plan.kernel_calls import Grid, Grids, blocks_of_calls, deal_calls, folds_heads
from hf_flashcp.planning import plan_documents
from tests.kernel_cases import EmulatedVarlen


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


def test_limits_fit_into_nine_minutes_and_correctness_into_four():
    assert sum(step.seconds for step in STEPS) <= runner.TOTAL_SECONDS == 540
    assert sum(step.seconds for step in STEPS if step.group == CORRECTNESS) <= 240


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


@pytest.fixture
def emulated(monkeypatch):
    """Add a varlen kernel, which also supports softcap, to the kernels that run on a CPU."""
    capability = Capability(lambda device, deterministic: EmulatedVarlen(deterministic=deterministic))
    monkeypatch.setitem(CAPABILITIES, "emulated", capability)
    monkeypatch.setattr(EmulatedVarlen, "expands_kv_gradients", True)


def test_softcap_is_checked_where_a_kernel_supports_it(emulated, one_thread):
    found = kernels.kernels(Settings("cpu"))
    assert found.problems == [] and found.cut == []
    count = {(record["kernel"], record["dtype"]): record["cases"] for record in found.tables[kernels.TITLE]}
    capped = sum(case.softcap is not None for case in kernels.cases(16))
    assert capped == 2
    for dtype in ("bfloat16", "float16"):
        assert count["emulated", dtype] == 3 * len(kernels.cases(16))
        assert count["cpu_flash", dtype] == 3 * (len(kernels.cases(16)) - capped)


def test_a_kernel_that_ignores_softcap_is_found(monkeypatch, emulated, one_thread):
    forward = EmulatedVarlen._forward_call

    def wrong(self, query, key, value, sequences, options):
        return forward(self, query, key, value, sequences, options._replace(softcap=None))

    monkeypatch.setattr(EmulatedVarlen, "_forward_call", wrong)
    problems = [each for each in kernels.kernels(Settings("cpu")).problems if "more like these" not in each]
    assert problems and all("softcap" in problem for problem in problems)


@pytest.mark.parametrize("softcap", [None, kernels.SOFTCAP])
def test_the_plain_formulas_are_the_formulas_without_rounding(softcap, one_thread):
    case = kernels.cases(16)[3]._replace(softcap=softcap)
    layer = kernels._Layer((4, 2, 16, 16), case, torch.float32, torch.device("cpu"))
    assert max(layer.errors(kernels.PlainKernel())) < 1e-5 and max(layer.errors(EagerKernel())) < 1e-5


@pytest.mark.parametrize("unit", [16, 128])
def test_a_case_has_so_many_keys_that_backward_folds_heads(unit):
    (case,) = (case for case in kernels.cases(unit) if "twice as many keys" in case.name)
    assert folds_heads(sum(each.queries for each in case.rectangles), sum(each.keys for each in case.rectangles))
    assert len(deal_calls(case.rectangles, Grid(128, "keys", False), 1)) == 1


def test_a_case_says_what_its_layer_needs():
    needs = {
        (layer.window, layer.softcap) for layer in (c.layer((4, 2, 192, 128), torch.half) for c in kernels.cases(16))
    }
    assert needs == {(False, False), (True, False), (True, True), (False, True)}
    layer = kernels.cases(16)[0].layer((4, 2, 192, 128), torch.half)
    assert layer[:3] == (torch.half, 192, 128)


def test_kernels_that_compile_run_fewer_shapes():
    few, all_of_them = (kernels._shapes(Settings("cuda"), name) for name in ("cudnn", "torch_flash"))
    assert len(few) == 3 and len(all_of_them) == 18 and set(few) <= set(all_of_them)


def test_cases_without_time_are_left_out():
    found = kernels.kernels(Settings("cpu", deadline=time.monotonic()))
    assert found.cut == ["21 cases of cpu_flash in bfloat16", "21 cases of cpu_flash in float16"]
    assert [record["cases"] for record in found.tables[kernels.TITLE]] == [2, 0, 0]


def test_kernels_are_listed_in_order_and_the_chosen_one_is_marked():
    (records,) = (rows for title, rows in environment.device(Settings("cpu")).tables.items() if "Kernels" in title)
    assert [record["kernel"] for record in records if record["chosen"]] == ["cpu_flash"]
    assert records[0] == {"kernel": "cpu_flash", "chosen": "yes", "runs here": "yes", "status": "tested"}
    assert {record["runs here"] for record in records[1:-1]} == {"no, it runs on CUDA only"}
    assert records[-1]["kernel"] == "eager" and records[-1]["runs here"] == "yes"


# Divided calls


def test_an_undivided_kernel_makes_one_call_per_round(one_thread):
    """The kernel that it was made from still divides its calls."""
    kernel = EmulatedVarlen()
    changed = divided_calls.undivided(kernel)
    lengths = [64 * 128, *[1] * 100]
    long_and_short = divided_calls.side_by_side([(length, 1) for length in lengths])
    query, key = torch.zeros(2, sum(lengths), 8), torch.zeros(2, len(lengths), 8)
    for each, calls in ((changed, [101]), (kernel, [1, 100])):
        each.calls = []
        each.forward(query, key, key, long_and_short, ScoreOptions(False, 1.0))
        assert sorted(each.calls) == calls


@pytest.fixture
def pretend_to_time(monkeypatch):
    """Return a function that replaces measured seconds by a function of a kernel's grids and its rectangles."""

    def replace(seconds_of):
        spent = []

        def run(self, direction, kernel, part):
            spent.append(seconds_of(getattr(kernel.grids, direction), part))

        def timed(rounds, device, **functions):
            found = {}
            for name, function in functions.items():
                spent.clear()
                function()
                found[name] = sum(spent)
            return found

        monkeypatch.setattr(divided_calls.TimedCalls, "run", run)
        monkeypatch.setattr(divided_calls, "median_seconds", timed)

    return replace


def test_a_stage_is_timed_undivided_and_divided(pretend_to_time):
    """Here each call takes a second."""
    pretend_to_time(lambda grid, part: len(deal_calls(part, grid, 64)))
    plan = plan_documents(sample_pack("pile", 16_384), 8, strategy="per_doc")
    kernel = EmulatedVarlen()
    kernel.grids = Grids(Grid(16, "queries", True), Grid(16, "keys", False))
    shape, device = (64, 1, 8), torch.device("cpu")
    assert divided_calls.divided_stage(plan, kernel, "backward", shape, device) is None
    assert divided_calls.divided_stage(plan_documents([5], 1), kernel, "forward", shape, device) is None
    record = divided_calls.divided_stage(plan, kernel, "forward", shape, device)
    assert record["useful blocks"] <= record["blocks divided"] < record["blocks undivided"]
    assert record["calls undivided"] < record["calls divided"] <= record["rectangles"]
    assert record["ms undivided"] == 1000 * record["calls undivided"]
    assert record["ms divided"] == 1000 * record["calls divided"]
    assert record["useful blocks"] % 64 == 0


@pytest.mark.parametrize("direction, axis", [("forward", "queries"), ("backward", "keys")])
@pytest.mark.parametrize("padded", [True, False])
def test_costs_of_blocks_and_calls(pretend_to_time, direction, axis, padded):
    """A machine on which a useful block takes 1 us, an empty one 5 ns and a call 20 us."""
    grid = Grid(128, axis, padded)

    def seconds_of(dealt_by, part):
        (dealt,) = deal_calls(part, dealt_by, 8)
        started, useful = (8 * blocks for blocks in blocks_of_calls(part, [dealt], grid))
        return 1e-6 * useful + 5e-9 * (started - useful) + 20e-6

    pretend_to_time(seconds_of)
    kernel = EmulatedVarlen()
    kernel.grids = Grids(grid, grid)
    sizes = divided_calls.Sizes(sequences=8, longest=16, keys=2, calls=4)
    found = divided_calls.costs(kernel, direction, sizes, (8, 2, 8), torch.device("cpu"))
    assert found["direction"] == direction and found["padded"] == ("yes" if padded else "no")
    assert found["us per further call"] == pytest.approx(20)
    assert found["ns per empty block"] == pytest.approx(5 if padded else 0, abs=1e-6)
    assert found.get("blocks per call") == (pytest.approx(4000) if padded else None)


def test_speeds_and_costs_of_a_varlen_kernel(emulated, one_thread):
    found = rectangles.rectangles(Settings("cpu"))
    speeds, costs, stages = (
        found.tables[rectangles.SPEEDS],
        found.tables[rectangles.COSTS],
        found.tables[rectangles.STAGES],
    )
    assert [record["kernel"] for record in speeds] == ["cpu_flash", "emulated"] * 3
    assert [(record["kernel"], record["direction"]) for record in costs] == [
        ("emulated", "forward"),
        ("emulated", "backward"),
    ]
    assert [record["strategy"] for record in stages] == ["search"] * 2 + ["per_doc"] * 2
    for record in speeds:
        ratio = record["backward TFLOP/s"] / record["forward TFLOP/s"]
        assert ratio == pytest.approx(2.5 * record["forward ms"] / record["backward ms"])


def test_published_speeds_stand_beside_measured_ones():
    causal, full, packed = rectangles.single_calls(Settings("cuda"))
    assert sum(each.queries for each in packed.rectangles) == 32_768
    assert max(each.queries for each in packed.rectangles) == 8192 and packed.shape == (64, 8, 128)
    assert packed.published["flash_attn_3"] == (584, 426) and full.published["cudnn"] == (595, None)
    known = {*causal.published, *full.published, *packed.published}
    assert known <= set(CAPABILITIES)


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
    """In a padded grid every sequence gets as many blocks as the longest one of its call."""
    disjoint = [Rectangle(0, 1024, 0, 10), Rectangle(1024, 1025, 10, 20), Rectangle(1025, 1153, 20, 30)]
    grid = Grid(128, "queries", True)
    assert blocks_of_calls(disjoint, [[0, 1, 2]], grid) == (3 * 8, 8 + 1 + 1)
    assert blocks_of_calls(disjoint, [[0], [1, 2]], grid) == (10, 10)
    assert blocks_of_calls(disjoint, [[0, 1, 2]], grid._replace(padded=False)) == (10, 10)
    assert blocks_of_calls(disjoint, [[0, 1, 2]], Grid(4, "keys", True)) == (9, 9)


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


def test_the_page_lists_every_step_with_its_limit():
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    for step in STEPS:
        assert f"| `{step.name}` | {step.group} | {step.seconds} s |" in page
    for step in CLUSTER_STEPS:
        assert f"| `{step.name}` | {step.seconds} s |" in page
