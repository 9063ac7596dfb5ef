"""Seconds from parameters in JAX to weights that servers can load: `python -m benchmarks.publish`.

First the file alone, of DeepSeek-R1-Distill-Qwen-1.5B's shapes with random values, in new memory (the first two) and
in memory used again (all later ones); beside it a plain save: cast all, fetch all, safetensors' own writer. Then, with
--server, a real vLLM server end to end: SmolLM2 on this CPU (make smollm2 vllm), and how far its log-probs are from
the trainer's, in float32 and in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import write_results
from jaxrl.models import decoder, hf
from jaxrl.plan import KNOWN
from jaxrl.sampling import servers
from jaxrl.sampling.transports import files
from jaxrl.sampling.vllm import VLLMSampler
from jaxrl.types import Groups, JsonObject, Prompt, Rollout, SamplingParams

MODEL = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
NEW = 2  # files that find new memory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", default="/dev/shm", help="where files go")
    parser.add_argument("--layers", type=int, default=MODEL.layers, help="fewer for a quick look")
    parser.add_argument("--repeats", type=int, default=7, help="publications; the first two find new memory")
    parser.add_argument("--server", action="store_true", help="also a real vLLM server with SmolLM2")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="of the server")
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxrl-publish-", dir=options.folder))
    results: JsonObject = {"setting": {"platform": platform.processor(), "python": platform.python_version()}}
    try:
        results["file"] = measure_file(options, folder)
        if options.server:
            dtypes = ("float32", "bfloat16")
            results["server"] = {dtype: measure_server(options, folder, dtype) for dtype in dtypes}
    finally:
        shutil.rmtree(folder)
    devices = jax.devices()
    results["setting"] |= {
        "jax": jax.__version__,
        "device": devices[0].device_kind,
        "cores": len(devices),
    }
    if options.layers == MODEL.layers:
        print(f"written to {write_results('publish', results)}")


def measure_file(options: argparse.Namespace, folder: Path) -> JsonObject:
    config = dataclasses.replace(MODEL, layers=options.layers)
    params = jax.block_until_ready(jax.jit(lambda: decoder.initialize(config, 0))())
    seconds: dict[str, list[float]] = {"plain save": [], "jaxrl": []}
    for _ in range(NEW):
        began = time.perf_counter()
        save_plainly(params, folder)
        seconds["plain save"].append(time.perf_counter() - began)
    (folder / "plain.safetensors").unlink()  # memory for the next ones
    transport = files.Files(config, folder / "ours")
    for version in range(options.repeats):
        began = time.perf_counter()
        transport.prepare(params, version)
        seconds["jaxrl"].append(time.perf_counter() - began)
    size = max(path.stat().st_size for path in (folder / "ours").iterdir())
    steady = statistics.median(seconds["jaxrl"][NEW:])
    print(f"{size / 1e9:.2f} GB of {options.layers} layers in bfloat16, to {options.folder}")
    for name, s in seconds.items():
        print(f"{name:<12}{'  '.join(f'{x:.2f}' for x in s)}  seconds")
    print(f"steady: {steady:.2f} s, {size / steady / 1e9:.2f} GB/s")
    return {"bytes": size, "seconds": seconds, "steady_seconds": steady, "bytes_per_second": size / steady}


def save_plainly(params: decoder.Params, folder: Path) -> None:
    from safetensors.numpy import save_file

    arrays = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
    save_file({str(i): a for i, a in enumerate(jax.tree.leaves(arrays))}, folder / "plain.safetensors")


def measure_server(options: argparse.Namespace, folder: Path, dtype: str) -> JsonObject:
    model, devices = hf.load(options.model), servers.choose_devices(1, trains=True)
    settings = servers.Settings(options.vllm, options.model, dtype, max_tokens=256)
    with servers.running(1, settings, folder / "logs", devices=devices) as (one,):
        sampler = VLLMSampler([one.url], files.Files(model.config, folder / dtype, dtype))
        seconds = []
        for version in range(options.repeats):
            began = time.perf_counter()
            sampler.publish(model.params, version)
            seconds.append(time.perf_counter() - began)
        groups = sample(sampler, model.config.vocab_size)
        sampler.close()
    apart = np.concatenate([differences(model, rollout) for group in groups for rollout in group])
    steady, mean, most = statistics.median(seconds[NEW:]), float(apart.mean()), float(apart.max())
    print(
        f"vLLM, {Path(options.model).name}, {dtype}: published in {steady:.2f} s; log-probs apart from the "
        f"trainer's in float32 by {mean:.1e} on average, {most:.1e} at most"
    )
    return {
        "seconds": seconds,
        "steady_seconds": steady,
        "logprob_diff_mean": mean,
        "logprob_diff_max": most,
    }


def sample(sampler: VLLMSampler, vocabulary: int) -> Groups:
    rng = np.random.default_rng(0)
    ids = [rng.integers(vocabulary, size=32).astype(np.int32) for _ in range(8)]
    prompts = [Prompt(str(i), row, "") for i, row in enumerate(ids)]
    return sampler.generate(prompts, 2, SamplingParams(max_tokens=64), (0,))


def differences(model: hf.Model, rollout: Rollout) -> np.ndarray:
    """Of each token's log-prob, the sampler's and the trainer's in float32; [T]."""
    ids = np.append(rollout.prompt.tokens, rollout.tokens)
    logprobs = jax.nn.log_softmax(model.logits(model.params, ids[None])[0])
    at = np.arange(len(rollout.prompt.tokens) - 1, len(ids) - 1)
    return np.abs(np.asarray(logprobs)[at, rollout.tokens] - rollout.logprobs)


if __name__ == "__main__":
    main()
