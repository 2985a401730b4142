"""Loads data for TRL's trainers from the hub or from a file, or makes it from Python's standard library."""

from datasets import load_dataset


def load_rows(script_args, training_args, default, write):
    """Returns the rows of `dataset_name`, a name on the hub or a .jsonl file. Without it they are those of the file
    `default`, which `write(default)` makes if it does not exist."""
    name = script_args.dataset_name
    if name is None:
        with training_args.main_process_first(desc="data"):
            if not default.exists():
                write(default)
    if name is None or name.endswith(".jsonl"):
        return load_dataset("json", data_files=name or str(default), split="train")
    return load_dataset(name, script_args.dataset_config, split=script_args.dataset_train_split)
