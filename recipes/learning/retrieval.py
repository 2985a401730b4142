"""Train a model to look up values far back in long documents, with context parallelism.

    accelerate launch --config_file recipes/accelerate/cpu_cp2.yaml recipes/learning/retrieval.py \
        --config recipes/learning/retrieval.yaml --output_dir DIR [--window 256] [--argument value ...]

A document is filler that contains one entry per key, a single token that stands for the key and its value. At the end
of the document each key is asked for, and the value is the only target. Half of the keys always have their entries
near the questions, the other half always far away. With --window the documents are cut into pieces of that many tokens
before packing.
"""

from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments, set_seed
from trl import TrlParser, pack_dataset

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer


KEYS, VALUES, FILLERS = 16, 8, 32
FAR_KEYS = KEYS // 2  # keys from this one on have their entries far away
FIRST_QUESTION = KEYS * VALUES  # tokens below are entries
FIRST_VALUE = FIRST_QUESTION + KEYS
FIRST_FILLER = FIRST_VALUE + VALUES
VOCABULARY = FIRST_FILLER + FILLERS
NEAR, FAR = 128, 256  # tokens from an entry to its question: less than NEAR, or at least FAR
NEAREST = 32  # accuracy is shown for all shorter distances together, then by octave
IGNORE_INDEX = -100


@dataclass
class TaskArguments:
    num_documents: int = field(default=4000, metadata={"help": "Training documents."})
    num_eval_documents: int = field(default=24, metadata={"help": "Evaluation documents, all of max_tokens."})
    min_tokens: int = field(default=384, metadata={"help": "Shortest document."})
    max_tokens: int = field(default=2048, metadata={"help": "Longest document."})
    row_tokens: int = field(default=4096, metadata={"help": "Tokens of a packed row."})
    window: int | None = field(default=None, metadata={"help": "Cut training documents into pieces of this length."})


def make_document(generator, num_tokens):
    """Returns a document, its labels (-100 except at the answers), and the tokens between each question and its entry,
    which are spread evenly on a logarithmic scale."""
    body = num_tokens - 2 * KEYS
    asked = np.arange(body, num_tokens, 2)
    keys, values = generator.permutation(KEYS), generator.integers(VALUES, size=KEYS)
    places = np.empty(KEYS, int)
    for chosen, nearest, farthest in ((keys < FAR_KEYS, 1, NEAR - 2 * KEYS), (keys >= FAR_KEYS, FAR, body)):
        back = np.arange(nearest, farthest + 1)  # from the first question
        places[chosen] = body - generator.choice(back, chosen.sum(), replace=False, p=(1 / back) / (1 / back).sum())
    tokens = FIRST_FILLER + generator.integers(FILLERS, size=num_tokens)
    labels = np.full(num_tokens, IGNORE_INDEX)
    tokens[places], tokens[asked] = VALUES * keys + values, FIRST_QUESTION + keys
    tokens[asked + 1] = labels[asked + 1] = FIRST_VALUE + values
    return tokens, labels, asked - places


def make_documents(seed, count, min_tokens, max_tokens):
    """Returns a dataset of documents whose lengths are spread evenly on a logarithmic scale, and their distances as an
    array of shape (count, KEYS)."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.uniform(np.log(min_tokens), np.log(max_tokens), count)).round().astype(int)
    tokens, labels, distances = zip(*(make_document(generator, length) for length in lengths))
    return Dataset.from_dict({"input_ids": tokens, "labels": labels}), np.array(distances)


def cut(documents, window):
    """Cuts documents into pieces of `window` tokens, counted from the end, so that questions keep a full window."""

    def pieces(batch):
        return {
            key: [row[max(stop - window, 0) : stop] for row in rows for stop in range(len(row), 0, -window)]
            for key, rows in batch.items()
        }

    return documents.map(pieces, batched=True)


def accuracy_by_distance(distances):
    """Returns a `compute_metrics` for documents with these distances: the share of right answers, overall and by
    octave of distance from NEAREST on; octave 0 holds all shorter distances."""
    distances = distances.ravel()
    octaves = np.where(distances < NEAREST, 0, 2 ** np.floor(np.log2(distances)).astype(int))

    def compute(prediction):
        targets = prediction.label_ids[:, 1:]
        right = (prediction.predictions[:, :-1] == targets)[targets != IGNORE_INDEX]
        found = {f"accuracy_{octave}": float(right[octaves == octave].mean()) for octave in np.unique(octaves)}
        return {"accuracy": float(right.mean()), **found}

    return compute


def make_model(max_tokens):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=max_tokens,
        initializer_range=0.1,  # about hidden_size ** -0.5
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="flashcp")


def parse_arguments(argv=None):
    return TrlParser((TaskArguments, TrainingArguments)).parse_args_and_config(argv)


def train(task: TaskArguments, args: TrainingArguments) -> FlashCPTrainer:
    set_seed(args.seed)
    plugin = args.parallelism_config = FlashCPPlugin()
    documents, _ = make_documents(args.seed, task.num_documents, task.min_tokens, task.max_tokens)
    if task.window is not None:
        documents = cut(documents, task.window)
    eval_documents, distances = make_documents(
        args.seed + 1, task.num_eval_documents, task.max_tokens, task.max_tokens
    )
    trainer = FlashCPTrainer(
        model=make_model(task.max_tokens),
        args=args,
        train_dataset=pack_dataset(documents, task.row_tokens, "bfd"),
        eval_dataset=eval_documents,
        data_collator=FlashCPCollator(plugin.cp_size),
        compute_metrics=accuracy_by_distance(distances),
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    trainer.train()
    trainer.save_state()
    return trainer


if __name__ == "__main__":
    train(*parse_arguments())
