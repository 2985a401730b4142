"""Columns beside texts and messages: those that the chat template uses reach it, all others are reported."""

import json
import logging

import pytest
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerFast

from hf_flashcp.data import tokenize_chats, tokenize_texts
from hf_flashcp.data.chat_columns import _NOT_FOR_ROWS, TEMPLATE_COLUMNS
from hf_flashcp.errors import BatchError

from .test_tokenization import TEMPLATE, byte_tokenizer, chat


EXAMPLES = {
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}],
    "documents": [{"title": "Rain", "text": "It rains."}],
    "chat_template_kwargs": {"mood": "cheerful", "level": 3},
}
# Writes everything that it receives, including nulls.
EVERYTHING = (
    "[{{ tools | tojson }}][{{ documents | tojson }}][{{ mood }}{{ level }}]"
    "{% for message in messages %}<{{ message | tojson }}>"
    "{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
)


def arguments_of(row):
    further = row.get("chat_template_kwargs") or {}
    return {name: row.get(name) for name in ("tools", "documents")} | further


def written(tokenized):
    return [byte_tokenizer().decode(row["input_ids"]) for row in tokenized.documents]


@pytest.mark.parametrize("form", ["value", "JSON"])
@pytest.mark.parametrize("given", [[name] for name in TEMPLATE_COLUMNS] + [list(TEMPLATE_COLUMNS)], ids=", ".join)
def test_template_arguments_reach_the_template(given, form):
    """Columns reach the template as in TRL's SFTTrainer, also when a row has none."""
    columns = {name: EXAMPLES[name] for name in given}
    tokenizer = byte_tokenizer(chat_template=EVERYTHING)
    as_given = columns if form == "value" else {name: json.dumps(value) for name, value in columns.items()}
    rows = [{"messages": chat("Hi.", "Hello!"), **as_given}, {"messages": chat("a", "b"), **dict.fromkeys(columns)}]
    tokenized = tokenize_chats(Dataset.from_list(rows), tokenizer)
    expected = [
        tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False, **arguments_of(columns)),
        tokenizer.apply_chat_template(rows[1]["messages"], tokenize=False),
    ]
    assert expected[0].count("weather") + expected[0].count("It rains") + expected[0].count("cheerful3") == len(given)
    assert written(tokenized) == expected and not tokenized.unused_columns


def test_tools_come_before_the_conversation():
    rows = Dataset.from_list([{"messages": chat("hi", "yo"), "tools": '[{"name": "f"}]'}])
    tokenized = tokenize_chats(rows, byte_tokenizer(chat_template="{% if tools %}T{% endif %}" + ONE_LETTER))
    assert written(tokenized) == ["TUA"] and tokenized.counts["whole"] == 1


BAD_VALUES = {
    "tools": ['[{"name": ', '{"name": "f"}', "7", '["f"]', '"f"', {"name": "f"}, ["f"], 7],
    "documents": ["[{", '{"text": "a"}', '["a"]', {"text": "a"}, ["a"], 7],
    "chat_template_kwargs": ["{", "[1]", "true", ["a"], 7],
}


@pytest.mark.parametrize("name, value", [(name, value) for name in TEMPLATE_COLUMNS for value in BAD_VALUES[name]])
def test_values_that_the_template_rejects(name, value):
    rows = Dataset.from_list(
        [{"messages": chat("a", "b"), name: None}, {"messages": None, name: value}]
        + [{"messages": chat("Hi.", "Hello!"), name: value}]
    )
    with pytest.raises(BatchError, match=f"Row 2 has {name} .*[Gg]ive a "):
        tokenize_chats(rows, byte_tokenizer(chat_template=EVERYTHING))


@pytest.mark.parametrize("name", sorted(_NOT_FOR_ROWS | {"tools"}))
def test_arguments_that_a_row_cannot_set(name):
    row = {"messages": chat("Hi.", "Hello!"), "tools": "[]", "chat_template_kwargs": json.dumps({name: True})}
    with pytest.raises(BatchError, match=f"Row 0 has {name} in chat_template_kwargs"):
        tokenize_chats(Dataset.from_list([row]), byte_tokenizer(chat_template=EVERYTHING))


def test_keys_that_arrow_filled_in_are_left_out():
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi."}, {"type": "audio", "path": "a"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "1"}], "tool_calls": [call]},
                {"role": "tool", "content": [{"type": "text", "text": "Rain"}], "name": "weather"},
            ],
            "tools": [{"name": "weather", "parameters": {"city": {"type": "string"}}}],
            "chat_template_kwargs": {"mood": "cheerful"},
        },
        {
            "messages": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
            "tools": [{"name": "time", "parameters": {"zone": {"enum": ["UTC", None]}}}],
            "chat_template_kwargs": {"level": 3},
        },
    ]
    dataset = Dataset.from_list(rows)
    assert "None" in str(dataset[0]["tools"]) and "None" in str(dataset[0]["messages"])
    tokenizer = byte_tokenizer(chat_template=EVERYTHING)
    expected = [tokenizer.apply_chat_template(row["messages"], tokenize=False, **arguments_of(row)) for row in rows]
    assert written(tokenize_chats(dataset, tokenizer)) == expected
    assert expected[1].count("null") == 2  # the enum's nulls, and the missing documents


def test_nulls_in_json_stay():
    from datasets import Json

    tools = [{"name": "f", "default": None}]
    features = Features({"messages": [{"role": Value("string"), "content": Value("string")}], "tools": Json()})
    stored = Dataset.from_list([{"messages": chat("Hi.", "Hello!"), "tools": tools}], features=features)
    text = Dataset.from_list([{"messages": chat("Hi.", "Hello!"), "tools": json.dumps(tools)}])
    for dataset in (stored, text):
        (document,) = written(tokenize_chats(dataset, byte_tokenizer(chat_template=EVERYTHING)))
        assert document.startswith('[[{"name": "f", "default": null}]]')


def test_columns_that_are_not_used_are_named(caplog):
    rows = Dataset.from_list(
        [
            {"id": 1, "messages": chat("Hi.", "Hello!"), "tools": "[]", "documents": [], "text": "a", "source": "b"}
            | {"chat_template_kwargs": '{"mood": 1, "add_generation_prompt": false}'}
        ]
    )
    with caplog.at_level(logging.WARNING, "hf_flashcp"):
        found = tokenize_chats(rows, byte_tokenizer()).unused_columns
        assert found == ("id", "tools", "documents", "text", "source", "chat_template_kwargs.mood")
        assert caplog.messages == [f"Columns not used: {', '.join(found)}."]
        caplog.clear()
        everything = tokenize_chats(rows, byte_tokenizer(chat_template=EVERYTHING))
        assert everything.unused_columns == ("id", "text", "source")
        caplog.clear()
        others = tuple(name for name in rows.column_names if name != "text")
        assert tokenize_texts(rows, byte_tokenizer()).unused_columns == others
        assert len(caplog.messages) == 1
        caplog.clear()
        assert not tokenize_texts(rows.select_columns("text"), byte_tokenizer()).unused_columns
        assert not tokenize_chats(rows.select_columns("messages"), byte_tokenizer()).unused_columns
        assert not caplog.messages


@pytest.mark.parametrize(
    "columns, hint",
    [
        ({"prompt": [chat("a")], "completion": [chat("a", "b")[1:]]}, "join prompt and completion into it"),
        ({"conversations": [chat("a", "b")]}, r"Name the column \(messages_column\)"),
        ({"text": ["a"]}, "it has 'text'.$"),
    ],
)
def test_conversations_in_other_columns(columns, hint):
    with pytest.raises(BatchError, match=f"has no column 'messages'.*{hint}"):
        tokenize_chats(Dataset.from_dict(columns), byte_tokenizer())


def test_every_template_that_a_row_can_get_has_marks():
    plain = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with_tools = Dataset.from_list([{"messages": chat("Hi.", "Hello!"), "tools": json.dumps(EXAMPLES["tools"])}])
    tokenizer = byte_tokenizer(chat_template={"default": TEMPLATE, "tool_use": plain})
    with pytest.raises(BatchError, match="The chat template 'tool_use' does not mark the assistant's tokens"):
        tokenize_chats(with_tools, tokenizer)
    assert tokenize_chats(with_tools.select_columns("messages"), tokenizer).counts["whole"] == 1
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": EVERYTHING}
    assert "weather" in written(tokenize_chats(with_tools, tokenizer))[0]
    with pytest.raises(BatchError, match='The tokenizer has no chat template, or none named "default"'):
        tokenize_chats(with_tools, byte_tokenizer(chat_template={"tool_use": TEMPLATE}))


def test_errors_of_a_template_name_the_row():
    template = TEMPLATE.replace("{{ message.content }}{{ eos_token }}", "{{ message.content + 1 }}")
    with pytest.raises(BatchError, match="refuses the conversation in row 1: "):
        tokenize_chats(
            Dataset.from_dict({"messages": [None, chat("Hi.", "Hello!")]}), byte_tokenizer(chat_template=template)
        )


ONE_LETTER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}A{% endgeneration %}"
    "{% elif m.role == 'user' %}U{% else %}S{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("roles", ["AU", "AUA", "SA", "SAU", "UA", "UAUA", "AA"])
def test_the_assistants_turns_are_the_targets_whoever_speaks_first(roles):
    """The first token of a document has no context, so a turn that consists only of it is not a target."""
    names = {"A": "assistant", "U": "user", "S": "system"}
    messages = [{"role": names[role], "content": ""} for role in roles]
    dataset = Dataset.from_dict({"messages": [chat("", ""), messages]})
    tokenizer = byte_tokenizer(chat_template=ONE_LETTER)
    marks = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    if "U" in roles and all(marks["assistant_masks"]):  # transformers 5.17
        with pytest.raises(BatchError, match="All tokens of the conversation in row 1 are marked"):
            tokenize_chats(dataset, tokenizer)
        return
    tokenized = tokenize_chats(dataset, tokenizer)
    counts = tokenized.counts
    if "A" not in roles[1:]:
        assert counts["no_assistant"] == 1 and counts["assistant_first"] == 0
        return
    ids = byte_tokenizer().convert_tokens_to_ids
    row = tokenized.documents[1]
    assert row["input_ids"] == [ids(role) for role in roles]
    assert row["labels"] == [ids(role) if role == "A" else -100 for role in roles]
    assert counts["targets"] == 1 + roles[1:].count("A")
    assert counts["assistant_first"] == (roles.strip("S")[0] == "A")


def test_marks_that_run_over_the_users_turn():
    """transformers 5.17 returns such marks if an assistant's turn is the first token."""

    class Marked(PreTrainedTokenizerFast):
        def apply_chat_template(self, *args, **kwargs):
            encoded = super().apply_chat_template(*args, **kwargs)
            return {**encoded, "assistant_masks": [1] * len(encoded["input_ids"])}

    tokenizer = Marked(tokenizer_object=byte_tokenizer().backend_tokenizer, chat_template=ONE_LETTER)
    rows = Dataset.from_dict({"messages": [[{"role": role, "content": ""} for role in ("assistant", "user")]]})
    with pytest.raises(BatchError, match="All tokens of the conversation in row 0 are marked as the assistant's"):
        tokenize_chats(rows, tokenizer)


def tokenizer_with_ends(begin=True, end=False):
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos_token="<begin>")
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<begin>", "<end>")]
    single = f"{'<begin> ' if begin else ''}$A{' <end>' if end else ''}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=ends)
    return tokenizer


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("text", ["ab", "<begin>ab", "ab<end>", "<begin>ab<end>", "<begin>", "a<end>b<begin>c"])
def test_a_document_begins_and_ends_once(text, begin, end):
    tokenizer = tokenizer_with_ends(begin, end)
    (row,) = tokenize_texts(Dataset.from_dict({"text": [text]}), tokenizer).documents
    inner = text.removeprefix("<begin>").removesuffix("<end>")
    begins = begin or text.startswith("<begin>")
    assert tokenizer.decode(row["input_ids"]) == f"{'<begin>' if begins else ''}{inner}<end>"


def test_a_template_that_writes_the_beginning_token_writes_it_once():
    tokenizer = tokenizer_with_ends()
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    (row,) = tokenize_chats(Dataset.from_dict({"messages": [chat("Hi.", "Hello!")]}), tokenizer).documents
    assert tokenizer.decode(row["input_ids"]) == "<begin><user>Hi.<assistant>Hello!<end>"
