"""Faults in real processes: other ranks raise one error that names the missing ranks, and saved files are complete.

Nothing here measures time; a case fails if it does not end within `OUTER_SECONDS`.
"""

import importlib.util
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from torch.distributed import run as torchrun

from tests import fault_cases
from tests.fault_cases import STEPS, outcomes, train
from tests.launch_cases import ROOT, run_forked


pytestmark = pytest.mark.usefixtures("forked")
resumes = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 loads optimizer state to the device 'cpu:0', which torch.load does not know",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return digests of the parameters after runs without a fault, by kind of sharding and number of steps."""
    kept = {}

    def run(fsdp=False, steps=STEPS):
        if (fsdp, steps) not in kept:
            directory = str(tmp_path_factory.mktemp("undisturbed"))
            first, second = outcomes(directory, 2, train, directory, fsdp=fsdp, steps=steps)
            assert first == second and first[0] == "returned", first
            kept[fsdp, steps] = first[1]
        return kept[fsdp, steps]

    return run


def checkpoints(directory):
    return sorted(path.name for path in Path(directory).glob("checkpoint-*"))


def check_error(outcome, *fragments):
    kind, message = outcome
    assert kind == "FlashCPError", outcome
    for fragment in ("waiting for", "resume_from_checkpoint=True", *fragments):
        assert fragment in message


@resumes
@pytest.mark.parametrize(
    "point, victim, fsdp",
    [
        ("forward", 0, False),
        ("forward", 1, False),
        ("backward", 1, False),
        ("between steps", 1, False),
        ("save", 0, False),
        ("save", 1, False),
        ("save", 0, True),
        ("save", 1, True),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else ("FSDP2" if value else "DDP")
        if isinstance(value, bool)
        else f"rank {value}"
    ),
)
def test_killed(point, victim, fsdp, tmp_path, undisturbed):
    """The other rank names the killed rank, its host and the collective.

    A resumed run ends with the same parameters.
    """
    directory = str(tmp_path)
    fault = (directory, 2, train, directory, point, fault_cases.kill, victim)
    found = outcomes(*fault, victim=None, fsdp=fsdp)
    assert found[victim] == ("ended", -9)
    waited_for = {"forward": "keys and values of other ranks during training step 3", "save": "saving checkpoint-4"}
    check_error(
        found[1 - victim],
        f"Missing: rank {victim} (host ",
        "does not answer: killed or stopped",
        waited_for.get(point, "during training step "),
    )
    assert checkpoints(directory) == ["checkpoint-2"]
    resumed = outcomes(directory, 2, train, directory, resume=True, fsdp=fsdp)
    assert resumed == [("returned", undisturbed(fsdp))] * 2
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists() != fsdp  # a sharded state has a folder instead
    assert checkpoints(directory) == ["checkpoint-2", "checkpoint-4"] and not (tmp_path / "incomplete").exists()


@pytest.mark.parametrize(
    "point, action, said",
    [
        ("forward", fault_cases.sleep, "fault_cases.py:"),
        ("between steps", fault_cases.stop, "does not answer: killed or stopped"),
    ],
    ids=["asleep in forward", "stopped between steps"],
)
def test_stalled(point, action, said, tmp_path):
    """The other rank ends after `ddp_timeout`, and says where the stalled process is if it still answers."""
    directory = str(tmp_path)
    first, second = outcomes(directory, 2, train, directory, point, action, 1, victim=1, timeout=6)
    check_error(first, "Missing: rank 1 (host ", said, "The backend said")
    assert second is None and checkpoints(directory) == ["checkpoint-2"]


def test_a_rank_that_comes_late(tmp_path, undisturbed):
    """The other rank logs where it is before an exchange times out. When it comes, the training goes on."""
    directory = str(tmp_path)
    found = outcomes(directory, 2, train, directory, "forward", fault_cases.come_late, 1, timeout=15)
    assert found == [("returned", undisturbed())] * 2
    late, other = ((tmp_path / f"outcome-{rank}.log").read_text() for rank in (1, 0))
    waited = "of 15 seconds for the keys and values of other ranks during training step 3. Missing: rank 1 (host "
    assert other.count("has waited") == other.count(waited) == 1 and "has waited" not in late
    assert "fault_cases.py:" in other and "in come_late (training step 3)" in other


@pytest.mark.parametrize(
    "point, action, more, said",
    [
        ("forward", fault_cases.fail, {}, "raised LookupError: a fault of this rank's own"),
        ("between steps", fault_cases.leave, {}, "raised SystemExit: 3"),
        ("worker", fault_cases.fail, {"dataloader_num_workers": 1}, "raised LookupError: Caught LookupError in Data"),
        ("worker", fault_cases.kill, {"dataloader_num_workers": 1}, "raised RuntimeError: DataLoader worker"),
    ],
    ids=["exception in forward", "sys.exit between steps", "exception in a loader worker", "loader worker killed"],
)
def test_a_rank_that_ends_by_itself(point, action, more, said, tmp_path):
    directory = str(tmp_path)
    first, second = outcomes(directory, 2, train, directory, point, action, 1, **more)
    check_error(first, "Missing: rank 1 (host ", said)
    assert second[0] in said


def test_survivors_in_two_groups_agree(tmp_path):
    """In a user's loop on four ranks, three ranks raise the same error about the fourth."""
    found = outcomes(str(tmp_path), 4, fault_cases.plain_loop, fault_cases.kill, 2)
    assert found[2] == ("ended", -9)
    for rank in (0, 1, 3):  # one rank waits in its own collective, another already compares the next batch
        kind, message = found[rank]
        assert kind in ("FlashCPError", "BatchError"), found[rank]
        assert "Missing: rank 2 (host " in message and "which does not answer" in message


@pytest.mark.parametrize("action", [fault_cases.kill, fault_cases.stop], ids=["killed", "stopped"])
def test_rank_0_with_the_store(action, tmp_path):
    """Without a launcher, rank 0 holds the key-value store. The error says so, and that no rank can be asked."""
    directory = str(tmp_path)
    fault = (directory, 3, train, directory, "between steps", action, 0)
    found = outcomes(*fault, victim=0, rank_0_holds_store=True, timeout=6)
    for outcome in found[1:]:
        assert outcome[0].endswith("Error"), outcome
        assert "Missing: rank 0" in outcome[1] and "holds the key-value store" in outcome[1]


@resumes
def test_sigterm_saves_and_stops_all_ranks_after_the_same_step(tmp_path, undisturbed):
    """Only one rank gets the signal, as if one of several nodes were preempted."""
    directory, options = str(tmp_path), {"enable_jit_checkpoint": True, "steps": 12, "save_total_limit": 1}
    first, second = outcomes(directory, 2, train, directory, "between steps", fault_cases.sigterm, 1, **options)
    assert first == second and first[0] == "returned" and 3 <= first[1][1] < 12
    assert checkpoints(directory) == [f"checkpoint-{first[1][1]}"]
    resumed = outcomes(directory, 2, train, directory, resume=True, steps=12)
    assert resumed == [("returned", undisturbed(steps=12))] * 2


@resumes
def test_resuming_a_finished_run_changes_nothing(tmp_path, undisturbed):
    """A run whose process died after the last checkpoint takes no further step."""
    directory = str(tmp_path)
    for resume in (None, True):
        assert outcomes(directory, 2, train, directory, resume=resume) == [("returned", undisturbed())] * 2
    assert checkpoints(directory) == ["checkpoint-2", "checkpoint-4"]


def test_every_process_group_has_the_configured_timeout(tmp_path):
    """PyTorch gives the groups of a device mesh 30 or 10 minutes, regardless of the default group's timeout."""
    for kind, timeouts in outcomes(str(tmp_path), 4, fault_cases.group_timeouts, 2, 77, timeout=77):
        assert kind == "returned" and len(timeouts) >= 3 and set(timeouts) == {77.0}


@resumes
def test_torchrun_restarts_and_resumes(tmp_path, undisturbed):
    """With `--max-restarts 1`, a second attempt ends with the same parameters after rank 1 was killed in the first.

    With the rendezvous' own store, it would usually find the addresses of the first attempt's processes.
    """
    arguments = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "tests.fault_cases"]
    run_forked(
        torchrun.main,
        [*arguments, str(tmp_path)],
        tmp_path / "log",
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
    )
    assert not (tmp_path / "result-0").exists()
    assert (tmp_path / "result-1").read_text() == undisturbed()[0]


def test_the_recipe_resumes_when_restarted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    spec = importlib.util.spec_from_file_location("sft_recipe", ROOT / "recipes" / "sft.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    last = tmp_path / "checkpoint-4"
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert recipe.checkpoint_to_resume(arguments) is None
    for name in ("checkpoint-2", "checkpoint-4", "incomplete"):
        (tmp_path / name).mkdir()
    assert recipe.checkpoint_to_resume(arguments) is None  # a new run
    arguments.resume_from_checkpoint = "true"
    assert recipe.checkpoint_to_resume(arguments) == str(last)
    arguments.resume_from_checkpoint = "elsewhere/checkpoint-9"
    assert recipe.checkpoint_to_resume(arguments) == "elsewhere/checkpoint-9"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert recipe.checkpoint_to_resume(arguments) == str(last)
