"""What packing wastes: `python -m benchmarks.packing`.

512 sequences, one mini-batch of JustRL, over 16 devices; answers as R1-Distill-Qwen-1.5B writes them (log-normal, mean
5,000, standard deviation 0.8 of it, cut at 15,360). FLOPs are of that model's forward pass: those that the streams
and attention buckets make the devices execute, over those that the tokens need. Beside it: one sequence a row, rows
padded to the longest of their micro-batch.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from benchmarks.harness import RESULTS, answer_lengths
from jaxrl import config
from jaxrl.grpo import packing
from jaxrl.models.decoder import forward_flops
from jaxrl.plan import KNOWN
from jaxrl.programs import layout_of
from jaxrl.types import Prompt, Rollout

MODEL = next(iter(KNOWN.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    rows = []
    print(
        f"{'devices':>8}{'executed / needed':>20}{'worst':>8}{'spread':>9}{'padded rows':>13}{'ms':>7}{'shapes':>8}"
    )
    for devices in options.devices:
        results = [measure(options.sequences, devices, seed) for seed in range(options.seeds)]
        column = {name: np.array([r[name] for r in results]) for name in results[0]}
        row = {
            "devices": devices, "executed": float(column["executed"].mean()),
            "executed_worst": float(column["executed"].max()), "spread": float(column["spread"].max()),
            "padded_rows": float(column["padded"].mean()), "milliseconds": float(np.median(column["seconds"]) * 1e3),
            "shapes": len({r["shape"] for r in results}),
        }  # fmt: skip
        print(
            f"{devices:>8}{row['executed']:>20.3f}{row['executed_worst']:>8.3f}{row['spread']:>9.2%}"
            f"{row['padded_rows']:>13.3f}{row['milliseconds']:>7.0f}{row['shapes']:>8}"
        )
        rows.append(row)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "packing.json").write_text(json.dumps(vars(options) | {"rows": rows}, indent=2) + "\n")


def measure(sequences: int, devices: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    answers = answer_lengths(rng, sequences)
    prompts = rng.integers(60, 240, sequences)
    rollouts = [
        Rollout(
            Prompt("", np.zeros(p, np.int32), ""), np.zeros(n, np.int32), np.zeros(n, np.float32), "stop", 0
        )
        for p, n in zip(prompts, answers, strict=True)
    ]
    recipe, lengths = config.Recipe(), prompts + answers
    layout = layout_of(recipe, MODEL)
    dense, attended = forward_flops(MODEL)
    began = time.perf_counter()
    batch = packing.pack(rollouts, np.ones(sequences, np.float32), devices, layout)
    seconds = time.perf_counter() - began
    squares = np.array([*np.square(layout.buckets, dtype=float), 0.0])  # the last: bucket -1, no segment
    attention = attended * squares[batch.buckets].sum(axis=(1, 2)) / 2
    executed = dense * batch.tokens.shape[2] * batch.micro_batches.astype(float) + attention
    needed = (dense * lengths + attended * lengths**2.0 / 2).sum()
    return {
        "executed": executed.sum() / needed,
        "spread": executed.max() / executed.min() - 1,
        "padded": padded_rows(lengths, devices, recipe.packing.stream_tokens, dense, attended) / needed,
        "seconds": seconds,
        "shape": batch.tokens.shape,
    }


def padded_rows(lengths: np.ndarray, devices: int, tokens: int, dense: float, attended: float) -> float:
    """FLOPs of one sequence a row: sorted by length, as many rows a micro-batch as `tokens` hold."""
    total, waiting = 0.0, list(np.sort(lengths)[::-1])
    while waiting:
        longest = waiting[0]
        rows = devices * max(1, tokens // longest)
        del waiting[:rows]
        total += rows * (dense * longest + attended * longest**2.0 / 2)
    return total


if __name__ == "__main__":
    main()
