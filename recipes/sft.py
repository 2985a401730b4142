"""Fine-tune a causal language model on packed documents or chats with context parallelism.

    accelerate launch --config_file recipes/accelerate/fsdp2_cp8.yaml recipes/sft.py config.yaml [--argument value ...]

The YAML file and the command line take the arguments below, those of TRL's ModelConfig and those of transformers'
TrainingArguments; the command line wins. Without a model and a dataset it trains a small model from scratch on the
source files of Python's standard library. docs/recipes.md describes the YAML files beside this script.
"""

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from peft import get_peft_model
from progress_table import ProgressTable, quiet_without_terminal
from rich.console import Console
from rich.table import Table
from rope import set_window
from text_rows import DataArguments, load_tokenizer, make_packed_rows, print_data_table, use_default_data
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig, get_peft_config, get_quantization_config

from hf_flashcp import FlashCPPlugin, FlashCPTrainer
from hf_flashcp.integrations.gradient_check import gradient_error, per_document_gradients


@dataclass
class ModelArguments(ModelConfig):
    attn_implementation: str = field(default="flashcp", metadata={"help": "Which attention implementation to use."})
    dtype: str = field(default="float32", metadata={"help": "Parameter dtype, e.g. bfloat16."})
    model_type: str = field(
        default="qwen3",
        metadata={"help": "Architecture to build from scratch without model_name_or_path."},
    )
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "Config attributes of a model built from scratch: a dict or JSON."}
    )
    rope_parameters: dict | str | None = field(
        default=None,
        metadata={"help": "Merged into the rope_parameters of the model's config: a dict or JSON."},
    )
    max_position_embeddings: int | None = field(
        default=None,
        metadata={"help": "The model's longest sequence. Defaults to what rope_parameters scale to."},
    )
    tokenizer_name: str | None = field(default=None, metadata={"help": "Defaults to the model's tokenizer."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("config_overrides", "rope_parameters"):
            if isinstance(getattr(self, name), str):
                try:
                    setattr(self, name, json.loads(getattr(self, name)))
                except ValueError as error:
                    raise SystemExit(
                        f"{name} is not valid JSON: {error}. Pass a dict, for example '{{\"factor\": 2.0}}'."
                    ) from None
        name = self.model_name_or_path
        if name is not None and name.startswith((".", "/")) and not Path(name).is_dir():
            raise SystemExit(
                f"There is no model in {name}. For the quickstart's model run recipes/quickstart.sh first. Otherwise "
                "set --model_name_or_path to another directory or to a name on the hub."
            )


@dataclass
class ContextParallelArguments:
    cp_size: int | None = field(
        default=None, metadata={"help": "Processes that share each batch. Defaults to accelerate's config file."}
    )
    strategy: str | None = field(default=None, metadata={"help": "How documents are sharded (see plan_documents)."})
    hardware: str = field(
        default="auto",
        metadata={"help": "Hardware to minimise the predicted step time for: auto, a profile (h100) or a JSON file."},
    )
    keep_received_kv: bool | None = field(
        default=None, metadata={"help": "Whether layers keep received KV for backward (see FlashCPPlugin)."}
    )
    head_groups: int = field(
        default=1, metadata={"help": "Groups of KV heads that attention computes one after another, to save memory."}
    )
    mlp_tiles: int = field(
        default=1, metadata={"help": "Tiles of tokens that feed-forward blocks compute one after another, likewise."}
    )
    check_gradient: bool = field(
        default=False,
        metadata={"help": "Compare the first step's gradient with a single-process run of the same documents."},
    )
    table_steps: int = field(default=10, metadata={"help": "Steps per row of the table that training prints."})


def parse_arguments(argv):
    parser = HfArgumentParser((ModelArguments, DataArguments, ContextParallelArguments, TrainingArguments))
    parser.set_defaults(per_device_train_batch_size=1)  # one packed row per batch
    if argv and argv[0].endswith((".yaml", ".yml")):
        settings = {current_name(str(name)): value for name, value in read_settings(argv[0]).items()}
        unknown = settings.keys() - {action.dest for action in parser._actions}
        if unknown:
            raise SystemExit(f"{argv[0]}: unknown arguments {', '.join(sorted(unknown))}. See sft.py --help.")
        parser.set_defaults(**settings)
        argv = argv[1:]
    return parser.parse_args_into_dataclasses([current_name(argument) for argument in argv])


def current_name(argument):
    """Translates gradient_checkpointing or activation_checkpointing (transformers 5.24) to this version's name."""
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return re.sub(r"^(--)?(activation|gradient)([_-]checkpointing)", rf"\1{name}\3", argument)


def read_settings(file):
    try:
        settings = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise SystemExit(f"{file} cannot be read: {error}") from None
    if settings is not None and not isinstance(settings, dict):
        raise SystemExit(f"{file} has no settings. Write one `name: value` per line, for example `window: 4096`.")
    return settings or {}


def make_model(model_args, data_args, tokenizer):
    name = model_args.model_name_or_path
    if name is not None:
        config = AutoConfig.from_pretrained(name, revision=model_args.model_revision)
    else:
        config = AutoConfig.for_model(
            model_args.model_type,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            **(model_args.config_overrides or {}),
        )
    set_window(config, model_args.rope_parameters, model_args.max_position_embeddings)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and data_args.window > positions:
        raise SystemExit(
            f"The window of {data_args.window} tokens is longer than the model's max_position_embeddings {positions}. "
            "Lower --window, or extend the model's positions as recipes/long_window.yaml does."
        )
    options = {"attn_implementation": model_args.attn_implementation, "dtype": model_args.dtype}
    if name is None:
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        options |= {"revision": model_args.model_revision, "quantization_config": get_quantization_config(model_args)}
        model = AutoModelForCausalLM.from_pretrained(name, config=config, **options)
    peft_config = get_peft_config(model_args)
    return model if peft_config is None else get_peft_model(model, peft_config)


class CheckedTrainer(FlashCPTrainer):
    """Checks the first step's gradient: the main process repeats the step alone, one document at a time."""

    gradient_error = None

    def __init__(self, *args, check_gradient=False, **kwargs):
        super().__init__(*args, **kwargs)
        self._to_check = [] if check_gradient else None

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._to_check is not None:
            self._to_check.append(self._prepare_inputs(inputs))
            if self.accelerator.sync_gradients:
                self._check()
        return loss

    def _check(self):
        batches, self._to_check = self._to_check, None
        if self.is_fsdp_enabled or self.args.world_size != self.get_cp_size():
            self.accelerator.print(
                "check_gradient skipped: it needs replicated parameters and one batch for all processes."
            )
            return
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            ours = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
            self.gradient_error = gradient_error(ours, per_document_gradients(model, batches))
        self.accelerator.wait_for_everyone()


def describe(trainer, window, table_steps):
    """Returns two lines on what is about to run."""
    model, cp_size = trainer.accelerator.unwrap_model(trainer.model), trainer.get_cp_size()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    groups = trainer.args.world_size // cp_size
    who = f"{cp_size} processes share each row" if cp_size > 1 else "each row is on one process"
    return (
        f"\nTraining a {model.config.model_type} model of {parameters:,.1f} million parameters on packed rows of up "
        f"to {window:,} tokens: {who}{f', {groups} groups in parallel' if groups > 1 else ''}.\n"
        f"Each line averages {table_steps} steps. Imbalance: attention work of the busiest process / mean. KV share: "
        "of an all-gather.\n"
    )


def summarize(trainer, train_metrics, data_counts):
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {
        **train_metrics,
        **{f"data_{name}": count for name, count in data_counts.items()},
        "train_tokens_per_second": trainer.state.num_input_tokens_seen / train_metrics["train_runtime"],
        "flashcp_first_loss": losses[0],
        "flashcp_last_loss": losses[-1],
        "flashcp_mean_of_last_losses": sum(losses[-10:]) / len(losses[-10:]),
        **trainer.plan_metrics.means(),
    }
    if trainer.gradient_error is not None:
        metrics["flashcp_gradient_error"] = trainer.gradient_error
    return metrics


def plan_table(plan):
    report, documents = plan.report(), len(plan.lengths)
    contents = f"{documents} document{'s' if documents > 1 else ''}, {plan.num_tokens:,} tokens"
    table = Table(title=f"Plan of the last packed row: {contents}")
    for column in ("rank", "slices", "tokens", "attention pairs", "KV received", "KV sent"):
        table.add_column(column, justify="right")
    for rank, slices in enumerate(plan.slices):
        counts = [report[key][rank] for key in ("tokens", "pairs", "kv_received", "kv_sent")]
        table.add_row(str(rank), str(len(slices)), *(f"{count:,}" for count in counts))
    return table


def summary_table(metrics, cp_size, kernels):
    table = Table(title=f"Context parallelism over {cp_size} processes", show_header=False)
    rows = [
        ("loss of the first step", f"{metrics['flashcp_first_loss']:.3f}"),
        ("loss of the last step", f"{metrics['flashcp_last_loss']:.3f}"),
        ("loss, mean of the last ten logged", f"{metrics['flashcp_mean_of_last_losses']:.3f}"),
        ("tokens per second", f"{metrics['train_tokens_per_second']:,.0f}"),
        ("attention kernel", ", ".join(kernels)),
        ("token imbalance (max / mean)", f"{metrics['flashcp_token_imbalance']:.4f}"),
        ("attention imbalance (max / mean)", f"{metrics['flashcp_pair_imbalance']:.4f}"),
        ("KV moved, as a share of an all-gather", f"{metrics['flashcp_kv_fraction']:.1%}"),
    ]
    if "flashcp_gradient_error" in metrics:
        rows.append(("gradient error against a single process", f"{metrics['flashcp_gradient_error']:.1e}"))
    for row in rows:
        table.add_row(*row)
    return table


def checkpoint_to_resume(training_args):
    """Returns the checkpoint that --resume_from_checkpoint names. With "true", and after a restart by
    torchrun --max-restarts, that is the last one in output_dir, or None if there is none."""
    wanted, last = training_args.resume_from_checkpoint, None
    if os.path.isdir(training_args.output_dir):
        last = get_last_checkpoint(training_args.output_dir)
    if str(wanted).lower() == "true":
        return last
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return last if restarted and last is not None else wanted


def main():
    model_args, data_args, cp_args, training_args = parse_arguments(sys.argv[1:])
    set_seed(training_args.seed)
    quiet_without_terminal()
    of_plugin = ("cp_size", "strategy", "hardware", "keep_received_kv", "head_groups", "mlp_tiles")
    plugin = training_args.parallelism_config = FlashCPPlugin(**{name: getattr(cp_args, name) for name in of_plugin})

    with training_args.main_process_first(desc="data"):
        default_tokenizer = use_default_data(
            data_args, not (model_args.tokenizer_name or model_args.model_name_or_path)
        )
        name = model_args.tokenizer_name or model_args.model_name_or_path or default_tokenizer
        tokenizer = load_tokenizer(name, data_args)
        rows, data_counts = make_packed_rows(
            tokenizer,
            data_args,
            cp_size=plugin.cp_size,
            dp_size=training_args.world_size // plugin.cp_size,
            gradient_accumulation_steps=training_args.gradient_accumulation_steps,
        )
    model = make_model(model_args, data_args, tokenizer)
    tokenizer.model_max_length = max(tokenizer.model_max_length, data_args.window)
    trainer = CheckedTrainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        processing_class=tokenizer,
        check_gradient=cp_args.check_gradient,
    )
    ProgressTable.install(trainer, cp_args.table_steps)
    if trainer.is_world_process_zero():
        print_data_table(data_counts)
        print(describe(trainer, data_args.window, cp_args.table_steps), flush=True)
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    disable_progress_bar()  # of saving
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        metrics = summarize(trainer, result.metrics, data_counts)
        trainer.save_metrics("train", metrics)
        console = Console()
        console.print()
        if trainer.flashcp.plan is not None:  # None: resumed from the last step
            console.print(plan_table(trainer.flashcp.plan.plan))
            console.print(summary_table(metrics, trainer.get_cp_size(), trainer.flashcp.kernels))
        console.print(f"Model, logs and metrics are in {training_args.output_dir}.", highlight=False)


if __name__ == "__main__":
    main()
