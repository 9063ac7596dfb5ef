"""Seconds from parameters in JAX to weights that servers can load: `python -m benchmarks.publish`.

First the file alone, of DeepSeek-R1-Distill-Qwen-1.5B's shapes with random values, in memory that is new (the first
two) and used again (all later ones); beside it what a plain save takes: cast all, fetch all, safetensors' own writer.
Then, with --server, a real vLLM server end to end: SmolLM2 on this CPU (make smollm2 vllm), and how far its
log-probs are from the trainer's, in float32 and in bfloat16.
"""

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.models import decoder, hf
from jaxrl.plan import KNOWN
from jaxrl.sampling import servers
from jaxrl.sampling.transports import files
from jaxrl.sampling.vllm import VLLMSampler
from jaxrl.types import Prompt, SamplingParams

RESULTS = Path(__file__).parent / "results" / "publish.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="/dev/shm", help="where files go")
    parser.add_argument("--layers", type=int, default=28, help="fewer for a quick look")
    parser.add_argument("--repeats", type=int, default=7, help="publications; the first two find new memory")
    parser.add_argument("--server", action="store_true", help="also a real vLLM server with SmolLM2")
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="of the server")
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxrl-publish-", dir=options.folder))
    results: dict = {"setting": {"platform": platform.processor(), "python": platform.python_version()}}
    try:
        results["file"] = file(options, folder)
        if options.server:
            results["server"] = {dtype: server(options, folder, dtype) for dtype in ("float32", "bfloat16")}
    finally:
        shutil.rmtree(folder)
    results["setting"] |= {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": len(jax.devices()),
    }
    if options.layers == 28:
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        print(f"written to {RESULTS}")


def file(options: argparse.Namespace, folder: Path) -> dict:
    config = dataclasses.replace(KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"], layers=options.layers)
    params = jax.block_until_ready(jax.jit(lambda: decoder.initialize(config, 0))())
    seconds: dict[str, list[float]] = {"plain save": [], "jaxrl": []}
    for _ in range(2):
        began = time.perf_counter()
        plain(params, folder)
        seconds["plain save"].append(time.perf_counter() - began)
    (folder / "plain.safetensors").unlink()  # memory for the next ones
    for version in range(options.repeats):
        began = time.perf_counter()
        published = files.write(params, config, folder / "ours", version)
        seconds["jaxrl"].append(time.perf_counter() - began)
    size = published.path.stat().st_size
    steady = statistics.median(seconds["jaxrl"][2:])
    print(f"{size / 1e9:.2f} GB of {options.layers} layers in bfloat16, to {options.folder}")
    for name, s in seconds.items():
        print(f"{name:<12}{'  '.join(f'{x:.2f}' for x in s)}  seconds")
    print(f"steady: {steady:.2f} s, {size / steady / 1e9:.2f} GB/s")
    return {"bytes": size, "seconds": seconds, "steady_seconds": steady, "bytes_per_second": size / steady}


def plain(params: decoder.Params, folder: Path) -> None:
    from safetensors.numpy import save_file

    arrays = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), params)
    save_file({str(i): a for i, a in enumerate(jax.tree.leaves(arrays))}, folder / "plain.safetensors")


def server(options: argparse.Namespace, folder: Path, dtype: str) -> dict:
    model = hf.load(options.model)
    place = servers.choose_devices(1, trains=True)
    with servers.running(
        1, options.vllm, options.model, folder / "logs", where=place, dtype=dtype, max_tokens=256
    ) as (one,):
        sampler = VLLMSampler([one.url], files.Files(model.config, folder / dtype, dtype))
        seconds = []
        for version in range(options.repeats):
            began = time.perf_counter()
            sampler.publish(model.params, version)
            seconds.append(time.perf_counter() - began)
        rng = np.random.default_rng(0)
        prompts = [
            Prompt(str(i), rng.integers(model.config.vocab_size, size=32).astype(np.int32), "")
            for i in range(8)
        ]
        groups = sampler.generate(prompts, 2, SamplingParams(max_tokens=64), (0,))
        sampler.close()
    difference = np.concatenate([apart(model, rollout) for group in groups for rollout in group])
    steady = statistics.median(seconds[2:])
    print(
        f"vLLM, {Path(options.model).name}, {dtype}: published in {steady:.2f} s; log-probs apart from the "
        f"trainer's in float32 by {difference.mean():.1e} on average, {difference.max():.1e} at most"
    )
    return {
        "seconds": seconds, "steady_seconds": steady,
        "logprob_diff_mean": float(difference.mean()), "logprob_diff_max": float(difference.max()),
    }  # fmt: skip


def apart(model: hf.Model, rollout: files.Any) -> np.ndarray:
    ids = np.append(rollout.prompt.tokens, rollout.tokens)
    logprobs = jax.nn.log_softmax(model.logits(model.params, ids[None])[0])
    at = np.arange(len(rollout.prompt.tokens) - 1, len(ids) - 1)
    return np.abs(np.asarray(logprobs)[at, rollout.tokens] - rollout.logprobs)


if __name__ == "__main__":
    sys.exit(main())
