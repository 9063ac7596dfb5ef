"""One GRPO step on the CPU: jaxrl, PyTorch + transformers, Tunix: `python -m benchmarks.update_cpu`.

The same parameters, sequences, old log-probs and advantages, float32, AdamW, clip 0.2 / 0.28, token mean, gradients
clipped to norm 1, entropy of every completion token computed by all. Each contestant runs in a process of its own
and takes its steps in turn with the others. "full": 16 sequences of 512 tokens. "ragged": 16 with lengths spread like
R1-Distill's answers, about 170 tokens on average and 512 at most, padded for those that cannot pack. Before the race
all have to agree on loss, gradient norm and entropy.

Tunix needs an environment of its own: `python -m benchmarks.update_cpu --setup` makes it. Without it, two race.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import venv
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.harness import HERE, Contestant, Stopped, answer_lengths, write_batch, write_results
from jaxrl.models import Config, Model, initialize, save
from jaxrl.types import JsonObject

TUNIX, REQUIREMENT = HERE / ".envs" / "tunix", "google-tunix==0.1.7"
MODEL = Config(
    family="qwen2",
    vocab_size=4096,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp_width=704,
    rope_theta=10_000.0,
    norm_epsilon=1e-6,
    tied=False,
    max_positions=2048,
)
SEQUENCES, LONGEST, PROMPT = 16, 512, 24
# PyTorch's micro-batch is the whole batch; at this size it is faster with whole logits
SETTINGS: dict[str, JsonObject] = {
    "jaxrl": {
        "stream": 2048,
        "bucket": 64,
        "chunk": 256,
        "backend": "xla",
        "remat": "none",
        "dtype": "float32",
    },
    "torch": {"stream": SEQUENCES * LONGEST, "chunk": 0, "remat": "none", "dtype": "float32"},
    "tunix": {},
}
AGREEMENT = 2e-4  # relative, of losses and gradient norms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setup", action="store_true", help="make Tunix's environment first")
    parser.add_argument("--steps", type=int, default=7, help="of each contestant, timed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each")
    options = parser.parse_args()
    if options.setup:
        venv.create(TUNIX, with_pip=True)
        subprocess.run([TUNIX / "bin/python", "-m", "pip", "install", "-q", REQUIREMENT], check=True)
    setting = {
        "model": vars(MODEL),
        "sequences": SEQUENCES,
        "longest": LONGEST,
        "prompt": PROMPT,
        "settings": SETTINGS,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    races = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(Model(MODEL, initialize(MODEL, 0)), folder / "model")
        for name in ("full", "ragged"):
            lengths = lengths_of(name)
            write_batch(folder, MODEL.vocab_size, lengths, LONGEST, PROMPT)
            races[name] = race(folder, int(lengths.sum()), options.steps, options.threads)
            report(name, races[name])
            write_results("update_cpu", setting | {"races": races})


def lengths_of(name: str) -> np.ndarray:
    """Tokens of each sequence, prompt included."""
    if name == "full":
        return np.full(SEQUENCES, LONGEST)
    answers = answer_lengths(np.random.default_rng(0), SEQUENCES, LONGEST - PROMPT)
    return PROMPT + np.append(answers[1:], LONGEST - PROMPT)


def race(folder: Path, tokens: int, steps: int, threads: int) -> dict[str, JsonObject]:
    """Times `steps` updates of each contestant on folder/batch.npz, which has `tokens` without padding.

    Raises:
      Stopped: if one ends, or takes another step than the others.
    """
    pythons: dict[str, Path | str] = {"jaxrl": sys.executable, "torch": sys.executable}
    if (TUNIX / "bin/python").exists():
        pythons["tunix"] = TUNIX / "bin/python"
    environment = {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    pinned = ("taskset", "-c", f"0-{threads - 1}")
    seconds: dict[str, list[float]] = {name: [] for name in pythons}
    with ExitStack() as stack:
        contestants = {}
        for name, python in pythons.items():
            settings = SETTINGS[name] | {"threads": threads}
            started = Contestant(f"{name}_update", python, folder, settings, environment, pinned)
            contestants[name] = stack.enter_context(started)
        first = {name: contestant.ask()[1] for name, contestant in contestants.items()}
        require_agreement(first)
        for step in range(steps + 1):
            for name, contestant in contestants.items():
                elapsed, _ = contestant.ask()
                if step:  # Tunix compiles its second step again
                    seconds[name].append(elapsed)
    return {
        name: found
        | {
            "tokens": tokens,
            "tokens_per_second": tokens / statistics.median(seconds[name]),
            "seconds": seconds[name],
        }
        for name, found in first.items()
    }


def require_agreement(first: dict[str, JsonObject]) -> None:
    """Raises: Stopped if a contestant's first step is not jaxrl's."""
    for quantity in ("loss", "grad_norm", "entropy"):
        for name, found in first.items():
            expected = first["jaxrl"][quantity]
            if abs(found[quantity] - expected) > AGREEMENT * abs(expected):
                raise Stopped(f"{name} has {quantity} {found[quantity]}, jaxrl {expected}: not the same step")


def report(name: str, results: dict[str, JsonObject]) -> None:
    tokens = results["jaxrl"]["tokens"]
    print(f"\n{name}: {tokens} tokens; jaxrl's rate over the others', by medians and by bests")
    print(f"{'':<8}{'tokens/s':>10}{'median s':>10}{'best s':>8}{'ratio':>8}{'best':>7}", end="")
    print(f"{'loss':>12}{'grad norm':>12}")
    ours = results["jaxrl"]["seconds"]
    for who, r in results.items():
        s = r["seconds"]
        median, best = statistics.median(s), min(s)
        print(
            f"{who:<8}{r['tokens_per_second']:>10.0f}{median:>10.3f}{best:>8.3f}"
            f"{median / statistics.median(ours):>7.2f}x{best / min(ours):>6.2f}x{r['loss']:>12.6f}"
            f"{r['grad_norm']:>12.6f}"
        )


if __name__ == "__main__":
    main()
