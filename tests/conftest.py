import importlib.util
import os
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import hypothesis
import pytest

from hf_flashcp.planning.settings import remember_owner
from tests import leftovers


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; such small operators gain nothing
# PyTorch looks up the host name of every connection. Without this, a DNS server that drops a query costs 5 seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:3")

hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the tensors of the tests are; cuda runs the tests marked for it, every rank on one GPU "
        "(default: %(default)s)",
    )
    parser.addoption(
        "--kernel-library",
        metavar="FILE",
        help="with --device cuda: FlashAttention-3's library, whose kernel is then tested too (docs/gpu.md)",
    )


def pytest_configure(config):
    """Pass the device on to tests/device.py, here and in the workers, and register the check for leftover
    processes."""
    config.pluginmanager.register(leftovers)
    device = config.getoption("--device")
    os.environ["FLASHCP_TEST_DEVICE"] = device
    if device == "cpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
        return
    # Workers are forked from a server, in which imports that check for a GPU must not initialize CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    if not (config.option.collectonly or torch.cuda.is_available()):
        raise pytest.UsageError(
            f"--device cuda: PyTorch sees no GPU (torch {torch.__version__}, CUDA_VISIBLE_DEVICES is "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Leave --device out to run on the CPU."
        )
    if library := config.getoption("--kernel-library"):
        from hf_flashcp.attention.kernels import load_kernel_library

        os.environ["FLASHCP_TEST_KERNEL_LIBRARY"] = str(load_kernel_library(library))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Send a file with a fixture of module scope to one worker, so that the fixture is made once.

    pytest-xdist's own `--dist loadgroup` ignores its marks under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return scope_of(nodeid)

    return Scheduling(config, log)


def scope_of(nodeid):
    """Return the file of a test that shares a fixture with its file, otherwise the test's own id."""
    file = nodeid.split("::")[0]
    return file if shares_a_fixture(file) else nodeid


@cache
def shares_a_fixture(file):
    return 'scope="module"' in (Path(__file__).parent.parent / file).read_text(encoding="utf-8")


_FILES_LEFT_OUT = pytest.StashKey[list]()


def pytest_ignore_collect(collection_path, config):
    """Do not import files without a test for the device, because they may need packages that a GPU machine lacks."""
    if config.getoption("--device") == "cpu" or not collection_path.match("test_*.py"):
        return None
    if "pytest.mark.devices(" in collection_path.read_text():
        return None
    config.stash.setdefault(_FILES_LEFT_OUT, []).append(collection_path)
    return True


def pytest_collection_modifyitems(config, items):
    device = config.getoption("--device")
    left_out = [item for item in items if device not in _devices(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if device in _devices(item)]


def _devices(item):
    marker = item.get_closest_marker("devices")
    return marker.args if marker else ("cpu",)


def pytest_terminal_summary(terminalreporter, config):
    files, tests = config.stash.get(_FILES_LEFT_OUT, []), terminalreporter.stats.get("deselected", [])
    if config.getoption("--device") != "cpu":
        terminalreporter.write_line(
            f"--device {config.getoption('--device')}: left out tests that do not depend on the device: {len(files)} "
            f"files, and {len(tests)} tests in other files."
        )


@pytest.fixture(autouse=True)
def no_plugin():
    """Forget the plugin of the previous test, so that it does not affect this one."""
    remember_owner(None)


@pytest.fixture(scope="session")
def forked():
    """Let multiprocessing's forkserver import everything in advance, so that its processes start quickly."""
    cases = [f"tests.{path.stem}" for path in Path(__file__).parent.glob("*_cases.py")]
    trl = ["trl"] if importlib.util.find_spec("trl") else []
    forkserver.set_forkserver_preload([*trl, "hf_flashcp.integrations.trainers.trainer", *cases])
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def pool(forked, pytestconfig):
    from hf_flashcp.distributed.workers import TIMEOUT, WorkerPool
    from tests.accelerate_state import without_plugin

    class FreshPool(WorkerPool):
        def outcomes(self, world_size, function, *args, timeout=TIMEOUT):
            return super().outcomes(world_size, without_plugin, function, *args, timeout=timeout)

    workers = FreshPool(device=pytestconfig.getoption("--device"))
    yield workers
    workers.close()
