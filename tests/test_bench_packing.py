import json

import numpy as np
import pytest

from hf_flashcp.bench.plans.packing import METHODS, measure, text
from hf_flashcp.data.lengths import sample_lengths


@pytest.fixture(scope="module")
def found():
    return measure(["pile"], 8192, 3, cp_size=2, dp_size=2, gradient_accumulation_steps=2)


def test_all_methods_pack_the_same_documents(found):
    (cell,) = found["cells"]
    lengths = np.array(sample_lengths("pile", cell["documents"]))
    assert lengths[:-1].sum() < 3 * 4 * 8192 <= lengths.sum()
    assert list(cell["methods"]) == list(METHODS)
    for name, row in cell["methods"].items():
        tokens = lengths.sum() if name == "concatenate" else np.minimum(lengths, 8192).sum()
        assert row["fill_rate"] * row["packs"] * 8192 == pytest.approx(tokens)
        assert row["seconds"] > 0 and 0 <= row["time_error"] < 0.3
        assert row["micro_step_imbalance"] >= row["step_imbalance"] >= 1
    ends = np.random.default_rng(0).permutation(lengths).cumsum()
    starts = np.append(0, ends[:-1])
    windows = np.arange(8192, ends[-1], 8192)
    cut = ((starts[:, None] < windows) & (ends[:, None] > windows)).any(1).sum()
    assert cell["methods"]["concatenate"]["documents_cut"] == cut
    assert cell["methods"]["TRL bfd"]["documents_cut"] == (lengths > 8192).sum()


def test_the_table_shows_every_method(found):
    json.dumps(found)
    table = text(found)
    assert all(name in table for name in METHODS) and len(table.splitlines()) == 4 + len(METHODS)
