import json

from hf_flashcp.bench import rows
from tests.test_bench_step import TINY
from tests.test_cli import run


def test_command(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    line = f"bench rows --rows 3 --longest 64 --rounds 1 --model {tmp_path / 'config.json'} --json"
    code, out, _ = run(capsys, line)
    found = json.loads(out)
    assert code == 0 and [len(lengths) for lengths in found["lengths"]] == [3, 3]
    padded, own, turns = found["cases"]
    counts = [sum(lengths) for lengths in found["lengths"]]
    assert padded["tokens"] == max(3 * max(lengths) for lengths in found["lengths"])
    assert own["tokens"] == -(-sum(counts) // 2)
    assert turns["tokens"] == -(-max(counts) // 2)
    for case in found["cases"]:
        assert case["seconds"] > 0 and case["relative_seconds"] > 0 and case["peak_bytes"] > 0
    table = rows.text(found)
    assert "3 rollouts of" in table and "2 processes" in table and "turns" in table
