"""A training loop with accelerate: gradient accumulation, evaluation and checkpoints (see docs/recipes.md)."""

import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from text_rows import DataArguments, load_tokenizer, make_packed_rows, print_data_table, use_default_data
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, HfArgumentParser

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach


@dataclass
class LoopArguments:
    model_name_or_path: str = "./outputs/quickstart"
    dtype: str = "float32"
    learning_rate: float = 1e-4
    max_steps: int = 20
    gradient_accumulation_steps: int = 2
    eval_rows: int = 4
    eval_steps: int = 10
    output_dir: str = "outputs/accelerator_loop"
    resume_from_checkpoint: bool = False


def targets_of(batches, accelerator, cp_size):
    """Returns the number of targets on all processes. Each batch is counted by cp_size of them."""
    count = sum((batch["shift_labels"] != -100).sum() for batch in batches)
    return accelerator.reduce(count, "sum") / cp_size


@torch.no_grad()
def evaluate(model, loader, accelerator, cp_size):
    """Returns the mean loss over all targets."""
    model.eval()
    batches = list(loader)
    targets = targets_of(batches, accelerator, cp_size)
    loss = sum(model(**batch, num_items_in_batch=targets).loss for batch in batches)
    model.train()
    return accelerator.reduce(loss, "sum").item()


def main():
    args, data_args = HfArgumentParser((LoopArguments, DataArguments)).parse_args_into_dataclasses()
    plugin = FlashCPPlugin(skip_logits=True)  # cp_size from the config file of accelerate launch
    accelerator = Accelerator(parallelism_config=plugin)
    with accelerator.main_process_first():
        use_default_data(data_args, needs_tokenizer=False)
        tokenizer = load_tokenizer(args.model_name_or_path, data_args)
        rows, counts = make_packed_rows(tokenizer, data_args)
    if accelerator.is_main_process:
        print_data_table(counts)
    rows = rows.train_test_split(args.eval_rows, seed=0)
    options = {"attn_implementation": "flashcp", "dtype": args.dtype}
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **options)
    collator = FlashCPCollator()  # plans with the plugin's settings
    same_order = torch.Generator().manual_seed(0)  # the same order on every process: a group shares its batches
    loader = DataLoader(rows["train"], shuffle=True, generator=same_order, collate_fn=collator)
    eval_loader = DataLoader(rows["test"], collate_fn=collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, loader, eval_loader)
    attach(model, accelerator)

    checkpoint, done = Path(args.output_dir) / "checkpoint", 0
    if args.resume_from_checkpoint:
        accelerator.load_state(checkpoint)
        done = int((checkpoint / "step").read_text())
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch
    batches = itertools.islice(batches, done * args.gradient_accumulation_steps, None)
    model.train()
    for step in range(done + 1, args.max_steps + 1):
        window = list(itertools.islice(batches, args.gradient_accumulation_steps))
        targets, step_loss = targets_of(window, accelerator, plugin.cp_size), 0
        for number, batch in enumerate(window, 1):
            with contextlib.nullcontext() if number == len(window) else accelerator.no_sync(model):
                loss = model(**batch, num_items_in_batch=targets).loss  # this process's part of the mean over targets
                accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
                step_loss += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step}: loss {accelerator.reduce(step_loss, 'sum').item():.4f}")
        if step % args.eval_steps == 0 or step == args.max_steps:
            eval_loss = evaluate(model, eval_loader, accelerator, plugin.cp_size)
            accelerator.print(f"step {step}: eval_loss {eval_loss:.4f}")
            accelerator.save_state(checkpoint)
            if accelerator.is_main_process:
                (checkpoint / "step").write_text(str(step))
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=weights)
        tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
