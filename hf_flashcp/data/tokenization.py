"""Texts and chats to documents of tokens. Each row that is left out or cut is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from ..errors import BatchError
from ..layout.batch import IGNORE_INDEX


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

OVERLONG = ("truncate", "split", "drop")

KEPT = {
    "whole": "kept whole",
    "truncated": "kept, truncated to the window",
    "split": "kept in pieces of the window",
}
LEFT_OUT = {
    "missing": "left out: no text or messages, or not in their form",
    "empty": "left out: empty or blank",
    "too_long": "left out: longer than the window",
    "no_assistant": "left out: no assistant turn with tokens",
    "assistant_cut_off": "left out: no assistant token within the window",
}
_TOKEN_COUNTS = ("tokens", "targets", "tokens_left_out")


@dataclass(frozen=True)
class TokenizedDocuments:
    """What [`tokenize_texts`] and [`tokenize_chats`] return.

    Attributes:
        documents (`datasets.Dataset`): `input_ids`, and with chats `labels`, a row for each document or piece of one.
        counts (`dict[str, int]`): `rows` of the dataset, one count for each key of `KEPT` and `LEFT_OUT` (together
            they are `rows`), `documents`, `tokens` in them, `targets` (tokens that have a label and one before them),
            and `tokens_left_out` with rows that were cut or left out.
    """

    documents: Dataset
    counts: dict[str, int]


def tokenize_texts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    max_length: int | None = None,
    overlong: str = "truncate",
    num_proc: int | None = None,
) -> TokenizedDocuments:
    """One document a text: the tokens that the tokenizer makes of it, and its end token behind them.

    Args:
        dataset (`datasets.Dataset`): with a column of texts.
        tokenizer (`PreTrainedTokenizerBase`): with an end token.
        text_column (`str`, *optional*, defaults to `"text"`): its name.
        max_length (`int`, *optional*): tokens that a document may have.
        overlong (`str`, *optional*, defaults to `"truncate"`): longer documents are truncated to it, are split into
            pieces that become documents of their own (`"split"`), or are left out (`"drop"`).
        num_proc (`int`, *optional*): processes that tokenize, see `datasets.Dataset.map`.

    Raises:
        BatchError: no such column, a tokenizer without an end token, or nothing left.
    """
    _require_column(dataset, text_column)
    _require_overlong(overlong, OVERLONG)
    if tokenizer.eos_token_id is None:
        raise BatchError(
            "The tokenizer has no end token, so that nothing would teach the model where a document ends. Set "
            'tokenizer.eos_token = "...", a token of its vocabulary.'
        )
    settings = {"column": text_column, "tokenizer": tokenizer, "max_length": max_length, "overlong": overlong}
    return _tokenized(dataset, _tokenize_texts, settings, num_proc)


def tokenize_chats(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    messages_column: str = "messages",
    max_length: int | None = None,
    overlong: str = "truncate",
    num_proc: int | None = None,
) -> TokenizedDocuments:
    """One document a conversation, as the tokenizer's chat template writes it; targets are what it marks by
    `{% generation %}`, the assistant's tokens. transformers only warns of a template without marks.

    Args:
        dataset (`datasets.Dataset`): with a column of conversations, each a list of `{"role": ..., "content": ...}`.
        tokenizer (`PreTrainedTokenizerBase`): with such a chat template.
        messages_column (`str`, *optional*, defaults to `"messages"`): the column's name.
        max_length (`int`, *optional*), num_proc (`int`, *optional*): as for [`tokenize_texts`].
        overlong (`str`, *optional*, defaults to `"truncate"`): `"truncate"` or `"drop"`.

    Raises:
        BatchError: no such column, no chat template or one without marks, a conversation that it refuses, or nothing
            left.
    """
    _require_column(dataset, messages_column)
    _require_overlong(overlong, ("truncate", "drop"))
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template["default"]
    if not template:
        raise BatchError(
            "The tokenizer has no chat template. Take an instruction-tuned model's tokenizer, or set "
            "tokenizer.chat_template to a template with {% generation %} marks."
        )
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise BatchError(
            "The chat template does not mark the assistant's tokens, so that there would be no targets. Put "
            "{% generation %} and {% endgeneration %} around what the assistant writes, its end-of-turn token "
            "included; trl.chat_template_utils.get_training_chat_template knows such templates of many models."
        )
    settings = {"column": messages_column, "tokenizer": tokenizer, "max_length": max_length, "overlong": overlong}
    return _tokenized(dataset, _tokenize_chats, settings, num_proc)


def _require_column(dataset: Dataset, column: str) -> None:
    if column not in dataset.column_names:
        raise BatchError(f"The dataset has no column {column!r}; it has {', '.join(map(repr, dataset.column_names))}.")


def _require_overlong(overlong: str, choices: Sequence[str]) -> None:
    if overlong not in choices:
        raise BatchError(f"overlong is {overlong!r}; choose one of {', '.join(map(repr, choices))}.")


def _tokenized(dataset: Dataset, function: Any, settings: dict[str, Any], num_proc: int | None) -> TokenizedDocuments:
    from datasets import Features, Value

    names = ("input_ids", "labels") if function is _tokenize_chats else ("input_ids",)
    features = {name: [Value("int32")] for name in names}
    features |= {"outcome": Value("string")} | {name: Value("int64") for name in _TOKEN_COUNTS}
    rows = dataset.map(
        function,
        batched=True,
        features=Features(features),
        with_indices=True,
        remove_columns=dataset.column_names,
        fn_kwargs=settings,
        num_proc=num_proc,
        desc="Tokenizing",
    )
    outcomes = Counter(rows["outcome"])
    counts = {"rows": len(dataset)} | {outcome: outcomes[outcome] for outcome in (*KEPT, *LEFT_OUT)}
    assert sum(counts[outcome] for outcome in (*KEPT, *LEFT_OUT)) == len(dataset)
    counts |= {name: sum(rows[name]) for name in _TOKEN_COUNTS}
    documents = rows.filter(_has_tokens, input_columns="tokens", num_proc=num_proc, desc="Leaving out")
    counts["documents"] = len(documents)
    if not len(documents):
        reasons = ", ".join(f"{counts[outcome]} {text}" for outcome, text in LEFT_OUT.items() if counts[outcome])
        raise BatchError(f"No documents are left of {len(dataset)} rows: {reasons or 'there are none'}.")
    return TokenizedDocuments(documents.remove_columns(["outcome", *_TOKEN_COUNTS]), counts)


def _has_tokens(tokens: int) -> bool:
    return tokens > 0


def _tokenize_texts(
    batch: Mapping[str, list],
    indices: list[int],
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    overlong: str,
) -> dict[str, list]:
    texts = [text for text in batch[column] if isinstance(text, str) and text.strip()]
    tokens = iter(tokenizer(texts)["input_ids"] if texts else [])
    rows = _Rows(with_labels=False)
    for text in batch[column]:
        if not isinstance(text, str):
            rows.leave_out("missing")
        elif not text.strip():
            rows.leave_out("empty")
        else:
            document = next(tokens)
            if document[-1:] != [tokenizer.eos_token_id]:
                document = [*document, tokenizer.eos_token_id]
            if max_length is None or len(document) <= max_length:
                rows.keep("whole", document)
            elif overlong == "drop":
                rows.leave_out("too_long", len(document))
            elif overlong == "truncate":
                rows.keep("truncated", document[:max_length], left_out=len(document) - max_length)
            else:
                for start in range(0, len(document), max_length):
                    rows.keep(None if start else "split", document[start : start + max_length])
    return rows.columns


def _tokenize_chats(
    batch: Mapping[str, list],
    indices: list[int],
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    overlong: str,
) -> dict[str, list]:
    rows = _Rows(with_labels=True)
    for index, messages in zip(indices, batch[column]):
        if not _is_conversation(messages):
            rows.leave_out("missing" if messages != [] else "empty")
            continue
        try:
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        except TemplateError as error:
            raise BatchError(
                f"The chat template refuses the conversation in row {index}: {error}. Correct it or leave it out."
            ) from error
        document, mask = encoded["input_ids"], encoded["assistant_masks"]
        labels = [token if kept else IGNORE_INDEX for token, kept in zip(document, mask)]
        if not any(mask[1:]):
            rows.leave_out("no_assistant", len(document))
        elif max_length is None or len(document) <= max_length:
            rows.keep("whole", document, labels)
        elif overlong == "drop":
            rows.leave_out("too_long", len(document))
        elif not any(mask[1:max_length]):
            rows.leave_out("assistant_cut_off", len(document))
        else:
            rows.keep("truncated", document[:max_length], labels[:max_length], left_out=len(document) - max_length)
    return rows.columns


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages)
    )


class _Rows:
    """Columns of tokenized rows. `outcome` is None for the further pieces of a split document."""

    def __init__(self, with_labels: bool):
        names = ["input_ids", *(["labels"] if with_labels else []), "outcome", *_TOKEN_COUNTS]
        self.columns: dict[str, list] = {name: [] for name in names}

    def keep(self, outcome: str | None, document: list[int], labels: list[int] | None = None, left_out: int = 0):
        targets = sum(label != IGNORE_INDEX for label in (labels or document)[1:])
        self._add(document, labels or [], outcome, len(document), targets, left_out)

    def leave_out(self, outcome: str, tokens: int = 0):
        self._add([], [], outcome, 0, 0, tokens)

    def _add(self, document, labels, outcome, tokens, targets, left_out):
        row = {"input_ids": document, "labels": labels, "outcome": outcome, "tokens": tokens, "targets": targets}
        for name, column in self.columns.items():
            column.append(left_out if name == "tokens_left_out" else row[name])
