"""The step in PyTorch with transformers' Qwen2 and SDPA; see benchmarks/harness.py.

Rows of similar length are padded on the right to the longest of their micro-batch. As attention is causal they need no
mask, and without one SDPA takes its fastest kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.set_num_threads(settings["threads"])
torch.backends.cuda.matmul.allow_tf32 = True
device = "cuda" if torch.cuda.is_available() else "cpu"
batch = dict(np.load(folder / "batch.npz"))
kind = {"dtype": torch.float32, "attn_implementation": "sdpa"}
model = AutoModelForCausalLM.from_pretrained(folder / "model", **kind).to(device).train()
if settings["remat"] != "none":
    model.gradient_checkpointing_enable({"use_reentrant": False})
half = settings["dtype"] == "bfloat16"
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)
completion_tokens = int((batch["lengths"] - batch["prompt"]).sum())


def micro_batches() -> Iterator[np.ndarray]:
    """Yields rows of the batch, as many at a time as `stream` tokens hold."""
    waiting = np.argsort(-batch["lengths"], kind="stable")
    while len(waiting):
        rows = max(1, settings["stream"] // batch["lengths"][waiting[0]])
        yield waiting[:rows]
        waiting = waiting[rows:]


def on_device(rows: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Tokens [b, t]; old log-probs of all but the first, and whether they are a completion's; advantages [b, 1]."""
    end = batch["lengths"][rows].max()
    position = np.arange(1, end)
    live = (position >= batch["prompt"]) & (position < batch["lengths"][rows, None])
    arrays = batch["tokens"][rows, :end].astype(int), batch["old_logprobs"][rows, 1:end], live
    return tuple(torch.tensor(x, device=device) for x in (*arrays, batch["advantages"][rows, None]))


def head(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(model.lm_head(hidden).float(), -1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.gather(logprobs, -1, targets[..., None])[..., 0], entropy


def logprobs_of(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies [b, t - 1]; logits whole, or recomputed `chunk` tokens at a time."""
    hidden, targets = model.model(tokens, use_cache=False).last_hidden_state[:, :-1], tokens[:, 1:]
    if not settings["chunk"]:
        return head(hidden, targets)
    size = settings["chunk"]
    parts = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
    found = [checkpoint(head, h, t, use_reentrant=False) for h, t in parts]
    return tuple(torch.cat(x).view_as(targets) for x in zip(*found, strict=True))


def autocast() -> torch.autocast | nullcontext[None]:
    return torch.autocast(device, torch.bfloat16) if half else nullcontext()


def update() -> dict[str, float]:
    total, entropy_sum = 0.0, 0.0
    for tokens, old, live, advantages in map(on_device, micro_batches()):
        with autocast():
            new, entropy = logprobs_of(tokens)
        ratio = torch.exp(new - old)
        losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
        loss = losses[live].sum() / completion_tokens
        loss.backward()
        total += loss.detach()
        entropy_sum += entropy[live].sum()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": float(total), "grad_norm": float(norm), "entropy": float(entropy_sum / completion_tokens)}


@torch.no_grad()
def logprobs() -> dict[str, float]:
    for tokens, *_ in map(on_device, micro_batches()):
        with autocast():
            logprobs_of(tokens)
    return {}


executed = sum(len(rows) * int(batch["lengths"][rows].max()) for rows in micro_batches())
for request in sys.stdin:
    found = logprobs() if request.strip() == "logprobs" else update()
    if device == "cuda":
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found | {"executed_tokens": executed}), flush=True)
