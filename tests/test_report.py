"""The report command: a page of a Trainer's logs, and errors if there are none."""

import json
import re

import pytest

from hf_flashcp.cli import main


HISTORY = [
    {
        "step": 1,
        "epoch": 0.1,
        "loss": 4.0,
        "flashcp_pair_imbalance": 1.04,
        "flashcp_kv_fraction": 0.5,
        "grad_norm": 2.0,
    },
    {
        "step": 2,
        "epoch": 0.2,
        "loss": 3.0,
        "flashcp_pair_imbalance": 1.02,
        "flashcp_kv_fraction": 0.7,
        "grad_norm": 1.0,
    },
    {"step": 2, "epoch": 0.2, "eval_loss": 3.5, "flashcp_of_my_own": 1},
]


def write_state(folder, history=HISTORY):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_a_page_of_a_run(tmp_path, capsys):
    """The page has the newest checkpoint's logs, with a panel for each logged metric, also for unknown ones."""
    write_state(tmp_path / "run" / "checkpoint-9", HISTORY[:1])
    write_state(tmp_path / "run" / "checkpoint-10")
    (tmp_path / "run" / "checkpoint-best").mkdir()
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "checkpoint-10" / "report.html").read_text()
    headings = re.findall('<img src="data:image/svg\\+xml;base64,[A-Za-z0-9+/=]+" alt="(.*) over the steps">', page)
    assert headings == [
        "Loss (nats per target)",
        "Imbalance (max / mean over ranks)",
        "KV moved, as a share of an all-gather",
        "Gradient norm",
        "flashcp_of_my_own",
    ]
    assert "http" not in re.sub('base64,[^"]*', "", page), "the page loads nothing"
    assert "<td>flashcp_pair_imbalance</td><td>1.04</td><td>1.02</td><td>1.02</td><td>1.04</td><td>1.03</td>" in page
    assert re.search("\nloss +3 +3.5 +2\n", capsys.readouterr().out)


def test_the_summary_as_json(tmp_path, capsys):
    write_state(tmp_path)
    assert main(["report", str(tmp_path / "trainer_state.json"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert summary["loss"] == {"first": 4.0, "last": 3.0, "least": 3.0, "most": 4.0, "mean": 3.5, "entries": 2}
    assert list(tmp_path.iterdir()) == [tmp_path / "trainer_state.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "There is no trainer_state.json in"),
        ("[]", "is not a Trainer's trainer_state.json"),
        ("{", "is not a Trainer's trainer_state.json"),
        ('{"log_history": []}', "has no logged values"),
    ],
)
def test_no_logs(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
