"""From texts and chats to documents: targets, rows that are left out, and counts that add up."""

import json

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import pack_dataset

from hf_flashcp.data import load_json_lines, tokenize_chats, tokenize_texts
from hf_flashcp.data.tokenization import KEPT, LEFT_OUT
from hf_flashcp.errors import BatchError


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'robot' %}{{ raise_exception('No robots') }}{% endif %}"
    "<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
WITHOUT_MARKS = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def byte_tokenizer(**options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{"eos_token": "<end>", "chat_template": TEMPLATE, **options}
    )


def chat(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def require_sums(tokenized):
    counts, rows = tokenized.counts, tokenized.documents[:]
    assert counts["rows"] == sum(counts[outcome] for outcome in (*KEPT, *LEFT_OUT))
    assert counts["documents"] == len(rows["input_ids"])
    assert counts["tokens"] == sum(map(len, rows["input_ids"]))
    labels = rows.get("labels", rows["input_ids"])
    assert counts["targets"] == sum(label != -100 for row in labels for label in row[1:])


@settings(max_examples=12)
@given(
    st.lists(st.none() | st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=40), max_size=8),
    st.sampled_from(["truncate", "split", "drop"]),
    st.integers(1, 30),
)
def test_every_lost_token_of_a_text_is_counted(texts, overlong, max_length):
    tokenizer = byte_tokenizer()
    dataset = Dataset.from_dict({"text": ["first", *texts]})
    whole = [
        [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in ["first", *texts] if text and text.strip()
    ]
    if overlong == "drop" and min(map(len, whole)) > max_length:
        with pytest.raises(BatchError, match="longer than the window"):
            tokenize_texts(dataset, tokenizer, max_length=max_length, overlong=overlong)
        return
    tokenized = tokenize_texts(dataset, tokenizer, max_length=max_length, overlong=overlong)
    require_sums(tokenized)
    documents, counts = tokenized.documents["input_ids"], tokenized.counts
    assert max(map(len, documents)) <= max_length
    assert counts["tokens"] + counts["tokens_left_out"] == sum(map(len, whole))
    assert counts["missing"] == texts.count(None)
    expected = {
        "truncate": [row[:max_length] for row in whole],
        "split": [row[start : start + max_length] for row in whole for start in range(0, len(row), max_length)],
        "drop": [row for row in whole if len(row) <= max_length],
    }
    assert list(documents) == expected[overlong]


def test_only_the_assistants_tokens_are_targets():
    tokenizer = byte_tokenizer()
    chats = [chat("Hi.", "Hello!", "Bye.", "See you."), chat("2 + 2?", "4"), chat("And é?", "ü, naturally")]
    tokenized = tokenize_chats(Dataset.from_dict({"messages": chats}), tokenizer)
    require_sums(tokenized)
    for messages, row in zip(chats, tokenized.documents):
        targets = [label for label in row["labels"] if label != -100]
        answers = "".join(each["content"] + "<end>" for each in messages if each["role"] == "assistant")
        assert tokenizer.decode(targets) == answers
        assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))
    packed = pack_dataset(tokenized.documents, 64, "bfd")
    assert sum(label != -100 for row in packed["labels"] for label in row) == tokenized.counts["targets"]
    assert sum(map(sum, packed["seq_lengths"])) == tokenized.counts["tokens"]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_chats_that_are_left_out_are_counted(overlong):
    rows = [
        chat("Hi.", "Hello!"),
        None,
        [],
        chat("Nobody answers."),
        chat("Long. " * 20, "Never read."),
        chat("Short.", "Long. " * 20),
    ]
    tokenizer = byte_tokenizer()
    tokenized = tokenize_chats(Dataset.from_dict({"messages": rows}), tokenizer, max_length=60, overlong=overlong)
    require_sums(tokenized)
    found = {name: tokenized.counts[name] for name in (*KEPT, *LEFT_OUT) if tokenized.counts[name]}
    long = {"truncated": 1, "assistant_cut_off": 1} if overlong == "truncate" else {"too_long": 2}
    assert found == {"whole": 1, "missing": 1, "empty": 1, "no_assistant": 1, **long}
    every = tokenize_chats(Dataset.from_dict({"messages": [rows[0], *rows[4:]]}), tokenizer).counts["tokens"]
    unanswered = len(tokenizer.apply_chat_template(rows[3])["input_ids"])
    assert tokenized.counts["tokens"] + tokenized.counts["tokens_left_out"] == every + unanswered


def test_messages_in_another_form_are_counted():
    rows = [[{"from": "human", "value": "Hi."}], [{"role": "assistant", "content": "Hello!"}]]
    dataset = Dataset.from_dict({"messages": rows})  # missing columns of a message are None
    counts = tokenize_chats(dataset, byte_tokenizer()).counts
    assert counts["missing"] == 1 and counts["whole"] == 1


@pytest.mark.parametrize(
    "options, rows, message",
    [
        ({"chat_template": None}, [chat("Hi.", "Hello!")], "has no chat template"),
        ({"chat_template": WITHOUT_MARKS}, [chat("Hi.", "Hello!")], "does not mark the assistant's tokens"),
        ({}, [chat("Hi.", "Hello!"), [{"role": "robot", "content": ""}]], "conversation in row 1: No robots"),
        ({}, [chat("Hi.")], "1 left out: no assistant turn"),
        ({}, [None, None], "2 left out: no text or messages"),
    ],
)
def test_chats_that_cannot_be_used(options, rows, message):
    with pytest.raises(BatchError, match=message):
        tokenize_chats(Dataset.from_dict({"messages": rows}), byte_tokenizer(**options))


def test_texts_that_cannot_be_used():
    texts = Dataset.from_dict({"text": ["a document"]})
    with pytest.raises(BatchError, match="has no end token"):
        tokenize_texts(texts, byte_tokenizer(eos_token=None))
    with pytest.raises(BatchError, match="no column 'body'; it has 'text'"):
        tokenize_texts(texts, byte_tokenizer(), text_column="body")
    with pytest.raises(BatchError, match="overlong is 'wrap'; choose one of 'truncate', 'split', 'drop'"):
        tokenize_texts(texts, byte_tokenizer(), overlong="wrap")
    with pytest.raises(BatchError, match="overlong is 'split'; choose one of 'truncate', 'drop'"):
        tokenize_chats(Dataset.from_dict({"messages": [chat("a", "b")]}), byte_tokenizer(), overlong="split")


def test_a_tokenizer_that_ends_documents_itself_ends_them_once():
    class Ending(PreTrainedTokenizerFast):
        def __call__(self, texts, **kwargs):
            rows = super().__call__(texts, **kwargs)["input_ids"]
            return {"input_ids": [[*row, self.eos_token_id] for row in rows]}

    plain = byte_tokenizer()
    tokenizer = Ending(tokenizer_object=plain.backend_tokenizer, eos_token="<end>")
    tokenized = tokenize_texts(Dataset.from_dict({"text": ["ab"]}), tokenizer)
    assert tokenized.documents[0]["input_ids"] == [*plain("ab")["input_ids"], plain.eos_token_id]


@pytest.mark.parametrize("line", [b'{"text": "tru', b"[1, 2]", b'{"text": "\xff"}', b'{"text": NaN}'])
def test_lines_that_do_not_parse(tmp_path, line):
    good = [json.dumps({"text": f"document {number}"}).encode() for number in range(4)]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    first.write_bytes(b"\n".join(good))
    second.write_bytes(b"\n".join([*good[:2], b"", line, *good[2:]]))
    with pytest.raises(BatchError, match=r"second\.jsonl, line 4: .*1 of the lines cannot be read"):
        load_json_lines([first, second])
    for _ in range(2):  # the second time, the cached copy exists
        rows, skipped = load_json_lines([first, second], skip_corrupt=True, cache_dir=tmp_path / "cache")
        assert skipped == 1
        assert list(rows["text"]) == 2 * [f"document {number}" for number in range(4)]
    assert load_json_lines([first])[1] == 0
