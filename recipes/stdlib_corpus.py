"""A corpus that every machine has: the source files of Python's standard library, and a tokenizer trained on them."""

import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"
SMALLEST_FILE = 2_000  # bytes; shorter ones are mostly empty __init__ files


def write_corpus(path: Path) -> None:
    """One JSON line {"text": ...} for each source file of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        file
        for file in root.rglob("*.py")
        if "site-packages" not in file.parts and file.stat().st_size >= SMALLEST_FILE
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lines:
        for file in tqdm(files, desc=f"Reading {root}", unit="file"):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # files that test other encodings
                continue
            lines.write(json.dumps({"text": text}) + "\n")


def train_tokenizer(corpus: Path, directory: Path, vocab_size: int = 4096) -> None:
    """A byte-level BPE tokenizer with an end-of-text token, saved as transformers loads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    with corpus.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(directory)
