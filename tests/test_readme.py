"""The README: its script runs as it stands, and its predictions are what the command below them prints."""

import json
import re
from pathlib import Path

from torch.distributed import run as torchrun

from hf_flashcp.cli import main
from tests.launch_cases import run_forked


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCHEMES = {
    "hf_flashcp, default on H100s": "search_timed",
    "hf_flashcp, `hardware=None`": "search",
    "FlashCP paper, padded all-gather": "flashcp_paper",
    "Ulysses": "ulysses",
    "All-gather, zigzag per document": "per_doc_cp",
    "Zigzag ring": "zigzag_ring",
    "All-gather, zigzag of the row (Llama 3)": "llama3",
    "Ring": "ring",
}


def script_of(page):
    return re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]


def test_the_script_trains_on_two_processes(forked, tmp_path):
    (tmp_path / "train.py").write_text(script_of(README))
    arguments = ["--standalone", "--nproc-per-node", "2", "train.py"]
    log = run_forked(torchrun.main, arguments, tmp_path / "log", cwd=tmp_path, OMP_NUM_THREADS="1")
    losses = [float(loss) for loss in re.findall(r"'loss': '([0-9.]+)'", log)]
    moved = [float(share) for share in re.findall(r"'flashcp_kv_fraction': '([0-9.]+)'", log)]
    assert len(losses) == len(moved) == 9
    assert losses[-1] < losses[0] and 0 < max(moved) < 0.75


def test_the_first_page_of_the_site_has_the_same_script():
    assert script_of((ROOT / "docs" / "index.md").read_text(encoding="utf-8")) == script_of(README)


def test_predictions_are_those_of_the_command(capsys):
    cells = []
    for gpus in ("8 16", "64"):
        command = re.search(
            rf"^flashcp (simulate --lengths-from [^\\]*)\\\n(.*--cp-size {gpus})$", README, re.MULTILINE
        )
        main([*" ".join(command.groups()).split(), "--json"])
        cells += json.loads(capsys.readouterr().out)["cells"]
    table = README.replace("**", "")
    for title, name in SCHEMES.items():
        rows = [cell["schemes"].get(name) for cell in cells]
        figures = [f"{rows[0]['intra_node_bytes'] / 2**30:.2f} GiB"]
        figures += [f"{1000 * row['step_seconds']:,.0f}" if row else "needs 64 heads" for row in rows]
        assert f"| {' | '.join([title, *figures])} |" in table
