import os
from multiprocessing import forkserver
from pathlib import Path

import hypothesis
import pytest


os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="session")
def forked():
    """Processes that multiprocessing's forkserver starts have imported everything already."""
    cases = [f"tests.{path.stem}" for path in Path(__file__).parent.glob("*_cases.py")]
    forkserver.set_forkserver_preload(["trl", "hf_flashcp.integrations.trainer", *cases])
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def pool(forked):
    from hf_flashcp.doctor.workers import WorkerPool

    workers = WorkerPool()
    yield workers
    workers.close()
