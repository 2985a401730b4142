import pytest
import transformers
from packaging.version import Version

from tests import resume_cases


resumes = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 loads optimizer state to the device 'cpu:0', which torch.load does not know",
)


@resumes
def test_resuming_continues_bitwise(pool, tmp_path):
    """On two ranks, losses after the second step and parameters after the sixth equal those of an uninterrupted
    run."""
    for found in pool.run(2, resume_cases.resumed_and_not, str(tmp_path), 2, None):
        assert found["bitwise"]
        assert found["resumed_losses"] == found["losses"] and len(found["losses"]) == 6


@resumes
def test_resuming_with_another_cp_size_follows_the_same_curve(pool, tmp_path):
    """On four ranks, one group and two data-parallel groups read the same two documents per step."""
    for found in pool.run(4, resume_cases.resumed_and_not, str(tmp_path), 4, 2):
        assert found["bitwise"]
        assert found["other_losses"] == pytest.approx(found["losses"], rel=1e-5)
        assert found["other_error"] < 1e-4


def test_a_saved_model_has_no_trace_of_us(pool, tmp_path):
    for found in pool.run(2, resume_cases.traces, str(tmp_path)):
        assert found == {"mentions": [], "difference": 0.0}
