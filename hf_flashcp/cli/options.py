"""Options that several commands share, functions that read their values, and how commands print results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..data.lengths import LENGTH_DISTRIBUTIONS, draw_pack, read_lengths, sample_pack
from ..errors import ConfigurationError, PlanError
from ..predict import HARDWARE
from ..predict.training_setup import GRADIENT_CHECKPOINTING


STRATEGY = "how documents are sharded over ranks (default %(default)s)"
"""Help text of `--strategy`."""


def add_number(
    parser: argparse.ArgumentParser,
    option: str,
    default: int | Sequence[int] | None = None,
    text: str = "",
    *,
    least: int | None = None,
    **settings: Any,
) -> None:
    """Add an option for whole numbers, with its default in the help text. Numbers below `least` are an error."""
    if default is not None:
        shown = default if isinstance(default, int) else " ".join(map(str, default))
        text = f"{text} (default {shown})".lstrip()
    if least is not None:
        settings |= {"action": _AtLeast, "const": least}
    parser.add_argument(option, type=int, default=default, metavar="N", help=text or None, **settings)


class _AtLeast(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        least = min(values) if isinstance(values, list) else values
        if least < self.const:
            raise PlanError(f"{self.option_strings[0]} must be at least {self.const}, got {least}.")
        setattr(namespace, self.dest, values)


def add_json(parser: argparse.ArgumentParser, what: str = "everything") -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON and nothing else")


def add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    text = f"draw {what} to a file (.png, .svg, .pdf); needs the extra 'plot'"
    parser.add_argument("--plot", metavar="FILE", help=text)


def add_model(parser: argparse.ArgumentParser, note: str = "", *, required: bool = False) -> None:
    text = "a model's config.json, or a folder or hub name that has one"
    parser.add_argument("--model", required=required, metavar="CONFIG", help=f"{text} {note}".strip())


def add_hardware(parser: argparse.ArgumentParser, note: str = "hardware profile:", **settings: Any) -> None:
    text = f"{note} {', '.join(HARDWARE)}, or a JSON file"
    if default := settings.get("default"):
        text += f" (default {default if isinstance(default, str) else ' '.join(default)})"
    parser.add_argument("--hardware", metavar="NAME", help=text, **settings)


def add_checkpointing(parser: argparse.ArgumentParser, default: str | None = "none") -> None:
    parser.add_argument(
        "--activation-checkpointing",
        "--gradient-checkpointing",
        dest="gradient_checkpointing",
        choices=GRADIENT_CHECKPOINTING,
        default=default,
        help=f"activation checkpointing of the layers (default {default or PROPOSED})",
    )


PROPOSED = "the cheapest that fits"
"""What the help says of options whose value is proposed unless it is given."""


def add_remedies(parser: argparse.ArgumentParser) -> None:
    """Add the options that save memory. Those that are not given are `None`, except `--keep-logits`."""
    add_checkpointing(parser, None)
    note = f"(default {PROPOSED})"
    flag: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": None}
    parser.add_argument("--offload", **flag, help=f"keep what checkpointing saves in the host's memory {note}")
    add_number(parser, "--every-n-layers", text=f"checkpoint the first of every N layers {note}")
    add_number(parser, "--head-groups", text=f"groups of KV heads that attention computes in turn {note}")
    add_number(parser, "--mlp-tiles", text=f"tiles of tokens that a feed-forward block computes in turn {note}")
    parser.add_argument("--keep-received-kv", **flag, help=f"keep received KV until the layer's backward {note}")
    parser.add_argument("--keep-logits", action="store_true", help="hold the logits of all tokens")


def add_corpus(parser: Any, note: str = "") -> None:
    text = f"draw documents like those of a corpus: {', '.join(LENGTH_DISTRIBUTIONS)} {note}"
    parser.add_argument("--lengths-from", choices=LENGTH_DISTRIBUTIONS, metavar="CORPUS", help=text.rstrip())


def add_documents(parser: argparse.ArgumentParser) -> Any:
    """Add the options that [`documents`] reads, and return their mutually exclusive group for more of them."""
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--lengths", type=comma_separated, metavar="N,N,...", help="tokens in each document of a packed row, in order"
    )
    add_corpus(given)
    add_number(parser, "--window", text="tokens in a packed row, with --lengths-from")
    add_number(parser, "--seed", 0, "random seed of the first row that is drawn")
    return given


def documents(arguments: argparse.Namespace, packs: int = 1) -> list[list[int]]:
    """Return the document lengths of each row, in tokens."""
    if arguments.lengths is not None:
        if arguments.window is not None:
            raise PlanError("--window goes with --lengths-from: --lengths already says how long the row is.")
        return [arguments.lengths]
    if arguments.window is None:
        option = "--lengths-file" if arguments.lengths_from is None else "--lengths-from"
        raise PlanError(f"{option} needs --window: the number of tokens to draw documents for.")
    seeds = range(arguments.seed, arguments.seed + packs)
    if arguments.lengths_from is not None:
        return [sample_pack(arguments.lengths_from, arguments.window, seed=seed) for seed in seeds]
    lengths = read_lengths(arguments.lengths_file, arguments.column)
    return [draw_pack(lengths, arguments.window, seed=seed) for seed in seeds]


def comma_separated(text: str) -> list[int]:
    """Parse an option's value, for example 4096,1024,512, into whole numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers separated by commas, for example 4096,1024,512"
        ) from None


def read_config(name: str) -> Any:
    """Return a model's config from a file, a folder or the hub; local files are read as JSON, without transformers."""
    path = Path(name)
    try:
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("the file does not hold a JSON object")
            return config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, RecursionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"--model {name}: no config could be read ({reason}). Pass a config.json, a folder that has one, or a hub "
            "name."
        ) from None


def load_config(name: str) -> Any:
    """Return transformers' config object for a hub name, a directory, a file or a model type."""
    from transformers import AutoConfig

    from ..doctor.tiny import causal_language_models, default_config

    try:
        if name in causal_language_models() and not Path(name).exists():
            return default_config(name)
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise many kinds of errors
        raise ConfigurationError(
            f"No usable config for {name!r}. Pass a hub name, a directory with a config.json, that file itself, or a "
            f"model type (for example llama). transformers says: {' '.join(str(error).split())[:200]}"
        ) from None


def show(found: Any, text: Callable[[Any], str], as_json: bool, indent: int | None = None) -> None:
    """Print a result as text, or as JSON with null in place of numbers that are not finite."""
    if not as_json:
        print(text(found))
        return
    print(json.dumps(json.loads(json.dumps(found), parse_constant=lambda name: None), indent=indent))
