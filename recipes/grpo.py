"""Reinforce answers with a reward, with TRL's GRPOTrainer, under context parallelism.

    accelerate launch --config_file recipes/accelerate/fsdp2_cp8.yaml recipes/grpo.py --config recipes/grpo.yaml

The YAML file and the command line take the arguments of TRL's own scripts; the command line wins. Replace
`plain_words`, which rewards prose, with a reward of your own; it also receives the columns of the data.
"""

from pathlib import Path
from statistics import fmean

from progress_table import ProgressTable, print_first_and_last, quiet_without_terminal
from stdlib_pairs import write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl_rows import load_rows

from hf_flashcp import FlashCPPlugin, FlashCPTrainerMixin


PAIRS = Path("outputs/cache/python_stdlib_pairs.jsonl")  # only the prompts are used
COLUMNS = {"reward": ("reward", ".3f", fmean), "length": ("completions/mean_length", ".1f", fmean)}
ENOUGH_WORDS = 24


class FlashCPGRPOTrainer(FlashCPTrainerMixin, GRPOTrainer):
    pass


def plain_words(completions, **columns):
    """Returns how many different words without digits and symbols each completion has, as a share of enough words."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    words = [{word for word in text.split() if word.rstrip(".,").isalpha()} for text in texts]
    return [min(len(each) / ENOUGH_WORDS, 1.0) for each in words]


def main():
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, GRPOConfig, ModelConfig)
    ).parse_args_and_config()
    quiet_without_terminal()
    training_args.parallelism_config = FlashCPPlugin()  # cp_size from the config file of accelerate launch
    trainer = FlashCPGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, attn_implementation="flashcp", dtype=model_args.dtype
        ),
        reward_funcs=plain_words,
        args=training_args,
        train_dataset=load_rows(script_args, training_args, PAIRS, write_pairs),
        processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path),
        peft_config=get_peft_config(model_args),
    )
    ProgressTable.install(trainer, columns=COLUMNS)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    means = print_first_and_last(trainer, ["reward"])
    trainer.save_metrics("train", result.metrics | means | trainer.plan_metrics.means())


if __name__ == "__main__":
    main()
