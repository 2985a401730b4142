"""Fine-tune on chats with TRL's SFTTrainer and TRL's packing, under context parallelism.

    accelerate launch --config_file recipes/accelerate/fsdp2_cp8.yaml recipes/trl_sft.py --config recipes/trl_sft.yaml

The YAML file and the command line take the arguments of TRL's own scripts; the command line wins.
"""

from pathlib import Path

from progress_table import ProgressTable, quiet_without_terminal
from stdlib_chats import write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config
from trl_rows import load_rows

from hf_flashcp import FlashCPPlugin, FlashCPTrainerMixin


CHATS = Path("outputs/cache/python_stdlib_chats.jsonl")


class FlashCPSFTTrainer(FlashCPTrainerMixin, SFTTrainer):
    pass


def main():
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig)
    ).parse_args_and_config()
    quiet_without_terminal()
    training_args.parallelism_config = FlashCPPlugin()  # cp_size from the config file of accelerate launch
    trainer = FlashCPSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, attn_implementation="flashcp", dtype=model_args.dtype
        ),
        args=training_args,
        train_dataset=load_rows(script_args, training_args, CHATS, write_chats),
        processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path),
        peft_config=get_peft_config(model_args),
    )
    ProgressTable.install(trainer)
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_metrics("train", result.metrics | trainer.plan_metrics.means())


if __name__ == "__main__":
    main()
