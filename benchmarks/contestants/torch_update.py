"""The step in PyTorch with transformers' Qwen2 and SDPA, padded; see benchmarks/update_cpu.py."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
folder = Path(sys.argv[1])
batch = np.load(folder / "batch.npz")
tokens = torch.tensor(batch["tokens"]).long()
lengths = torch.tensor(batch["lengths"])[:, None]
place = torch.arange(tokens.shape[1])[None]
attended, completion = place < lengths, (place >= int(batch["prompt"])) & (place < lengths)
old, live = torch.tensor(batch["old_logprobs"])[:, 1:], completion[:, 1:]
advantages = torch.tensor(batch["advantages"])[:, None]
mask = None if attended.all() else attended.long()  # without one, SDPA takes its causal kernel
model = AutoModelForCausalLM.from_pretrained(
    folder / "model", dtype=torch.float32, attn_implementation="sdpa"
).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)


def step() -> dict[str, float]:
    logits = model(tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = torch.log_softmax(logits, -1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)[live].mean()
    ratio = torch.exp(torch.gather(logprobs, 2, tokens[:, 1:, None])[..., 0] - old)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    loss = losses[live].sum() / live.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item(), "grad_norm": norm.item(), "entropy": entropy.item()}


for _ in sys.stdin:
    print(json.dumps(step()), flush=True)
