"""Tokens a second of the in-process sampler and of transformers.generate: `python -m benchmarks.sampler_local`.

Both sample the same prompts at temperature 1, one after the other in turns; every answer runs to its full length, so
neither gains from refilling slots. transformers gets the prompts as one left-padded batch, and each number of threads
that --threads names: on a machine that others use too, fewer can be faster by far. JAX uses every core it is given;
`taskset -c 0` compares the two on one. On a GPU both run there, and share its memory by
XLA_PYTHON_CLIENT_MEM_FRACTION=0.45; --random takes a model's shapes without its weights.
"""

import argparse
import functools
import json
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

from jaxrl.models import hf, initialize
from jaxrl.plan import model_config
from jaxrl.sampling.local import LocalSampler
from jaxrl.types import Prompt, SamplingParams

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="models/smollm2-135m-instruct", help="Hugging Face folder or Hub id"
    )
    parser.add_argument("--random", action="store_true", help="random weights, of a model that plan knows")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--sequences", type=int, default=64, help="decoded at once")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a sequence")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of the longest prompt")
    parser.add_argument("--repeats", type=int, default=3, help="of each, after one to warm up")
    parser.add_argument(
        "--samples", type=int, default=1, help="of each prompt; a prompt is prefilled once here"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, cores()], help="torch's, each in turn")
    options = parser.parse_args()

    folder = random_weights(options.model, options.dtype) if options.random else hf.resolve(options.model)
    rng = np.random.default_rng(0)
    shortest = max(1, options.prompt_tokens // 2)
    lengths = rng.integers(shortest, options.prompt_tokens + 1, options.sequences // options.samples)
    lengths[0] = options.prompt_tokens
    vocabulary = hf.read_config(folder).vocab_size
    prompts = [rng.integers(vocabulary, size=n).astype(np.int32) for n in lengths]
    contestants: dict[str, Callable[[], None]] = {
        "jaxrl": jaxrl_generate(folder, prompts, options.samples, options.tokens, options.dtype)
    }
    reference = transformers_generate(folder, prompts, options.samples, options.tokens, options.dtype)
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


def jaxrl_generate(
    folder: Path, prompts: list[np.ndarray], samples: int, tokens: int, dtype: str
) -> Callable[[], None]:
    model = hf.load(folder)
    sampler = LocalSampler(model.config, dtype=dtype, slots=len(prompts) * samples)
    sampler.publish(model.params, 0)
    rows = [Prompt(str(i), row, "") for i, row in enumerate(prompts)]

    def generate() -> None:
        groups = sampler.generate(rows, samples, SamplingParams(max_tokens=tokens), (0,))
        assert all(len(rollout.tokens) == tokens for group in groups for rollout in group)

    return generate


def transformers_generate(
    folder: Path, prompts: list[np.ndarray], samples: int, tokens: int, dtype: str
) -> Callable[[int], None]:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model = model.to(device)  # type: ignore[arg-type]
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
    results = {
        name: {"tokens_per_second": tokens / statistics.median(s), "seconds": s}
        for name, s in seconds.items()
    }
    ours, *theirs = (result["tokens_per_second"] for result in results.values())
    ratio = ours / max(theirs)
    print(f"{options.sequences} sequences of {options.tokens} new tokens, median of {options.repeats}")
    print(f"{'sampler':<28}{'tokens/s':>10}{'seconds':>10}{'from':>10}{'to':>10}")
    for name, s in seconds.items():
        rate = results[name]["tokens_per_second"]
        print(f"{name:<28}{rate:>10.1f}{statistics.median(s):>10.2f}{min(s):>10.2f}{max(s):>10.2f}")
    print(f"jaxrl / the faster transformers: {ratio:.2f}")
    setting = vars(options) | {
        "model": Path(options.model).name, "device": jax.devices()[0].device_kind, "cores": cores(),
        "python": platform.python_version(), "platform": sys.platform,
    }  # fmt: skip
    suffix = "" if setting["device"] == "cpu" else f"_{setting['device'].replace(' ', '_')}"
    (RESULTS / f"sampler_local{suffix}.json").write_text(
        json.dumps(setting | {"results": results, "ratio": ratio}, indent=2) + "\n"
    )


def cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
