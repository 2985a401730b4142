"""Train on preferences with TRL's DPOTrainer, under context parallelism.

    accelerate launch --config_file recipes/accelerate/fsdp2_cp8.yaml recipes/dpo.py --config recipes/dpo.yaml

The YAML file and the command line take the arguments of TRL's own scripts; the command line wins. A tenth of the pairs
is held out for evaluation.
"""

from pathlib import Path
from statistics import fmean

from progress_table import ProgressTable, print_first_and_last, quiet_without_terminal
from stdlib_pairs import write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config
from trl_rows import load_rows

from hf_flashcp import FlashCPPlugin, FlashCPTrainerMixin


PAIRS = Path("outputs/cache/python_stdlib_pairs.jsonl")
COLUMNS = {"accuracy": ("rewards/accuracies", ".2f", fmean), "margin": ("rewards/margins", ".3f", fmean)}


class FlashCPDPOTrainer(FlashCPTrainerMixin, DPOTrainer):
    pass


def main():
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, DPOConfig, ModelConfig)
    ).parse_args_and_config()
    quiet_without_terminal()
    training_args.parallelism_config = FlashCPPlugin()  # cp_size from the config file of accelerate launch
    rows = load_rows(script_args, training_args, PAIRS, write_pairs).train_test_split(0.1, seed=training_args.seed)
    trainer = FlashCPDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, attn_implementation="flashcp", dtype=model_args.dtype
        ),
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path),
        peft_config=get_peft_config(model_args),
    )
    ProgressTable.install(trainer, columns=COLUMNS)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    held_out = trainer.evaluate()
    trainer.save_model()
    means = print_first_and_last(trainer, ["rewards/accuracies", "rewards/margins"])
    trainer.accelerator.print(f"Accuracy on held-out pairs: {held_out['eval_rewards/accuracies']:.3f}")
    trainer.save_metrics("eval", held_out)
    trainer.save_metrics("train", result.metrics | means | trainer.plan_metrics.means())


if __name__ == "__main__":
    main()
