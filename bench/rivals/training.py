#!/usr/bin/env python3
"""A LoRA step in PyTorch with transformers and PEFT, to run beside `bench/training.mjs` on the same model, tokens and threads.

usage: training.py FOLDER [--rows 1024] [--rank 16] [--threads 2] [--steps 5] [--dtypes float32,bfloat16]

FOLDER is a dense checkpoint in the hub's layout, as `mixtape quantize random:0.3b FOLDER --dtype bf16` writes it. Adapters on every matrix of
every layer, AdamW, one sequence; each number format with and without recomputing activations. Prints medians of the steps after the first.
Needs torch, transformers >= 5 and peft.
"""
import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

flags = argparse.ArgumentParser()
flags.add_argument("folder")
for name, default in (("rows", 1024), ("rank", 16), ("threads", 2), ("steps", 5)):
    flags.add_argument(f"--{name}", type=int, default=default)
flags.add_argument("--dtypes", default="float32,bfloat16")
flags = flags.parse_args()
torch.set_num_threads(flags.threads)


def measure(dtype, checkpointing):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(flags.folder, dtype=dtype)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=flags.rank, lora_alpha=2 * flags.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.randint(model.config.vocab_size, (1, flags.rows))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
    seconds = []
    for step in range(flags.steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step > 0:
            seconds.append(time.perf_counter() - start)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    median = statistics.median(seconds)
    print(
        f"{str(dtype).removeprefix('torch.'):9} {'recomputing' if checkpointing else 'storing':12} {median:8.3f} s a step "
        f"({min(seconds):.3f} to {max(seconds):.3f})  {flags.rows / median:8.1f} tokens/s  {trained:,} trained",
        flush=True,
    )


print(f"torch {torch.__version__}, {flags.threads} threads, {flags.rows} tokens, rank {flags.rank}")
for name in flags.dtypes.split(","):
    for checkpointing in (False, True):
        measure(getattr(torch, name), checkpointing)
