"""jaxrl's update and log-prob pass on packed streams; see benchmarks/harness.py."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np

from jaxrl import config
from jaxrl.grpo import packing
from jaxrl.grpo import update as grpo
from jaxrl.grpo.objective import Objective
from jaxrl.models import attention, decoder, hf
from jaxrl.parallel.mesh import make_mesh, to_devices
from jaxrl.types import Prompt, Rollout

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
chunk, batch, mesh = settings["chunk"], np.load(folder / "batch.npz"), make_mesh()
model = hf.load(folder / "model", mesh=mesh)
rollouts, first, longest = [], int(batch["prompt"]), batch["tokens"].shape[1]
for tokens, length, old in zip(batch["tokens"], batch["lengths"], batch["old_logprobs"], strict=True):
    prompt = Prompt("", tokens[:first], "")
    rollouts.append(Rollout(prompt, tokens[first:length], old[first:length], "stop", 0))
buckets = packing.bucket_lengths(settings["bucket"], longest)
dense, attended = decoder.forward_flops(model.config)
streams = packing.stream_lengths(settings["stream"], buckets[-1], math.lcm(settings["bucket"], chunk))
layout = packing.Layout(streams, buckets, attention_cost=attended / dense)
packed = packing.pack(rollouts, batch["advantages"], 1, layout, learning_rate=1e-6)
executed = int(packed.micro_batches.sum()) * packed.tokens.shape[2]
packed = to_devices(packed.replace(old_logprobs=packed.sampler_logprobs), mesh)
optimizer = grpo.make_optimizer(config.Optimizer())
backend = attention.choose_backend(settings["backend"], settings["dtype"], jax.devices()[0])
numerics = grpo.Numerics(settings["dtype"], settings["remat"], backend, logprob_chunk=chunk)
objective = Objective(clip_low=0.2, clip_high=0.28, dual_clip=1e9)
update, logprobs = grpo.make_update(model.config, optimizer, mesh, layout, numerics, objective)
state = grpo.init_state(model.params, optimizer, mesh)
del model  # the state owns the parameters now
for request in sys.stdin:
    found = {}
    if request.strip() == "logprobs":
        jax.block_until_ready(logprobs(state.params, packed))
    else:
        traced = request.strip() == "profile"
        with jax.profiler.trace(settings["profile"]) if traced else nullcontext():
            state, metrics = update(state, packed)
            jax.block_until_ready(state)
        found = {name: float(metrics[name]) for name in ("loss", "grad_norm", "entropy")}
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(json.dumps(found | {"executed_tokens": executed, "peak_bytes": peak}), flush=True)
