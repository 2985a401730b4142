"""Columns of conversations that are passed to a chat template beside the messages: tools, documents and arguments."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import BatchError


TEMPLATE_COLUMNS = {
    "tools": "a list of JSON schemas",
    "documents": "a list of dicts",
    "chat_template_kwargs": "a dict of arguments",
}

# Arguments of apply_chat_template that change its result, or that tokenize_chats sets itself.
_NOT_FOR_ROWS = {
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


def is_mentioned(name: str, templates: Iterable[str]) -> bool:
    """Return whether one of the templates contains `name` as a word."""
    return any(re.search(rf"\b{re.escape(name)}\b", template) for template in templates)


def taken_columns(names: Iterable[str], templates: Iterable[str]) -> list[str]:
    """Return the columns of a dataset that are passed to the templates."""
    return [
        name
        for name in names
        if name == "chat_template_kwargs" or name in TEMPLATE_COLUMNS and is_mentioned(name, templates)
    ]


def template_arguments(index: int, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of apply_chat_template for row `index`, from its columns in `TEMPLATE_COLUMNS`.

    Raises a `BatchError` if a value cannot be passed to the template.
    """
    arguments = {name: _parsed(index, name, value) for name, value in columns.items()}
    for name, value in arguments.items():
        if not (value is None or _fits(name, value)):
            raise BatchError(
                f"Row {index} has {name} = {reprlib.repr(columns[name])}, which the chat template cannot take. Give "
                f"{TEMPLATE_COLUMNS[name]}, the same as a JSON string, or None."
            )
    further = arguments.pop("chat_template_kwargs", None) or {}
    if refused := sorted(further.keys() & (_NOT_FOR_ROWS | arguments.keys())):
        raise BatchError(
            f"Row {index} has {', '.join(refused)} in chat_template_kwargs, which a row cannot set there. Keep only "
            "arguments that the chat template itself reads."
        )
    return arguments | further


def without_filled(value: Any, feature: Any) -> Any:
    """Return `value` without the keys that are None only because other rows have them.

    An Arrow struct has the same keys in every row, and fills missing ones with None. Values stored as JSON keep their
    nulls.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: without_filled(each, feature.get(key)) for key, each in value.items() if each is not None}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if inner is not None and isinstance(value, list):
        return [without_filled(each, inner) for each in value]
    return value


def _parsed(index: int, name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BatchError(
            f"Row {index} has {name} that are not JSON: {error}. Give {TEMPLATE_COLUMNS[name]}, or the same as a JSON "
            "string."
        ) from None


def _fits(name: str, value: Any) -> bool:
    if name == "chat_template_kwargs":
        return isinstance(value, dict)
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)
