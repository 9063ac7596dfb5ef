"""Work that packing wastes: `python -m benchmarks.packing`.

512 sequences, one mini-batch of JustRL, over 1 to 32 devices; answers as R1-Distill-Qwen-1.5B writes them (log-normal,
mean 5,000, standard deviation 0.8 of it, cut at 15,360). FLOPs are of that model's forward pass: those that devices
execute for the streams and attention buckets, over those that the tokens need. Beside it: one sequence a row, rows
padded to the longest of their micro-batch.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from benchmarks.harness import answer_lengths, write_results
from jaxrl import config
from jaxrl.grpo import packing
from jaxrl.models.decoder import forward_flops
from jaxrl.plan import KNOWN, sequence_flops
from jaxrl.programs import layout_of
from jaxrl.types import JsonObject, Prompt, Rollout

MODEL = next(iter(KNOWN.values()))
HEADERS = ("devices", "executed / needed", "worst", "spread", "padded rows", "ms", "shapes")
WIDTHS = (8, 20, 8, 9, 13, 7, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    rows = []
    print("".join(f"{header:>{width}}" for header, width in zip(HEADERS, WIDTHS, strict=True)))
    for devices in options.devices:
        results = [measure(options.sequences, devices, seed) for seed in range(options.seeds)]
        column = {name: np.array([r[name] for r in results]) for name in results[0]}
        row = {
            "devices": devices,
            "executed": float(column["executed"].mean()),
            "executed_worst": float(column["executed"].max()),
            "spread": float(column["spread"].max()),
            "padded_rows": float(column["padded"].mean()),
            "milliseconds": float(np.median(column["seconds"]) * 1e3),
            "shapes": len({r["shape"] for r in results}),
        }
        print(
            f"{devices:>8}{row['executed']:>20.3f}{row['executed_worst']:>8.3f}{row['spread']:>9.2%}"
            f"{row['padded_rows']:>13.3f}{row['milliseconds']:>7.0f}{row['shapes']:>8}"
        )
        rows.append(row)
    write_results("packing", vars(options) | {"rows": rows})


def measure(sequences: int, devices: int, seed: int) -> JsonObject:
    """One packing of random lengths; FLOPs relative to those needed."""
    rng = np.random.default_rng(seed)
    answers = answer_lengths(rng, sequences)
    prompts = rng.integers(60, 240, sequences)
    rollouts = [blank_rollout(p, n) for p, n in zip(prompts, answers, strict=True)]
    recipe, lengths = config.Recipe(), prompts + answers
    layout = layout_of(recipe, MODEL)
    dense, attended = forward_flops(MODEL)
    began = time.perf_counter()
    batch = packing.pack(rollouts, np.ones(sequences), devices, layout, learning_rate=0.0)
    seconds = time.perf_counter() - began
    squares = np.array([*np.square(layout.buckets, dtype=float), 0.0])  # the last: bucket -1, no segment
    attention = attended * squares[batch.buckets].sum(axis=(1, 2)) / 2
    executed = dense * batch.tokens.shape[2] * batch.micro_batches.astype(float) + attention
    needed = sequence_flops(MODEL, lengths)
    return {
        "executed": executed.sum() / needed,
        "spread": executed.max() / executed.min() - 1,
        "padded": padded_rows(lengths, devices, recipe.packing.stream_tokens) / needed,
        "seconds": seconds,
        "shape": batch.tokens.shape,
    }


def blank_rollout(prompt: int, answer: int) -> Rollout:
    """A rollout of these lengths."""
    logprobs = np.zeros(answer, np.float32)
    return Rollout(
        Prompt("", np.zeros(prompt, np.int32), ""), np.zeros(answer, np.int32), logprobs, "stop", 0
    )


def padded_rows(lengths: np.ndarray, devices: int, tokens: int) -> float:
    """FLOPs of one sequence a row: sorted by length, as many rows a micro-batch as `tokens` hold."""
    total, waiting = 0.0, list(np.sort(lengths)[::-1])
    while waiting:
        longest = waiting[0]
        rows = devices * max(1, tokens // longest)
        del waiting[:rows]
        total += rows * sequence_flops(MODEL, np.array([longest]))
    return total


if __name__ == "__main__":
    main()
