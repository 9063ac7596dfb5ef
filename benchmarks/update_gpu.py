"""The update at full size on one GPU: `python -m benchmarks.update_gpu` (`--tiny` tries the path on any machine).

DeepSeek-R1-Distill-Qwen-1.5B's shapes with random weights, bfloat16 compute, float32 state; four streams of ragged
sequences (log-normal, mean 5,000, cut at 15,360 and at what a stream holds) and one AdamW step. For each attention
backend and remat policy: tokens a second, MFU, bytes, and seconds of the old-log-prob pass. Beside it the same
sequences in PyTorch + transformers: SDPA, one sequence at a time without padding, gradient checkpointing, bfloat16
autocast, logits in chunks.

MFU counts 3 x (2 x parameters of layers and LM head x tokens + 2 x layers x heads x head size x sum of squared
lengths) FLOPs, real tokens alone and nothing recomputed, over the data sheet's dense bfloat16 peak. The floor is the
same FLOPs at the matrix-multiply rate measured here. Every configuration runs in a process of its own; one that fails
is a line in the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.hardware import HARDWARE

RESULTS = Path(__file__).parent / "results"
SHAPE = {
    "vocab_size": 151_936, "width": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "head_dim": 128, "mlp_width": 8960,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_width": 96,
}  # fmt: skip
STREAMS = 4  # micro-batches an update


@dataclasses.dataclass(frozen=True)
class Setting:
    who: str  # jaxrl or torch
    stream: int
    backend: str = ""
    remat: str = ""
    tiny: bool = False
    steps: int = 3

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.who, str(self.stream), self.backend, self.remat)))


def settings(tiny: bool, steps: int) -> list[Setting]:
    short, long = (512, 1024) if tiny else (16_384, 32_768)
    backends = ("xla",) if tiny else ("cudnn", "cudnn_packed")
    ours = [
        Setting("jaxrl", stream, backend, remat, tiny, steps)
        for remat in ("attention", "full")
        for stream in (long, short)
        for backend in backends
    ]
    return [*ours[: len(backends)], Setting("torch", short, tiny=tiny, steps=steps), *ours[len(backends) :]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the path without a GPU")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that compiles")
    parser.add_argument("--limit", type=int, default=150, help="seconds for one configuration")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        setting = Setting(**json.loads(options.one))
        print(json.dumps((run_jaxrl if setting.who == "jaxrl" else run_torch)(setting)))
        return
    rows: list[dict[str, Any]] = []
    device = in_a_process(Setting("jaxrl", 0, tiny=options.tiny), options.limit)  # stream 0: only the floor
    print(json.dumps(device))
    name = "tiny" if options.tiny else device.get("device", "unknown").replace(" ", "_")
    print(
        f"{'':<36}{'tokens/s':>9}{'MFU':>7}{'floor':>7}{'update s':>10}{'score s':>9}{'peak GB':>9}{'compile s':>11}"
    )
    for setting in settings(options.tiny, options.steps):
        row = {"setting": dataclasses.asdict(setting)} | in_a_process(setting, options.limit)
        rows.append(row)
        print(line(setting, row, device), flush=True)
        path = RESULTS / f"update_gpu_{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({"device": device, "python": platform.python_version(), "rows": rows}, indent=2) + "\n"
        )


def in_a_process(setting: Setting, limit: int) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.update_gpu",
        "--one",
        json.dumps(dataclasses.asdict(setting)),
    ]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TF_CPP_MIN_LOG_LEVEL": "2"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"over {limit} s"}
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if "Error" in text or "RESOURCE_EXHAUSTED" in text]
        return {"error": (said or done.stderr.splitlines() or ["no output"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def line(setting: Setting, row: dict[str, Any], device: dict[str, Any]) -> str:
    if "error" in row:
        return f"{setting.name:<36}{row['error']}"
    hardware = next((h for name, h in HARDWARE.items() if name in device.get("device", "")), None)
    mfu = f"{row['flops'] / row['seconds'] / hardware.flops:.1%}" if hardware else "-"
    row["floor_share"] = row["flops"] / device["matmul_flops"] / row["seconds"]
    return (
        f"{setting.name:<36}{row['tokens'] / row['seconds']:>9.0f}{mfu:>7}{row['floor_share']:>7.1%}"
        f"{row['seconds']:>10.3f}{row.get('score_seconds', float('nan')):>9.3f}{row['peak_bytes'] / 1e9:>9.1f}"
        f"{row['compile_seconds']:>11.1f}"
    )


def sequences(setting: Setting) -> tuple[list[np.ndarray], int]:
    """Ids of sequences that just fill the streams, longest first, and the length of all prompts."""
    rng, prompt, longest = np.random.default_rng(0), 150, 16_384
    if setting.tiny:
        prompt, longest = 16, setting.stream // 2
    sigma = np.sqrt(np.log1p(0.8**2))
    center = np.log(longest * 5_000 / 16_384) - sigma**2 / 2
    lengths: list[int] = []
    while True:
        length = prompt + int(np.clip(rng.lognormal(center, sigma), 2, longest * 15_360 / 16_384 - prompt))
        if sum(lengths) + length > 0.97 * STREAMS * setting.stream:
            break
        lengths.append(length)
    vocabulary = (TINY if setting.tiny else SHAPE)["vocab_size"]
    return [rng.integers(0, vocabulary, n).astype(np.int32) for n in lengths], prompt


def flops(setting: Setting, lengths: np.ndarray) -> float:
    from jaxrl.models.decoder import forward_flops

    dense, attended = forward_flops(model_config(setting))
    return float(3 * (dense * lengths.sum() + attended * (lengths**2.0).sum() / 2))


def model_config(setting: Setting) -> Any:
    from jaxrl.models import Config

    shape = TINY if setting.tiny else SHAPE
    return Config(
        "qwen2", **shape, rope_theta=10_000.0, norm_epsilon=1e-6, tied=False, max_positions=131_072
    )  # fmt: skip


def run_jaxrl(setting: Setting) -> dict[str, Any]:
    import jax

    from jaxrl.distributed import make_mesh, to_devices
    from jaxrl.grpo import packing
    from jaxrl.grpo import update as grpo
    from jaxrl.models import attention, decoder
    from jaxrl.sampling.sampler import Prompt, Rollout

    if not setting.stream:
        return floor(2048 if setting.tiny else 8192)
    config, mesh = model_config(setting), make_mesh()
    ids, prompt = sequences(setting)
    rollouts = [
        Rollout(Prompt("", x[:prompt], ""), x[prompt:], np.full(len(x) - prompt, -12, np.float32), "stop", 0)
        for x in ids
    ]
    dense, attended = decoder.forward_flops(config)
    buckets = packing.bucket_lengths(128 if setting.tiny else 512, min(setting.stream, 16_384))
    batch = packing.pack(
        rollouts, np.resize([1.0, -1.0], len(ids)).astype(np.float32), devices=mesh.size, streams=(setting.stream,),
        buckets=buckets, normalization="token_mean", max_tokens=16_384, attention_cost=attended / dense,
    )  # fmt: skip
    dtype = "float32" if setting.tiny else "bfloat16"
    optimizer = grpo.make_optimizer(
        learning_rate=1e-6, warmup_steps=0, updates_per_step=4, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1,
        max_grad_norm=1.0,
    )  # fmt: skip
    update, score = grpo.make_update(
        config, optimizer, mesh, buckets=buckets, backend=attention.choose_backend(setting.backend, dtype), dtype=dtype,
        remat=setting.remat, temperature=1.0, chunk=128 if setting.tiny else 1024, clip_low=0.2, clip_high=0.28,
        dual_clip=10.0,
    )  # fmt: skip
    abstract = grpo.abstract_state(jax.eval_shape(lambda: decoder.initialise(config, 0)), optimizer, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract.params)
    params = jax.jit(lambda: decoder.initialise(config, 0), out_shardings=shardings)()
    state, device_batch = grpo.init_state(params, optimizer, mesh), to_devices(batch, mesh)

    def step() -> Any:
        nonlocal state
        state, metrics = update(state, device_batch)
        return jax.block_until_ready((state, metrics))[1]

    compile_seconds, seconds, metrics = timed(step, setting.steps)
    _, score_seconds, _ = timed(
        lambda: jax.block_until_ready(score(state.params, device_batch)), setting.steps
    )
    lengths = np.array([len(x) for x in ids])
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "tokens": int(lengths.sum()), "micro_batches": int(batch.micro_batches[0]), "seconds": seconds,
        "score_seconds": score_seconds, "compile_seconds": compile_seconds, "flops": flops(setting, lengths),
        "peak_bytes": stats.get("peak_bytes_in_use", 0), "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]), "jax": jax.__version__,
    }  # fmt: skip


def floor(size: int) -> dict[str, Any]:
    """What the device reaches: bfloat16 matrix products, and copies (bytes read and written)."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), jnp.bfloat16)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
    big = jnp.ones((size, size, 4), jnp.float32)
    _, matmul, _ = timed(lambda: jax.block_until_ready([product(a) for _ in range(10)]), 5)
    _, copied, _ = timed(lambda: jax.block_until_ready([copy(big) for _ in range(10)]), 5)
    return {
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "matmul_flops": 10 * 2 * size**3 / matmul,
        "copy_bytes": 10 * 2 * big.nbytes / copied,
    }  # fmt: skip


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Seconds of the first call, the median of the others, and the last result."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return seconds[0], float(np.median(seconds[1:])), result


def run_torch(setting: Setting) -> dict[str, Any]:
    import torch
    from torch.utils.checkpoint import checkpoint
    from transformers import Qwen2Config, Qwen2ForCausalLM

    device, shape = "cuda" if torch.cuda.is_available() else "cpu", TINY if setting.tiny else SHAPE
    config = Qwen2Config(
        vocab_size=shape["vocab_size"], hidden_size=shape["width"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], intermediate_size=shape["mlp_width"],
        max_position_embeddings=131_072, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        model = Qwen2ForCausalLM(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)
    ids, prompt = sequences(setting)
    rows = [torch.tensor(x, device=device).long() for x in ids]
    total = sum(len(x) - prompt for x in ids)

    def logprobs_of(hidden: Any, target: Any) -> Any:
        logits = model.lm_head(hidden).float()
        log_z = torch.logsumexp(logits, -1)
        with torch.no_grad():
            entropy = log_z - (torch.softmax(logits, -1) * logits).sum(-1)
        return torch.gather(logits, 1, target[:, None])[:, 0] - log_z, entropy

    def forward(row: Any) -> Any:
        hidden = model.model(row[None], use_cache=False).last_hidden_state[0, prompt - 1 : -1]
        chunks = zip(hidden.split(1024), row[prompt:].split(1024), strict=True)
        return torch.cat([checkpoint(logprobs_of, *chunk, use_reentrant=False)[0] for chunk in chunks])

    def step() -> float:
        for i, row in enumerate(rows):
            with torch.autocast(device, torch.bfloat16):
                logprobs = forward(row)
            advantage = (-1.0) ** i
            ratio = torch.exp(logprobs + 12)
            losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28))
            (losses.sum() / total).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()  # waits for the device

    def score() -> None:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            for row in rows:
                forward(row)
        if device == "cuda":
            torch.cuda.synchronize()

    compile_seconds, seconds, norm = timed(step, setting.steps)
    _, score_seconds, _ = timed(score, setting.steps)
    lengths = np.array([len(x) for x in ids])
    return {
        "tokens": int(lengths.sum()), "seconds": seconds, "score_seconds": score_seconds,
        "compile_seconds": compile_seconds, "flops": flops(setting, lengths), "grad_norm": norm,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0, "torch": torch.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    main()
