"""Training progress as a table: one row every ten steps, above a progress bar where there is a terminal."""

import sys
from statistics import fmean, harmonic_mean

import datasets
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar


COLUMNS = {
    "loss": ("loss", ".3f", fmean),
    "tokens/s": ("flashcp_tokens_per_second", ",.0f", harmonic_mean),
    "imbalance": ("flashcp_pair_imbalance", ".3f", fmean),
    "KV share": ("flashcp_kv_fraction", ".1%", fmean),
}
"""Heading of each column: the logged value, its format, and how the values of several steps become one."""
WIDTH = 11


class ProgressTable(ProgressCallback):
    """Replaces the dictionaries that a Trainer prints.

    A row averages what was logged since the row above it. Only the main process prints, and without a terminal there
    are rows but no progress bar.

    Args:
        every (`int`): steps per row; the first and the last step have a row too.
        columns (`dict`, *optional*): more columns, as in `COLUMNS`.
    """

    def __init__(self, every=10, columns=None):
        super().__init__()
        self.every, self.columns = every, COLUMNS | (columns or {})
        self._logged, self._last_row = [], None

    @classmethod
    def install(cls, trainer, every=10, columns=None):
        """Puts the table in the place of the trainer's own progress callback."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(cls(every, columns))

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step, self._logged, self._last_row = 0, [], None
        if state.is_world_process_zero:
            # disable=None: no bar without a terminal
            self.training_bar = tqdm(
                total=state.max_steps, desc="Training", unit="step", leave=False, dynamic_ncols=True, disable=None
            )
            self.write("".join(f"{name:>{WIDTH}}" for name in ("step", *self.columns)))

    def on_prediction_step(self, args, state, control, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self._logged.append(logs)
            last = state.global_step >= state.max_steps
            if self._last_row is None or last or state.global_step // self.every > self._last_row // self.every:
                self.write(self._row(state.global_step))
                self._logged, self._last_row = [], state.global_step
        elif losses := [f"{name} {value:.4f}" for name, value in logs.items() if name.endswith("_loss")]:
            if not any(name.startswith("train_") for name in logs):
                self.write(f"{state.global_step:>{WIDTH},}   {', '.join(losses)}")

    def write(self, line):
        self.training_bar.write(line)
        sys.stdout.flush()

    def _row(self, step):
        cells = [f"{step:,}"]
        for name, form, mean in self.columns.values():
            values = [float(logs[name]) for logs in self._logged if name in logs]
            cells.append(format(mean(values), form) if values else "")
        return "".join(f"{cell:>{WIDTH}}" for cell in cells)


def print_first_and_last(trainer, names, count=5):
    """Prints the means of the first and the last logged values of each name, and returns them."""
    table, means = Table("mean of"), {}
    for which in ("first", "last"):
        table.add_column(f"{which} {count} logged", justify="right")
    for name in names:
        if values := [entry[name] for entry in trainer.state.log_history if name in entry]:
            first, last = fmean(values[:count]), fmean(values[-count:])
            means |= {f"first_{name}": first, f"last_{name}": last}
            table.add_row(name, f"{first:.3f}", f"{last:.3f}")
    if trainer.is_world_process_zero():
        Console().print(table)
    return means


def quiet_without_terminal():
    """Turns off the progress bars of datasets and transformers where they would fill a log file."""
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bar()
