"""Hugging Face transformers on a GPU at the shape of a config.json, with random weights in bfloat16, for bench/gpu.mjs:
python3 gpu.py CONFIG.json LAYERS. Prints one JSON line: ms a token of one user after 128 tokens, tokens/s of 256 users, ms of a prompt of 4,096."""
import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

raw = json.load(open(sys.argv[1]))
layers = int(sys.argv[2])
raw.update(num_hidden_layers=layers, moe_layer_end_index=layers - 1, moe_layer_interval=raw.get("moe_layer_interval", 1))
raw.pop("quantization_config", None)
config = Ernie4_5_MoeConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "torch_dtype", "dtype")})
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.eval()


def timed(batch, tokens, new):
    ids = torch.randint(20, config.vocab_size, (batch, tokens), device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def between(batch, tokens, few, many):
    timed(batch, tokens, 2)
    a, b = timed(batch, tokens, few), timed(batch, tokens, many)
    return (b - a) / (many - few)


with torch.inference_mode():
    one = between(1, 128, 4, 12)
    many = between(256, 128, 2, 5)
    timed(1, 4096, 1)
    prompt = sorted(timed(1, 4096, 1) for _ in range(3))[1]
import transformers

print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__, "one_ms": 1000 * one, "users256": 256 / many, "prompt4096_ms": 1000 * prompt}))
