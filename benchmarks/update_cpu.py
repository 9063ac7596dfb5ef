"""One GRPO step on the CPU: jaxrl, PyTorch + transformers, Tunix: `python -m benchmarks.update_cpu`.

The same weights, sequences, old log-probs and advantages, float32, AdamW, clip 0.2 / 0.28, token mean, gradients
clipped to norm 1, entropy of every completion token computed by all. Each contestant lives in a process of its own
and takes its steps in turn with the others. "full": 16 sequences of 512 tokens. "ragged": 16 of 170 on average and
512 at most, padded by those who cannot pack. Before the race all have to agree on loss and gradient norm.

Tunix needs an environment of its own: `python -m benchmarks.update_cpu --setup` makes it. Without it, two race.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import jax
import numpy as np

from jaxrl.models import Config, Model, decoder, initialise, save

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "update_cpu.json"
TUNIX = HERE / ".envs" / "tunix"
MODEL = Config(
    "qwen2", vocab_size=4096, width=256, layers=4, heads=4, kv_heads=2, head_dim=64, mlp_width=704,
    rope_theta=10_000.0, norm_epsilon=1e-6, tied=False, max_positions=2048,
)  # fmt: skip
SEQUENCES, LONGEST, PROMPT = 16, 512, 64
AGREEMENT = 2e-4  # relative, of losses and gradient norms


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setup", action="store_true", help="make Tunix's environment first")
    parser.add_argument("--steps", type=int, default=7, help="of each contestant, timed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each")
    options = parser.parse_args()
    if options.setup:
        venv.create(TUNIX, with_pip=True)
        subprocess.run(
            [TUNIX / "bin/python", "-m", "pip", "install", "-q", "google-tunix==0.1.7"], check=True
        )
    setting = {
        "model": vars(MODEL), "sequences": SEQUENCES, "longest": LONGEST, "prompt": PROMPT,
        "threads": options.threads, "cores": os.cpu_count(), "python": platform.python_version(),
    }  # fmt: skip
    races = {}
    with tempfile.TemporaryDirectory() as folder:
        save(Model(MODEL, initialise(MODEL, 0)), Path(folder) / "model")
        for name in ("full", "ragged"):
            tokens = write_batch(Path(folder), ragged=name == "ragged")
            races[name] = race(Path(folder), tokens, options.steps, options.threads)
            report(name, races[name])
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(setting | {"races": races}, indent=2) + "\n")


def write_batch(folder: Path, ragged: bool) -> int:
    """batch.npz: tokens [B, T] padded on the right, lengths, old_logprobs [B, T] of completions, advantages [B]."""
    rng = np.random.default_rng(1)
    lengths = np.full(SEQUENCES, LONGEST)
    if ragged:
        lengths = np.clip(rng.lognormal(np.log(130), 0.75, SEQUENCES).astype(int), PROMPT + 8, LONGEST)
        lengths = np.append(
            np.rint(lengths[1:] * (170 * SEQUENCES - LONGEST) / lengths[1:].sum()), LONGEST
        ).astype(int)
        lengths = np.maximum(lengths, PROMPT + 4)
    tokens = rng.integers(2, MODEL.vocab_size, (SEQUENCES, LONGEST)).astype(np.int32)
    tokens *= np.arange(LONGEST) < lengths[:, None]
    params = initialise(MODEL, 0)
    old = np.zeros((SEQUENCES, LONGEST), np.float32)
    for row, ids in enumerate(tokens):
        logprobs = jax.nn.log_softmax(decoder.logits(MODEL, params, ids[None])[0])
        old[row, 1:] = logprobs[np.arange(LONGEST - 1), ids[1:]]
    old += rng.normal(0, 0.3, old.shape)  # ratios beyond both clips
    completion = (np.arange(LONGEST) >= PROMPT) & (np.arange(LONGEST) < lengths[:, None])
    np.savez(
        folder / "batch.npz", tokens=tokens, lengths=lengths, prompt=PROMPT,
        old_logprobs=np.float32(old * completion), advantages=np.float32(rng.choice([-1.2, -0.4, 0.6, 1.5], SEQUENCES)),
    )  # fmt: skip
    return int(lengths.sum())


class Contestant:
    """A process that takes a step for each line it is sent, and answers each with a JSON object."""

    def __init__(self, name: str, python: Path | str, folder: Path, threads: int):
        self.name, self.log = name, folder / f"{name}.log"
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent),
            "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        }  # fmt: skip
        command = [python, HERE / "contestants" / f"{name}_update.py", folder]
        self.process = subprocess.Popen(
            ["taskset", "-c", f"0-{threads - 1}", *map(str, command)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True, env=environment,
        )  # fmt: skip

    def step(self) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(f"{self.name} stopped:\n{self.log.read_text()[-2000:]}") from None


def race(folder: Path, tokens: int, steps: int, threads: int) -> dict[str, dict]:
    """Tokens are those of the sequences; padding is nobody's work."""
    pythons: dict[str, Path | str] = {"jaxrl": sys.executable, "torch": sys.executable}
    if (TUNIX / "bin/python").exists():
        pythons["tunix"] = TUNIX / "bin/python"
    contestants = [Contestant(name, python, folder, threads) for name, python in pythons.items()]
    first = {c.name: c.step() for c in contestants}
    for quantity in ("loss", "grad_norm"):
        for name, found in first.items():
            expected = first["jaxrl"][quantity]
            if abs(found[quantity] - expected) > AGREEMENT * abs(expected):
                raise SystemExit(
                    f"{name} has {quantity} {found[quantity]}, jaxrl {expected}: not the same step"
                )
    seconds: dict[str, list[float]] = {name: [] for name in pythons}
    for _ in range(steps):
        for contestant in contestants:
            began = time.perf_counter()
            contestant.step()
            seconds[contestant.name].append(time.perf_counter() - began)
    for contestant in contestants:
        contestant.process.kill()
    return {
        name: first[name]
        | {"tokens": tokens, "tokens_per_second": tokens / statistics.median(s), "seconds": s}
        for name, s in seconds.items()
    }


def report(name: str, results: dict[str, dict]) -> None:
    print(f"\n{name}: {results['jaxrl']['tokens']} tokens")
    print(
        f"{'':<8}{'tokens/s':>10}{'seconds':>10}{'from':>8}{'to':>8}{'jaxrl is':>11}{'loss':>12}{'grad norm':>12}"
    )
    ours = results["jaxrl"]["tokens_per_second"]
    for who, r in results.items():
        s, ratio = r["seconds"], ours / r["tokens_per_second"]
        print(
            f"{who:<8}{r['tokens_per_second']:>10.0f}{statistics.median(s):>10.3f}{min(s):>8.3f}{max(s):>8.3f}"
            f"{ratio:>10.2f}x{r['loss']:>12.6f}{r['grad_norm']:>12.6f}"
        )


if __name__ == "__main__":
    main()
