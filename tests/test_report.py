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


def write_state(folder, history=HISTORY, **state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, **state}))


def test_a_page_of_a_run(tmp_path, capsys):
    """The page has the newest checkpoint's logs, with a panel for each logged metric, also for unknown ones."""
    write_state(tmp_path / "run" / "checkpoint-9", HISTORY[:1])
    write_state(tmp_path / "run" / "checkpoint-10")
    (tmp_path / "run" / "checkpoint-best").mkdir()
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "checkpoint-10" / "report.html").read_text()
    headings = re.findall('<img src="data:image/svg\\+xml;base64,[A-Za-z0-9+/=]+" alt="(.*) over the steps">', page)
    assert headings == ["Loss", "Imbalance", "KV share", "Gradient norm", "flashcp_of_my_own"]
    cards = re.findall("<div><b>(.*?)</b><span>(.*?)</span>", page)
    assert cards == [
        ("3.000", "loss"),
        ("3.500", "evaluation loss"),
        ("1.030", "attention imbalance"),
        ("60%", "KV share"),
    ]
    assert "<p>2 steps</p>" in page and "prefers-color-scheme: dark" in page
    assert "http" not in re.sub('base64,[^"]*', "", page), "the page loads nothing"
    assert (
        "<td>flashcp_pair_imbalance</td><td>1.04</td><td>1.02</td><td>1.02</td><td>1.04</td><td>1.03</td><td>2</td>"
        in page
    )
    printed = capsys.readouterr().out
    assert re.search("\nloss +3 +3.5 +2\n", printed)
    assert (tmp_path / "run" / "checkpoint-10" / "report.html").as_uri() in printed


def test_a_long_run_has_running_means(tmp_path):
    """Hundreds of steps, with values that cannot be drawn among them, and how long the run took."""
    history = [{"step": step, "loss": 9 - step / 100, "flashcp_tokens_per_second": 1000.0} for step in range(1, 201)]
    history[7] |= {"loss": float("nan"), "flashcp_tokens_per_second": 0.0}
    write_state(tmp_path, [*history, {"step": 200, "train_runtime": 600.0, "num_input_tokens_seen": 1_638_400}])
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<p>200 steps, 1,638,400 tokens, 10.0 minutes</p>" in page
    assert "<b>1,000</b><span>tokens per second</span>" in page and "<b>7.000</b><span>loss</span>" in page


def test_the_kernels_that_ran(tmp_path, capsys):
    kernels = {"flash_attn_3": 22, "<eager>": 4}
    recorded = {"hf_flashcp": {"args": {}, "attributes": {"kernels": kernels}}}
    write_state(tmp_path, stateful_callbacks=recorded)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<p>2 steps, attention by flash_attn_3 and &lt;eager&gt;</p>" in page
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == list(kernels)


@pytest.mark.parametrize("recorded", [None, [], {"hf_flashcp": None}, {"hf_flashcp": {"attributes": {"kernels": 1}}}])
def test_a_state_without_kernels(tmp_path, recorded):
    write_state(tmp_path, stateful_callbacks=recorded)
    assert main(["report", str(tmp_path)]) == 0
    assert "<p>2 steps</p>" in (tmp_path / "report.html").read_text()


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
