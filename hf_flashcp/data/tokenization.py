"""Tokenizes texts and chats into documents, and counts the rows that are left out or truncated."""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BatchError
from .boundaries import IGNORE_INDEX
from .chat_columns import is_mentioned, taken_columns, template_arguments, without_filled
from .progress import on_first_process


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OVERLONG = ("truncate", "split", "drop")

KEPT = {
    "whole": "kept whole",
    "truncated": "kept, truncated to the window",
    "split": "kept in pieces of the window",
}
LEFT_OUT = {
    "missing": "left out: no text or messages, or in another format",
    "empty": "left out: empty or blank",
    "too_long": "left out: longer than the window",
    "no_assistant": "left out: no assistant turn with tokens",
    "assistant_cut_off": "left out: no assistant token within the window",
}
ASSISTANT_FIRST = "of these, started by the assistant"
_TOKEN_COUNTS = ("tokens", "targets", "tokens_left_out")


@dataclass(frozen=True)
class TokenizedDocuments:
    """The result of [`tokenize_texts`] and [`tokenize_chats`].

    Attributes:
        documents (`datasets.Dataset`): one row per document or piece of a document, with `input_ids`, and for chats
            also `labels`.
        counts (`dict[str, int]`): `rows` of the dataset, and how many of them have each of the outcomes in `KEPT` and
            `LEFT_OUT`, which add up to `rows`; `documents`; `tokens` of the documents; `targets`, the tokens with a
            label, except for first tokens; and `tokens_left_out`, the tokens of rows that were left out and those cut
            off. For chats also `assistant_first`, the number of kept conversations that begin with the assistant
            (after any system message).
        unused_columns (`tuple[str, ...]`): columns of the dataset that were not used, and
            `"chat_template_kwargs.<name>"` for arguments that the chat template does not mention.
    """

    documents: Dataset
    counts: dict[str, int]
    unused_columns: tuple[str, ...] = ()


def tokenize_texts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    max_length: int | None = None,
    overlong: str = "truncate",
    num_proc: int | None = None,
) -> TokenizedDocuments:
    """Tokenize each text into one document that ends with the tokenizer's end token.

    If a text already contains its beginning or end token, the token is not repeated. A warning and the result name the
    columns that are not used.

    Args:
        dataset (`datasets.Dataset`): dataset with a column of texts.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer with an end token.
        text_column (`str`, *optional*, defaults to `"text"`): name of the column.
        max_length (`int`, *optional*): largest number of tokens of a document.
        overlong (`str`, *optional*, defaults to `"truncate"`): what to do with longer documents: `"truncate"`,
            `"split"` (make each piece a document) or `"drop"`.
        num_proc (`int`, *optional*): number of processes that tokenize, see `datasets.Dataset.map`.

    Returns:
        `TokenizedDocuments`: the documents, and counts of what was kept and left out.

    Raises:
        BatchError: the column is missing, the tokenizer has no end token, or no documents are left.
    """
    _require_column(dataset, text_column)
    _require_overlong(overlong, OVERLONG)
    if tokenizer.eos_token_id is None:
        raise BatchError(
            "The tokenizer has no end token, so the model would not learn where a document ends. Set "
            "tokenizer.eos_token to a token of its vocabulary."
        )
    settings = {"column": text_column, "tokenizer": tokenizer, "max_length": max_length, "overlong": overlong}
    return _tokenized(dataset, _tokenize_texts, settings, num_proc, used=[text_column])


def tokenize_chats(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    messages_column: str = "messages",
    max_length: int | None = None,
    overlong: str = "truncate",
    num_proc: int | None = None,
) -> TokenizedDocuments:
    """Tokenize each conversation into one document by the tokenizer's chat template.

    Targets are the assistant's tokens, which the template marks with `{% generation %}`. A template without these
    marks is refused.

    The following columns are passed to the template, if the dataset has them: `tools` (a list of JSON schemas),
    `documents` (a list of dicts) and `chat_template_kwargs` (a dict of arguments). Their values can also be JSON
    strings. Keys that are None only because Arrow gives all rows the same keys are left out, while nulls in JSON are
    kept. A warning and the result name the columns that are not used, which include `tools` and `documents` if the
    template does not mention them.

    Args:
        dataset (`datasets.Dataset`): dataset with a column of conversations, each of which is a list of
            `{"role": ..., "content": ...}`, and optionally the columns above.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer with such a chat template.
        messages_column (`str`, *optional*, defaults to `"messages"`): name of the column of conversations.
        max_length (`int`, *optional*): largest number of tokens of a document.
        overlong (`str`, *optional*, defaults to `"truncate"`): what to do with longer conversations: `"truncate"` or
            `"drop"`.
        num_proc (`int`, *optional*): number of processes that tokenize, see `datasets.Dataset.map`.

    Returns:
        `TokenizedDocuments`: the documents, and counts of what was kept and left out.

    Raises:
        BatchError: the column is missing, there is no chat template or it has no marks, it refuses a conversation, a
            value does not suit its column, or no documents are left.
    """
    _require_column(dataset, messages_column, _IN_ANOTHER_FORM)
    _require_overlong(overlong, ("truncate", "drop"))
    templates = _templates(tokenizer, dataset.column_names)
    taken = [name for name in taken_columns(dataset.column_names, templates) if name != messages_column]
    settings = {
        "column": messages_column,
        "features": {name: dataset.features[name] for name in (messages_column, *taken)},
        "templates": templates,
        "tokenizer": tokenizer,
        "max_length": max_length,
        "overlong": overlong,
    }
    return _tokenized(dataset, _tokenize_chats, settings, num_proc, used=[messages_column, *taken])


def _templates(tokenizer: PreTrainedTokenizerBase, column_names: Sequence[str]) -> list[str]:
    """Return the tokenizer's chat templates for a dataset with these columns, after checking their marks.

    These are the default template, and, if the dataset has a column `tools`, the template "tool_use", if there is one.
    """
    given = tokenizer.chat_template
    named = given if isinstance(given, Mapping) else {"default": given}
    names = ["default", *(["tool_use"] if "tools" in column_names else [])]
    templates = {name: named[name] for name in names if named.get(name)}
    if "default" not in templates:
        raise BatchError(
            'The tokenizer has no chat template, or none named "default". Use an instruction-tuned model\'s '
            "tokenizer, or set tokenizer.chat_template to a template with {% generation %} marks."
        )
    for name, template in templates.items():
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            raise BatchError(
                f"The chat template{f' {name!r}' if len(named) > 1 else ''} does not mark the assistant's tokens, so "
                "there would be no targets. Put {% generation %} and {% endgeneration %} around the assistant's text "
                "and its end-of-turn token. trl.chat_template_utils.get_training_chat_template returns such templates "
                "for many models."
            )
    return list(templates.values())


_IN_ANOTHER_FORM = {
    "prompt": " Conversations are read from one column: join prompt and completion into it (assistant turns in the "
    "prompt become targets too), or train with TRL's SFTTrainer.",
    "conversations": " Name the column (messages_column); its messages must have role and content.",
}


def _require_column(dataset: Dataset, column: str, hints: Mapping[str, str] | None = None) -> None:
    names = dataset.column_names
    if column not in names:
        hint = next((text for name, text in (hints or {}).items() if name in names), "")
        raise BatchError(f"The dataset has no column {column!r}; it has {', '.join(map(repr, names))}.{hint}")


def _require_overlong(overlong: str, choices: Sequence[str]) -> None:
    if overlong not in choices:
        raise BatchError(f"overlong is {overlong!r}; choose one of {', '.join(map(repr, choices))}.")


def _tokenized(
    dataset: Dataset, function: Any, settings: dict[str, Any], num_proc: int | None, used: Sequence[str]
) -> TokenizedDocuments:
    from datasets import Features, Value

    chats = function is _tokenize_chats
    sums = (*_TOKEN_COUNTS, "assistant_first") if chats else _TOKEN_COUNTS
    features = {"input_ids": [Value("int32")], "outcome": Value("string")} | {name: Value("int64") for name in sums}
    if chats:
        features |= {"labels": [Value("int32")], "ignored": [Value("string")]}
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
    counts |= {name: sum(rows[name]) for name in sums}
    unused = [name for name in dataset.column_names if name not in used]
    if chats:
        unused += sorted({f"chat_template_kwargs.{name}" for names in rows["ignored"] for name in names})
    if unused and on_first_process():
        logger.warning("Columns not used: %s.", ", ".join(unused))
    documents = rows.filter(_has_tokens, input_columns="tokens", num_proc=num_proc, desc="Leaving out")
    counts["documents"] = len(documents)
    if not len(documents):
        reasons = ", ".join(f"{counts[outcome]} {text}" for outcome, text in LEFT_OUT.items() if counts[outcome])
        raise BatchError(f"No documents are left of {len(dataset)} rows: {reasons or 'the dataset is empty'}.")
    documents = documents.select_columns(["input_ids", "labels"] if chats else ["input_ids"])
    return TokenizedDocuments(documents, counts, tuple(unused))


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
            rows.add("missing")
        elif not text.strip():
            rows.add("empty")
        else:
            document = _with_ends_once(next(tokens), tokenizer)
            if max_length is None or len(document) <= max_length:
                rows.add("whole", document)
            elif overlong == "drop":
                rows.add("too_long", left_out=len(document))
            elif overlong == "truncate":
                rows.add("truncated", document[:max_length], left_out=len(document) - max_length)
            else:
                for start in range(0, len(document), max_length):
                    rows.add(None if start else "split", document[start : start + max_length])
    return rows.columns


def _with_ends_once(document: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the document with one end token, and without a repeated beginning token.

    Both tokens occur twice if the text contains them and the tokenizer adds them.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    start, stop = 0, len(document)
    while begin is not None and document[start : start + 2] == [begin, begin]:
        start += 1
    while stop > start and document[stop - 1] == end:
        stop -= 1
    return [*document[start:stop], end]


def _tokenize_chats(
    batch: Mapping[str, list],
    indices: list[int],
    column: str,
    features: Mapping[str, Any],
    templates: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    overlong: str,
) -> dict[str, list]:
    rows = _Rows(with_labels=True)
    own_arguments = inspect.signature(tokenizer.apply_chat_template).parameters
    for place, index in enumerate(indices):
        row = {name: without_filled(batch[name][place], feature) for name, feature in features.items()}
        messages = row.pop(column)
        if not _is_conversation(messages):
            rows.add("missing" if messages != [] else "empty")
            continue
        arguments = template_arguments(index, row)
        ignored = [name for name in arguments if name not in own_arguments and not is_mentioned(name, templates)]
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        document, mask = _encoded(index, messages, arguments, tokenizer)
        noted = {"ignored": ignored, "assistant_first": _begins_with_assistant(messages)}
        labels = [token if kept else IGNORE_INDEX for token, kept in zip(document, mask)]
        if not any(mask[1:]):
            rows.add("no_assistant", left_out=len(document), **noted)
        elif max_length is None or len(document) <= max_length:
            rows.add("whole", document, labels, **noted)
        elif overlong == "drop":
            rows.add("too_long", left_out=len(document), **noted)
        elif not any(mask[1:max_length]):
            rows.add("assistant_cut_off", left_out=len(document), **noted)
        else:
            left_out = len(document) - max_length
            rows.add("truncated", document[:max_length], labels[:max_length], left_out, **noted)
    return rows.columns


def _encoded(
    index: int, messages: list[dict], arguments: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation, and a mask that is 1 for the assistant's tokens and 0 for others."""
    try:
        encoded = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True, **arguments
        )
    except Exception as error:  # templates are code, so they can raise anything
        raise BatchError(
            f"The chat template refuses the conversation in row {index}: {error}. Correct or remove this row."
        ) from error
    roles = [message["role"] for message in messages]
    if roles[0] == "assistant" and set(roles) != {"assistant"} and all(encoded["assistant_masks"]):
        # transformers 5.17 marks all tokens if the first token of the document is a whole assistant turn.
        raise BatchError(
            f"All tokens of the conversation in row {index} are marked as the assistant's, including those of other "
            "roles. Upgrade transformers, or move {% endgeneration %} in the chat template before the next turn."
        )
    return encoded["input_ids"], encoded["assistant_masks"]


def _begins_with_assistant(messages: list[dict]) -> bool:
    return next((each["role"] for each in messages if each["role"] != "system"), None) == "assistant"


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in messages)
    )


class _Rows:
    """Columns of tokenized rows.

    With labels, rows also hold the names of unused template arguments, and whether the assistant speaks first.
    """

    def __init__(self, with_labels: bool):
        names = ["input_ids", "outcome", *_TOKEN_COUNTS]
        names += ["labels", "ignored", "assistant_first"] if with_labels else []
        self.columns: dict[str, list] = {name: [] for name in names}

    def add(
        self,
        outcome: str | None,
        document: Sequence[int] = (),
        labels: Sequence[int] = (),
        left_out: int = 0,
        ignored: Sequence[str] = (),
        assistant_first: bool = False,
    ) -> None:
        """Add a document, or a row that is left out. `outcome` is None for all but the first piece of a document."""
        row = {
            "input_ids": document,
            "labels": labels,
            "outcome": outcome,
            "ignored": list(ignored),
            "tokens": len(document),
            "targets": sum(label != IGNORE_INDEX for label in (labels or document)[1:]),
            "tokens_left_out": left_out,
            "assistant_first": int(assistant_first and bool(document)),
        }
        for name, column in self.columns.items():
            column.append(row[name])
