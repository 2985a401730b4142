"""A corpus found on every machine, the source files of Python's standard library, and a tokenizer trained on it."""

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}
SMALLEST_FILE = 2_000  # bytes; shorter ones are mostly empty __init__ files


def source_files() -> Iterator[tuple[str, str]]:
    """Yields the name and text of each source file of the standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(root).parts) and file.stat().st_size >= SMALLEST_FILE:
            yield str(file.relative_to(root)), file.read_text(encoding="utf-8")


def write_corpus(path: Path) -> None:
    """Writes one JSON line {"text": ...} per source file of the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for _, text in tqdm(
            source_files(), desc="Reading the standard library", unit="file", leave=False, disable=None
        ):
            lines.write(json.dumps({"text": text}) + "\n")


def train_tokenizer(corpus: Path, directory: Path, vocab_size: int = 4096) -> None:
    """Trains a byte-level BPE tokenizer with an end-of-text token and a chat template, and saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with corpus.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE.read_text(),
    ).save_pretrained(directory)
