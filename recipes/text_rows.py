"""Loads texts or chats from the hub or from files, tokenizes and packs them, and counts what became of each row."""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from stdlib_chats import write_chats
from stdlib_corpus import train_tokenizer, write_corpus
from transformers import AutoTokenizer
from trl import pack_dataset
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hf_flashcp import PackedDocuments
from hf_flashcp.data import load_json_lines, tokenize_chats, tokenize_texts
from hf_flashcp.data.tokenization import ASSISTANT_FIRST, KEPT, LEFT_OUT, OVERLONG


@dataclass
class DataArguments:
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset on the hub, or a local directory."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    data_files: list[str] | None = field(
        default=None, metadata={"help": "Local files instead: .jsonl, .txt or .parquet, one document per row."}
    )
    skip_corrupt_lines: bool = field(
        default=False,
        metadata={"help": "Skip and count lines of .jsonl files that do not parse, instead of stopping."},
    )
    text_column: str = field(default="text", metadata={"help": "The column that holds a document's text."})
    messages_column: str | None = field(
        default=None,
        metadata={
            "help": "Train on the conversations in this column; only the assistant's tokens are targets. The chat "
            "template also gets the columns tools, documents and chat_template_kwargs."
        },
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A Jinja file to use instead of the tokenizer's chat template."}
    )
    window: int = field(default=8192, metadata={"help": "Tokens per packed row."})
    overlong: str = field(
        default="truncate",
        metadata={"help": "What to do with documents longer than the window.", "choices": OVERLONG},
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    cache_dir: str = field(default="outputs/cache", metadata={"help": "Where the default data is cached."})

    def __post_init__(self):
        if isinstance(self.data_files, str):  # from YAML
            self.data_files = [self.data_files]


def use_default_data(data_args, needs_tokenizer):
    """Uses the standard library's source files, or conversations about them, where no data is given. Returns the
    directory of the default tokenizer, which is trained on the files if it is needed."""
    directory = Path(data_args.cache_dir)
    corpus, chats, tokenizer = (directory / f"python_stdlib{end}" for end in (".jsonl", "_chats.jsonl", "_tokenizer"))
    if data_args.dataset_name is None and data_args.data_files is None:
        data, write = (chats, write_chats) if data_args.messages_column else (corpus, write_corpus)
        data_args.data_files = [str(data)]
        if not data.exists():
            write(data)
    if needs_tokenizer and not (tokenizer / "tokenizer.json").exists():
        if not corpus.exists():
            write_corpus(corpus)
        train_tokenizer(corpus, tokenizer)
    return str(tokenizer)


def load_tokenizer(name, data_args):
    """Loads a tokenizer. Its chat template is that of `chat_template_path`, or its own with TRL's generation marks."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if data_args.chat_template_path:
        tokenizer.chat_template = Path(data_args.chat_template_path).read_text()
    template = tokenizer.chat_template
    if data_args.messages_column and template and not has_generation_markers(template):
        try:
            tokenizer.chat_template = get_training_chat_template(tokenizer)
        except ValueError:  # tokenize_chats says what to do
            pass
    return tokenizer


def load_documents(data_args):
    """Returns the rows and the number of lines that could not be read."""
    if data_args.data_files is None:
        rows = load_dataset(data_args.dataset_name, data_args.dataset_config_name, split=data_args.dataset_split)
        return rows, 0
    suffix = Path(data_args.data_files[0]).suffix.lstrip(".")
    if suffix == "jsonl":
        return load_json_lines(
            data_args.data_files, skip_corrupt=data_args.skip_corrupt_lines, cache_dir=data_args.cache_dir
        )
    return load_dataset("text" if suffix == "txt" else suffix, data_files=data_args.data_files, split="train"), 0


def make_packed_rows(tokenizer, data_args, dp_size=1, **sizes):
    """Returns documents packed into windows, and counts of what became of the data's rows.

    One data-parallel group gets best-fit packing. Several groups wait for each other at every step, so their packs are
    chosen to take about equally long.
    """
    rows, corrupt_lines = load_documents(data_args)
    options = {
        "max_length": data_args.window,
        "overlong": data_args.overlong,
        "num_proc": data_args.dataset_num_proc,
    }
    if data_args.messages_column:
        tokenized = tokenize_chats(rows, tokenizer, messages_column=data_args.messages_column, **options)
    else:
        tokenized = tokenize_texts(rows, tokenizer, text_column=data_args.text_column, **options)
    if dp_size > 1:
        packed = PackedDocuments(tokenized.documents, data_args.window, dp_size=dp_size, **sizes)
    else:
        packed = pack_dataset(tokenized.documents, data_args.window, "bfd", map_kwargs={"desc": "Packing"})
    counts = {"corrupt_lines": corrupt_lines, **tokenized.counts, "packed_rows": len(packed)}
    return packed, {**counts, "unused_columns": list(tokenized.unused_columns)}


def print_data_table(counts):
    table = Table(title="What became of the data", show_header=False)
    names = {
        "corrupt_lines": "lines left out, not valid JSON",
        "rows": "rows read",
        **KEPT,
        **LEFT_OUT,
        "documents": "documents to train on",
        "assistant_first": ASSISTANT_FIRST,
        "packed_rows": "packed into rows",
        "tokens": "tokens",
        "targets": "tokens that are targets",
        "tokens_left_out": "tokens truncated or left out",
    }
    for name, text in names.items():
        if counts.get(name) or name in ("rows", "documents", "packed_rows", "tokens", "targets"):
            table.add_row(text, f"{counts[name]:,}")
    if counts["unused_columns"]:
        table.add_row("columns not used", ", ".join(counts["unused_columns"]))
    Console().print(table)
