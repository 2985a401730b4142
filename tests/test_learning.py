"""recipes/learning: documents follow docs/benchmarks.md, losses of one process and two agree, figures are drawn."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from recipes.learning import figures
from recipes.learning.retrieval import (
    FAR,
    FAR_KEYS,
    FIRST_FILLER,
    FIRST_QUESTION,
    FIRST_VALUE,
    IGNORE_INDEX,
    KEYS,
    NEAR,
    VALUES,
    accuracy_by_distance,
    cut,
    make_document,
    make_documents,
)
from tests.learning_cases import log_of_training


def entries(tokens):
    """Return keys and values by position."""
    return {place: divmod(int(token), VALUES) for place, token in enumerate(tokens) if token < FIRST_QUESTION}


def questions(tokens):
    """Return the position of each question by its key."""
    return {int(t) - FIRST_QUESTION: i for i, t in enumerate(tokens) if FIRST_QUESTION <= t < FIRST_VALUE}


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(400, 2048))
def test_answers_stand_at_the_stated_distance(seed, num_tokens):
    tokens, labels, distances = make_document(np.random.default_rng(seed), num_tokens)
    asked, found = questions(tokens), entries(tokens)
    assert len(tokens) == len(labels) == num_tokens and len(asked) == len(found) == KEYS
    for (key, place), distance in zip(asked.items(), distances):
        assert found[place - distance] == (key, tokens[place + 1] - FIRST_VALUE)
        assert labels[place + 1] == tokens[place + 1] < FIRST_FILLER
        assert distance >= FAR if key >= FAR_KEYS else 0 < distance < NEAR
    assert (labels != IGNORE_INDEX).sum() == KEYS


@settings(max_examples=10)
@given(st.integers(0, 1000), st.integers(NEAR + 2 * KEYS, FAR))
def test_windows_contain_near_entries_with_their_questions_but_never_far_ones(seed, window):
    documents, _ = make_documents(seed, 3, 512, 900)
    pieces = cut(documents, window)
    for column in ("input_ids", "labels"):
        assert max(map(len, pieces[column])) <= window
        assert sorted(sum(pieces[column], [])) == sorted(sum(documents[column], []))
    for tokens in pieces["input_ids"]:
        keys = {key for key, _ in entries(tokens).values()}
        assert {key for key in questions(tokens) if key in keys} == {k for k in questions(tokens) if k < FAR_KEYS}
    assert sum(len(questions(tokens)) for tokens in pieces["input_ids"]) == 3 * KEYS


def test_accuracy_by_distance_counts_each_question_in_its_bin():
    documents, distances = make_documents(0, 4, 512, 900)
    longest = max(map(len, documents["labels"]))
    labels = np.array([row + [IGNORE_INDEX] * (longest - len(row)) for row in documents["labels"]])
    guessed = np.roll(labels, -1, axis=1)
    rows, places = (labels != IGNORE_INDEX).nonzero()
    far = distances.ravel() >= 512
    guessed[rows[far], places[far] - 1] = 0
    prediction = type("Prediction", (), {"predictions": guessed, "label_ids": labels})
    metrics = accuracy_by_distance(distances)(prediction)
    assert metrics.pop("accuracy") == pytest.approx(1 - far.mean())
    assert metrics == {f"accuracy_{octave}": float(octave < 512) for octave in (0, 32, 64, 256, 512)}


def test_one_process_and_two_have_the_same_loss_curve(pool, tmp_path):
    """Losses of ten steps in fp32 agree to 1e-6; measured were 2e-7, which is one rounding step in fp32."""
    options = "--num_documents 60 --num_eval_documents 3 --max_tokens 768 --row_tokens 1024 --max_steps 10"
    options += f" --logging_steps 1 --eval_steps 10 --disable_tqdm true --output_dir {tmp_path}"
    (one, cp1), *_ = pool.run(1, log_of_training, *options.split())
    (two, cp2), *_ = pool.run(2, log_of_training, *options.split())
    assert (cp1, cp2) == (1, 2)
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (one, two)]
    assert len(losses[0]) == 10 and sum(entry.get("flashcp_kv_fraction", 0) for entry in two) > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-6, abs=0)
    evaluations = [next(entry for entry in log if "eval_accuracy" in entry) for log in (one, two)]
    assert evaluations[1]["eval_loss"] == pytest.approx(evaluations[0]["eval_loss"], rel=1e-6, abs=0)
    assert evaluations[0].keys() == evaluations[1].keys()


def test_figures_of_small_runs(tmp_path, capsys):
    evaluation = {f"eval_accuracy{octave}": 0.5 for octave in ("", "_0", "_128", "_256")}
    logs = {
        "cp1": [{"step": step, "loss": 4.0 - step} for step in (1, 2)],
        "cp2": [{"step": step, "loss": loss, "flashcp_kv_fraction": 0.75} for step, loss in ((1, 3.0), (2, 2.002))],
        "whole": [{"step": 5, **evaluation}, {"step": 10, **evaluation, "eval_accuracy_256": 1.0}],
        "windows": [{"step": 5, **evaluation}, {"step": 10, **evaluation, "eval_accuracy_256": 0.125}],
    }
    for run, log_history in logs.items():
        (tmp_path / run).mkdir()
        TrainerState(log_history=log_history).save_to_json(str(tmp_path / run / "trainer_state.json"))
    figures.main([str(tmp_path), "--figures", str(tmp_path / "images"), "--json", str(tmp_path / "all.json")])
    printed = capsys.readouterr().out
    assert "largest relative difference: 1.0e-03, at step 2 of 2" in printed
    assert "equal losses: 1 of 2 steps" in printed
    assert "0 to 127               50.0%            50.0%" in printed
    assert "256 to 511              100.0%            12.5%" in printed
    assert json.loads((tmp_path / "all.json").read_text())["curves"]["relative_difference"] == [0, pytest.approx(1e-3)]
    for name in ("learning_curves.png", "learning_retrieval.png"):
        assert (tmp_path / "images" / name).stat().st_size > 10_000
