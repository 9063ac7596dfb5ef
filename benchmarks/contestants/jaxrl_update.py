"""jaxrl's step, packed; see benchmarks/update_cpu.py."""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np

from jaxrl.distributed import make_mesh, to_devices
from jaxrl.grpo import packing
from jaxrl.grpo import update as grpo
from jaxrl.models import hf
from jaxrl.sampling.sampler import Prompt, Rollout

STREAM, BUCKET, CHUNK = 2048, 64, 256

folder = Path(sys.argv[1])
batch = np.load(folder / "batch.npz")
model, mesh = hf.load(folder / "model"), make_mesh()
rollouts, first = [], int(batch["prompt"])
for tokens, length, old in zip(batch["tokens"], batch["lengths"], batch["old_logprobs"], strict=True):
    prompt = Prompt("", tokens[:first], "")
    rollouts.append(Rollout(prompt, tokens[first:length], old[first:length], "stop", 0))
buckets = packing.bucket_lengths(BUCKET, batch["tokens"].shape[1])
packed = packing.pack(
    rollouts, batch["advantages"], devices=1, buckets=buckets, normalization="token_mean", max_tokens=512,
    streams=packing.stream_lengths(STREAM, buckets[-1], math.lcm(BUCKET, CHUNK)),
)  # fmt: skip
packed = to_devices(packed.replace(old_logprobs=packed.sampler_logprobs), mesh)
optimizer = grpo.make_optimizer(
    learning_rate=1e-6, warmup_steps=0, updates_per_step=1, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1,
    max_grad_norm=1.0,
)  # fmt: skip
update, _ = grpo.make_update(
    model.config, optimizer, mesh, buckets=buckets, backend="xla", dtype="float32", remat="none", temperature=1.0,
    chunk=CHUNK, clip_low=0.2, clip_high=0.28, dual_clip=1e9,
)  # fmt: skip
state = grpo.init_state(model.params, optimizer, mesh)
for _ in sys.stdin:
    state, metrics = update(state, packed)
    jax.block_until_ready(state)
    print(json.dumps({name: float(metrics[name]) for name in ("loss", "grad_norm", "entropy")}), flush=True)
