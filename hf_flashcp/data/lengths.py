"""Document lengths like those of real corpora, drawn from binned counts. Nothing here imports torch.

`length_distributions.json` holds the counts. Each corpus has its `source` and its `bins`, each of which is
`[shortest, longest, documents]` with inclusive lengths in tokens. A single lognormal distribution does not fit the
tails of these corpora, so lengths are drawn from the bins.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import PlanError
from ..plan.lengths import MOST_TOKENS


_DISTRIBUTIONS = json.loads(Path(__file__).with_name("length_distributions.json").read_text(encoding="utf-8"))

LENGTH_DISTRIBUTIONS = tuple(_DISTRIBUTIONS)
"""Names of the distributions that `sample_lengths` and `sample_pack` accept."""

_DRAWN_AT_ONCE = 256


def sample_lengths(name: str, count: int, *, seed: int = 0) -> list[int]:
    """Draw document lengths from a corpus: a bin by its number of documents, then a log-uniform length inside it.

    Args:
        name (`str`): one of `LENGTH_DISTRIBUTIONS`.
        count (`int`): number of documents.
        seed (`int`, *optional*, defaults to 0): random seed. Equal seeds give equal lengths, and a smaller count gives
            a prefix of a larger one.

    Returns:
        `list[int]`: number of tokens of each document, at least 1.

    Raises:
        PlanError: the name is unknown, or the count or seed is negative.
    """
    count = _whole_number("count", count, at_least=0)
    drawn = _draw_forever(name, seed)
    return [next(drawn) for _ in range(count)]


def sample_pack(name: str, window: int, *, seed: int = 0) -> list[int]:
    """Draw document lengths until a window is full. The last document is truncated to fit.

    Args:
        name (`str`): one of `LENGTH_DISTRIBUTIONS`.
        window (`int`): number of tokens in the packed row.
        seed (`int`, *optional*, defaults to 0): random seed, with which [`sample_lengths`] draws the same documents.

    Returns:
        `list[int]`: number of tokens of each document; they add up to `window`.

    Raises:
        PlanError: the name is unknown, the window is shorter than one token, or the seed is negative.
    """
    return _fill(_draw_forever(name, seed), _whole_number("window", window, at_least=1))


def read_lengths(path: str | Path, column: str = "length") -> list[int]:
    """Read document lengths from a file.

    Args:
        path (`str` or `Path`): a `.jsonl` file with one document per line, or any other text file with whole numbers
            separated by spaces, commas or line breaks.
        column (`str`, *optional*, defaults to `"length"`): column of a `.jsonl` file that holds the number of tokens
            of a document, or its tokens.

    Returns:
        `list[int]`: number of tokens of each document.

    Raises:
        PlanError: the file cannot be read, a line has no length, or a document is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"Document lengths cannot be read from {path}: {error}.") from None
    lengths = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found = _lengths_in_line(line, column if Path(path).suffix == ".jsonl" else None)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise PlanError(
                f"{path}, line {number} has no document length: give whole numbers, or, in a .jsonl file, objects "
                f"whose {column!r} is the number of tokens or a list of the tokens."
            ) from None
        if min(found, default=1) < 1:
            raise PlanError(
                f"{path}, line {number} has a document of {min(found)} tokens: drop empty documents first."
            )
        lengths += found
    return lengths


def _lengths_in_line(line: str, column: str | None) -> list[int]:
    if column is None:
        return [int(word) for word in line.replace(",", " ").split()]
    if not line.strip():
        return []
    value = json.loads(line)[column]
    return [len(value) if isinstance(value, list) else operator.index(value)]


def draw_pack(lengths: Sequence[int], window: int, *, seed: int = 0) -> list[int]:
    """Fill a window with documents in random order, each used at most once. The last one is truncated to fit."""
    space = _whole_number("window", window, at_least=1)
    if sum(lengths) < space:
        raise PlanError(
            f"{len(lengths)} documents with {sum(lengths):,} tokens do not fill a window of {space:,}: give more "
            "documents or a shorter window."
        )
    order = np.random.default_rng(_whole_number("seed", seed, at_least=0)).permutation(len(lengths))
    return _fill((lengths[place] for place in order), space)


def _fill(documents: Iterator[int], space: int) -> list[int]:
    lengths = []
    for length in documents:
        lengths.append(min(length, space))
        space -= lengths[-1]
        if not space:
            break
    return lengths


def _draw_forever(name: str, seed: int) -> Iterator[int]:
    if name not in _DISTRIBUTIONS:
        choices = ", ".join(map(repr, LENGTH_DISTRIBUTIONS))
        raise PlanError(f"Unknown length distribution {name!r}: choose one of {choices}.")
    generator = np.random.default_rng(_whole_number("seed", seed, at_least=0))
    shortest, longest, documents = np.array(_DISTRIBUTIONS[name]["bins"]).T
    shortest = np.maximum(shortest, 1)
    up_to_bin = np.cumsum(documents)
    while True:
        # Each document takes two consecutive random numbers, so the first documents do not depend on the count.
        which, where = generator.random((_DRAWN_AT_ONCE, 2)).T
        drawn = np.searchsorted(up_to_bin, which * up_to_bin[-1], side="right")
        low, high = shortest[drawn], longest[drawn]
        lengths = low * ((high + 1) / low) ** where
        yield from np.minimum(lengths.astype(np.int64), high).tolist()


def _whole_number(what: str, value: int, *, at_least: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise PlanError(f"{what} must be an integer, got {value!r}.") from None
    if value < at_least:
        raise PlanError(f"{what} must be at least {at_least}, got {value}.")
    if what != "seed" and value > MOST_TOKENS:
        raise PlanError(f"{what} must be at most {MOST_TOKENS:,}, got {value:,}.")
    return value
