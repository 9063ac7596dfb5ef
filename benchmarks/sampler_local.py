"""Tokens a second of the in-process sampler and of transformers.generate: `python -m benchmarks.sampler_local`.

Both sample the same prompts at temperature 1, in turn; every answer runs to its full length, so neither gains from
refilling slots. transformers gets the prompts as one left-padded batch, and runs with each number of threads of
--threads: on a machine that others use too, fewer can be faster by far. JAX uses every core it is given; `taskset -c 0`
compares the two on one. On a GPU both run there, and share its memory by XLA_PYTHON_CLIENT_MEM_FRACTION=0.45;
--random takes a model's shapes without its weights.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from benchmarks.harness import write_results
from jaxrl.models import hf, initialize
from jaxrl.plan import model_config
from jaxrl.sampling.local import LocalSampler
from jaxrl.types import Prompt, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="models/smollm2-135m-instruct", help="Hugging Face folder or Hub id")
    add("--random", action="store_true", help="random weights, of a model that plan knows")
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--sequences", type=int, default=64, help="decoded at once")
    add("--tokens", type=int, default=32, help="new tokens a sequence")
    add("--prompt-tokens", type=int, default=32, help="length of the longest prompt")
    add("--repeats", type=int, default=3, help="of each, after one to warm up")
    add("--samples", type=int, default=1, help="of each prompt; a prompt is prefilled once here")
    add("--threads", type=int, nargs="+", default=[1, cores()], help="torch's, each in turn")
    options = parser.parse_args()

    folder = random_weights(options.model, options.dtype) if options.random else hf.resolve(options.model)
    prompts = random_prompts(options, hf.read_config(folder).vocab_size)
    contestants = {"jaxrl": jaxrl_generate(folder, prompts, options)}
    reference = transformers_generate(folder, prompts, options)
    for threads in dict.fromkeys(options.threads):
        contestants[f"transformers, {threads} threads"] = functools.partial(reference, threads)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(options.repeats + 1):
        for name, generate in contestants.items():
            start = time.perf_counter()
            generate()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    report(options, seconds)


def random_weights(name: str, dtype: str) -> Path:
    config, folder = model_config(name), Path(tempfile.mkdtemp(prefix="jaxrl-sampler-"))
    hf.save(hf.Model(config, initialize(config, 0)), folder, dtype=dtype)
    return folder


def random_prompts(options: argparse.Namespace, vocabulary: int) -> list[np.ndarray]:
    """Token ids between half of the longest prompt and all of it; the first is the longest."""
    rng, longest = np.random.default_rng(0), options.prompt_tokens
    lengths = rng.integers(max(1, longest // 2), longest + 1, options.sequences // options.samples)
    lengths[0] = longest
    return [rng.integers(vocabulary, size=n).astype(np.int32) for n in lengths]


def jaxrl_generate(
    folder: Path, prompts: list[np.ndarray], options: argparse.Namespace
) -> Callable[[], None]:
    model, samples, tokens = hf.load(folder), options.samples, options.tokens
    sampler = LocalSampler(model.config, dtype=options.dtype, slots=len(prompts) * samples)
    sampler.publish(model.params, 0)
    rows = [Prompt(str(i), row, "") for i, row in enumerate(prompts)]

    def generate() -> None:
        groups = sampler.generate(rows, samples, SamplingParams(max_tokens=tokens), (0,))
        assert all(len(rollout.tokens) == tokens for group in groups for rollout in group)

    return generate


def transformers_generate(
    folder: Path, prompts: list[np.ndarray], options: argparse.Namespace
) -> Callable[[int], None]:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples, tokens, dtype = options.samples, options.tokens, getattr(torch, options.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, top_k=0, pad_token_id=0, max_new_tokens=tokens, num_return_sequences=samples
    )
    longest = max(map(len, prompts))
    rows = np.stack([np.pad(row, (longest - len(row), 0)) for row in prompts])
    mask = np.stack([np.arange(longest) >= longest - len(row) for row in prompts])
    inputs = {
        "input_ids": torch.tensor(rows, device=device).long(),
        "attention_mask": torch.tensor(mask, device=device).long(),
    }

    def generate(threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            out = model.generate(**inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        assert out.shape == (len(prompts) * samples, longest + tokens)

    return generate


def report(options: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    tokens = options.sequences * options.tokens
    rates = {name: tokens / statistics.median(s) for name, s in seconds.items()}
    ours, *theirs = rates.values()
    ratio = ours / max(theirs)
    print(f"{options.sequences} sequences of {options.tokens} new tokens, median of {options.repeats}")
    print(f"{'sampler':<28}{'tokens/s':>10}{'seconds':>10}{'from':>10}{'to':>10}")
    for name, s in seconds.items():
        print(f"{name:<28}{rates[name]:>10.1f}{statistics.median(s):>10.2f}{min(s):>10.2f}{max(s):>10.2f}")
    print(f"jaxrl / the faster transformers: {ratio:.2f}")
    device = jax.devices()[0].device_kind
    setting = vars(options) | {
        "model": Path(options.model).name,
        "device": device,
        "cores": cores(),
        "python": platform.python_version(),
        "platform": sys.platform,
    }
    results = {name: {"tokens_per_second": rates[name], "seconds": s} for name, s in seconds.items()}
    suffix = "" if device == "cpu" else f"_{device.replace(' ', '_')}"
    write_results(f"sampler_local{suffix}", setting | {"results": results, "ratio": ratio})


def cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
