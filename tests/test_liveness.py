"""The liveness thread logs which ranks are missing while a GPU waits, because the main thread raises no error then."""

import contextlib

import pytest
import torch

from hf_flashcp.distributed import location
from tests import liveness_cases
from tests.liveness_cases import Event


@pytest.mark.parametrize("line", ["first", "second"])
def test_an_exchange_that_a_gpu_waits_for(pool, line):
    """Ranks whose GPU waits are not missing, wherever their main thread is. A later stall is another check."""
    (message,), missing, _ = pool.run(3, liveness_cases.exchange_that_a_gpu_waits_for, line)
    assert message.startswith("Rank 0 (host ") and "of 8 seconds for the keys during a collective." in message
    assert "Missing: rank 1 (host " in message and message.endswith(f" in {line}.") and "rank 2" not in message
    assert not missing


def test_an_error_of_a_rank_that_nobody_waits_for_in_python(pool):
    (message,), second = pool.run(2, liveness_cases.error_of_another_rank)
    assert message.startswith("Rank 0 (host ") and "is in my loop. Missing: rank 1 (host " in message
    assert "which raised LookupError: a fault of this rank's own." in message and not second


@pytest.mark.parametrize("answer, over", [(False, False), (True, True), (RuntimeError("captured"), True)])
def test_a_wait_is_over_when_the_exchange_has_arrived(monkeypatch, answer, over):
    recorded = []
    event = Event(answer)
    event.record = recorded.append
    monkeypatch.setattr(location, "_event", lambda device: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    with location.waiting_for("keys", torch.device("cuda", 0)):
        assert location.current_wait().waited_for == "keys" and not recorded
    assert recorded == ["the stream"] and (location.current_wait() is None) == over
    monkeypatch.setattr(location, "_latest", None)


def test_the_host_waits_on_a_cpu():
    for error in (None, RuntimeError()):
        with contextlib.suppress(RuntimeError), location.waiting_for("keys", torch.device("cpu")):
            assert location.current_wait().waited_for == "keys"
            if error:
                raise error
        assert location.current_wait() is None
