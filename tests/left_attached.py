"""A script of two processes that attach a model, train a step, and end without removing the handle."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from hf_flashcp import attach


def main():
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=67)
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="flashcp")).train()
    handle = attach(model, mesh)
    ids = torch.arange(1, 17)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    dist.barrier()
    return handle


if __name__ == "__main__":
    kept = main()
    print("trained", end="")
    sys.stdout.flush()
