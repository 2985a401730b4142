"""Print tables and draw figures of the runs that run.sh starts.

python recipes/learning/figures.py outputs/learning [--figures docs/images] [--json FILE]
"""

import argparse
import json
from pathlib import Path

from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_flashcp.cli.plots import COLOURS, INK, new_figure, save_figure


GUESSING = 1 / 8  # of retrieval.py's VALUES
LIGHT, DARK, OTHER = COLOURS[0], INK, COLOURS[1]


def log_history(run):
    """Reads a Trainer's logs from its output directory or the last checkpoint in it."""
    state = run / "trainer_state.json"
    return TrainerState.load_from_json(
        state if state.exists() else Path(get_last_checkpoint(run), state.name)
    ).log_history


def loss_curves(runs):
    """Returns the losses of one process and of two by step, and their relative differences."""
    moved = [entry["flashcp_kv_fraction"] for entry in log_history(runs / "cp2") if "loss" in entry]
    one, two = (
        {entry["step"]: entry["loss"] for entry in log_history(runs / name) if "loss" in entry}
        for name in ("cp1", "cp2")
    )
    if one.keys() != two.keys():
        raise SystemExit(f"{runs}: cp1 and cp2 have not logged the same steps.")
    relative = [abs(one[step] - two[step]) / one[step] for step in one]
    return {
        "steps": list(one),
        "cp1": list(one.values()),
        "cp2": list(two.values()),
        "relative_difference": relative,
        "cp2_kv_fraction": sum(moved) / len(moved),
    }


def accuracies(run):
    """Returns the steps of the evaluations and their accuracies, by the lower end of each octave of distance."""
    evaluations = [entry for entry in log_history(run) if "eval_accuracy" in entry]
    octaves = sorted(int(key.rpartition("_")[2]) for key in evaluations[-1] if key.startswith("eval_accuracy_"))
    return {
        "steps": [entry["step"] for entry in evaluations],
        "accuracy": {octave: [entry[f"eval_accuracy_{octave}"] for entry in evaluations] for octave in octaves},
    }


def ranges(octaves):
    """Returns the shortest and longest distance of each octave. The first range begins at 0."""
    return [(octave, 2 * octave - 1 if octave else octaves[1] - 1) for octave in octaves]


def mean_over(run, octaves):
    return [sum(values) / len(octaves) for values in zip(*(run["accuracy"][octave] for octave in octaves))]


def print_tables(curves, whole, cut, window):
    print("step      cp 1      cp 2  relative difference")
    last = len(curves["steps"]) - 1
    for i in sorted({0, 1, *range(9, last, 10), last} & set(range(last + 1))):
        difference = curves["relative_difference"][i]
        print(f"{curves['steps'][i]:>4}{curves['cp1'][i]:>10.6f}{curves['cp2'][i]:>10.6f}{difference:>21.1e}")
    largest = max(curves["relative_difference"])
    step = curves["steps"][curves["relative_difference"].index(largest)]
    print(f"largest relative difference: {largest:.1e}, at step {step} of {curves['steps'][-1]}")
    print(f"equal losses: {curves['relative_difference'].count(0)} of {last + 1} steps")
    print(f"KV sent with two processes: {curves['cp2_kv_fraction']:.0%} of an all-gather\n")
    print(f"distance, tokens   whole documents   windows of {window}")
    for low, high in ranges(list(whole["accuracy"])):
        print(f"{low:>7,} to {high:<5,}{whole['accuracy'][low][-1]:>18.1%}{cut['accuracy'][low][-1]:>17.1%}")


def draw_curves(curves, path):
    figure = new_figure(8, 5.2)
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    losses.plot(curves["steps"], curves["cp1"], color=LIGHT, linewidth=5, label="1 process (cp 1)")
    losses.plot(curves["steps"], curves["cp2"], color=DARK, linewidth=1.2, label="2 processes (cp 2)")
    losses.set_ylabel("loss (nats per token)")
    losses.legend(frameon=False)
    differences.semilogy(curves["steps"], curves["relative_difference"], "o", color=DARK, markersize=3.5)
    differences.axhline(2**-23, color=OTHER, linestyle="--", linewidth=1.2, label="largest spacing of fp32 numbers")
    differences.set_ylim(1e-8, max(1e-5, 2 * max(curves["relative_difference"])))
    differences.legend(frameon=False)
    differences.set_ylabel("|difference| / loss\n(equal: not drawn)")
    differences.set_xlabel("optimizer step")
    finish(figure, path)


def draw_retrieval(whole, cut, window, path):
    figure = new_figure(11, 4.4)
    by_distance, by_step = figure.subplots(1, 2, sharey=True)
    octaves = list(whole["accuracy"])
    labels = [f"{low:,}–{high:,}" for low, high in ranges(octaves)]
    near = [octave for octave in octaves if octave < window]
    far = [octave for octave in octaves if octave >= window]
    for run, name, colour in ((whole, "whole documents", DARK), (cut, f"windows of {window} tokens", OTHER)):
        values = [100 * run["accuracy"][octave][-1] for octave in octaves]
        by_distance.plot(range(len(octaves)), values, "o-", color=colour, label=f"trained on {name}")
        for group, style, where in ((near, ":", "less than"), (far, "-", "at least")):
            values = [100 * value for value in mean_over(run, group)]
            by_step.plot(run["steps"], values, style, color=colour, label=f"{name}, {where} {window} tokens apart")
    by_distance.axvline(len(near) - 0.5, color="#bbbbbb", linewidth=1)
    for axes in (by_distance, by_step):
        axes.axhline(100 * GUESSING, color=COLOURS[8], linestyle="--", linewidth=1, label="guessing")
        axes.legend(frameon=False, fontsize=8)
        axes.set_ylim(0, 105)
    by_distance.set_xticks(range(len(octaves)), labels, fontsize=8)
    by_distance.set_xlabel("tokens between the entry and its question")
    by_distance.set_ylabel("right answers (%)")
    by_step.set_xlabel("optimizer step")
    finish(figure, path)


def finish(figure, path):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    save_figure(figure, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="directory with the runs cp1, cp2, whole and windows")
    parser.add_argument("--window", type=int, default=256, help="window of the run on windows (default 256)")
    parser.add_argument("--figures", type=Path, help="write learning_curves.png and learning_retrieval.png there")
    parser.add_argument("--json", type=Path, help="write the plotted values there")
    options = parser.parse_args(argv)
    curves = loss_curves(options.runs)
    whole, cut = accuracies(options.runs / "whole"), accuracies(options.runs / "windows")
    print_tables(curves, whole, cut, options.window)
    if options.figures:
        options.figures.mkdir(parents=True, exist_ok=True)
        draw_curves(curves, options.figures / "learning_curves.png")
        draw_retrieval(whole, cut, options.window, options.figures / "learning_retrieval.png")
    if options.json:
        options.json.write_text(json.dumps({"curves": curves, "whole": whole, "windows": cut}, indent=1) + "\n")


if __name__ == "__main__":
    main()
