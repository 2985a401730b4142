"""What commands that predict times share: a model's config and the option of activation checkpointing.

A config.json is read as it is; only hub names need transformers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..predict.training_setup import GRADIENT_CHECKPOINTING


def add_checkpointing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activation-checkpointing",
        "--gradient-checkpointing",
        dest="gradient_checkpointing",
        choices=GRADIENT_CHECKPOINTING,
        default="none",
        help="default: %(default)s",
    )


def read_config(name: str) -> Any:
    """The config in a file, a folder, or on the hub.

    Raises:
        ConfigurationError: nothing there, or nothing that can be read.
    """
    path = Path(name)
    try:
        if path.is_dir():
            path = path / "config.json"
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("not an object in JSON")
            return config
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, RecursionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigurationError(
            f"--model {name}: no config could be read ({reason}). Give a config.json, a folder with one, or a name on "
            "the hub."
        ) from None
