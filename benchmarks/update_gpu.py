"""The update at full size on one GPU, beside PyTorch's: `python -m benchmarks.update_gpu`.

DeepSeek-R1-Distill-Qwen-1.5B's shapes with random parameters, float32 state, bfloat16 compute, AdamW, answers as long
as that model writes them; the same parameters and tokens for all. Each configuration (stream, attention backend, remat)
has a process of its own, and the memory of the device to itself. A failure is a result too, "out of memory" above all.
PyTorch runs transformers' model with SDPA, autocast and gradient checkpointing, its logits whole or by chunks.

MFU counts the FLOPs that the tokens need: three forward passes (the matrices of the layers and the LM head, causal
attention over true lengths), nothing for recomputation, padding or the embedding's lookup; over the data sheet's peak.
The floor is the time of those FLOPs at the rate of the MLP's matrix product, measured, and of reading and writing the
state once (parameters, two moments and gradients in float32) at the rate of a copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np

from benchmarks.harness import Contestant, Stopped, answer_lengths, write_batch, write_results
from benchmarks.update_cpu import MODEL as TINY
from jaxrl.hardware import HARDWARE
from jaxrl.models.decoder import Config
from jaxrl.plan import KNOWN, parameters, sequence_flops
from jaxrl.types import Backend, JsonObject, Remat

STATE_ACCESSES = 7  # read: parameters, two moments, gradients; written: the first three


@dataclasses.dataclass(frozen=True)
class Case:
    """One size of the benchmark."""

    model: Config
    prompt: int  # tokens
    longest: int  # tokens
    square: int  # width of the matrices whose product is timed
    dtype: str
    environment: dict[str, str]


FULL = Case(
    model=KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"],
    prompt=150,
    longest=16_384,
    square=8192,
    dtype="bfloat16",
    environment={
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    },
)
SMALL = Case(TINY, 8, 256, 256, "float32", {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=131_072, help="of an update, at most")
    add("--streams", type=int, nargs="+", default=[32_768, 16_384], help="tokens in a stream")
    add("--backends", nargs="+", default=["cudnn"], choices=get_args(Backend))
    add(
        "--remat",
        nargs="+",
        default=["products", "attention", "projections", "full"],
        choices=get_args(Remat),
    )
    add("--bucket", type=int, default=512, help="attention lengths are multiples of it")
    add("--chunk", type=int, default=1024, help="tokens whose logits exist at one time")
    add("--steps", type=int, default=2, help="timed, after one that compiles")
    add("--profile", type=Path, help="trace an update of the best configuration there, for XProf")
    add("--minutes", type=float, default=8, help="for all; configurations that are left then do not run")
    add("--torch", default=sys.executable, help="a Python that has torch and transformers")
    add("--tiny", action="store_true", help="a small model on the CPU, to see that all of it runs")
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.streams, options.backends = 1024, [512], ["xla", "cudnn"]
        options.bucket, options.chunk = 64, 128
    return options


def main() -> None:
    options = parse()
    case = SMALL if options.tiny else FULL
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = sequence_lengths(options.tokens, case)
        write_batch(folder, case.model.vocab_size, lengths, case.longest, case.prompt)
        record = measure_device(options, case, folder, lengths)
        show_device(record)
        rows: list[JsonObject] = []
        for configuration in configurations(options):
            try:
                with start(configuration, options, case, folder) as contestant:
                    found = measure(contestant, options.steps, deadline)
                peak = record["peak_flops"] or record["matmul_flops"]
                found |= rates(sequence_flops(case.model, lengths), lengths.sum(), found, peak)
            except Stopped as stopped:
                found = {"failed": str(stopped)}
            rows.append(configuration | found)
            show(rows[-1])
            if not options.tiny:
                write_results(f"update_gpu_{record['device'].replace(' ', '_')}", record | {"rows": rows})
        show_ratio(rows)
        if options.profile and (best := fastest(rows, "jaxrl_update")):
            with start(best | {"profile": str(options.profile)}, options, case, folder) as contestant:
                contestant.ask()
                contestant.ask("profile")
            print(f"traced in {options.profile}")


def start(configuration: JsonObject, options: argparse.Namespace, case: Case, folder: Path) -> Contestant:
    """Starts the configuration's program."""
    program = configuration["program"]
    python = options.torch if program == "torch_update" else sys.executable
    given = {"model": vars(case.model), "dtype": case.dtype, "threads": 1}
    given |= {"bucket": options.bucket, "square": case.square}
    return Contestant(program, python, folder, given | configuration, case.environment)


def measure_device(options: argparse.Namespace, case: Case, folder: Path, lengths: np.ndarray) -> JsonObject:
    """Measures the device's best rates; returns them with the setting of the benchmark."""
    with start({"program": "device", "stream": max(options.streams)}, options, case, folder) as contestant:
        device = contestant.ask()[1]
    peak = next((hardware.flops for name, hardware in HARDWARE.items() if name in device["device"]), None)
    record = vars(options) | {"lengths": lengths.tolist(), "peak_flops": peak} | device
    record |= {"model": vars(case.model), "environment": case.environment}
    return record | {"floor_seconds": floor_seconds(lengths, case.model, device)}


def floor_seconds(lengths: np.ndarray, model: Config, device: JsonObject) -> float:
    """The least seconds of an update; see the module."""
    forward, state = sequence_flops(model, lengths), STATE_ACCESSES * 4 * parameters(model)
    return float(3 * forward / device["mlp_flops"] + state / device["copy_bytes"])


def sequence_lengths(tokens: int, case: Case) -> np.ndarray:
    """Lengths of as many sequences as `tokens` hold, a prompt and an answer each."""
    answers = answer_lengths(np.random.default_rng(0), tokens // case.prompt, case.longest * 15 // 16)
    lengths = case.prompt + answers
    return lengths[np.cumsum(lengths) <= tokens]


def configurations(options: argparse.Namespace) -> list[JsonObject]:
    """Configurations, the likely best first, as time may run out; PyTorch's early, to have a ratio."""

    def configuration(program: str, stream: int, backend: str, remat: str, chunk: int) -> JsonObject:
        return {"program": program, "stream": stream, "backend": backend, "remat": remat, "chunk": chunk}

    chunk = options.chunk
    ours = [
        configuration("jaxrl_update", stream, backend, remat, chunk)
        for remat, backend, stream in itertools.product(options.remat, options.backends, options.streams)
    ]
    # rows padded to one length, or one at a time; logits by chunks, or whole
    ways = ((min(options.streams), chunk), (1, chunk), (1, 0))
    theirs = [configuration("torch_update", stream, "sdpa", "full", chunk) for stream, chunk in ways]
    return [ours[0], *theirs, *ours[1:]]


def measure(contestant: Contestant, steps: int, deadline: float) -> JsonObject:
    """Times updates and log-prob passes.

    Raises:
      Stopped: if the contestant ends, or at the deadline.
    """

    def ask(request: str) -> tuple[float, JsonObject]:
        return contestant.ask(request, deadline - time.monotonic())

    first, found = ask("update")
    seconds = [ask("update")[0] for _ in range(steps)]
    found["peak_bytes"] = ask("update")[1].get("peak_bytes", 0)
    ask("logprobs")
    passes = [ask("logprobs")[0] for _ in range(steps)]
    return found | {
        "first_seconds": first,  # from the start of the process: loading, compilation and one update
        "seconds": statistics.median(seconds),
        "logprobs_seconds": statistics.median(passes),
    }


def rates(forward: float, tokens: int, found: JsonObject, peak: float) -> dict[str, float]:
    """Tokens a second, and the share of `peak` FLOP/s used; `forward` FLOPs are those of one forward pass."""
    return {
        "tokens_per_second": float(tokens / found["seconds"]),
        "mfu": 3 * forward / found["seconds"] / peak,
        "logprobs_mfu": forward / found["logprobs_seconds"] / peak,
    }


def show_device(record: JsonObject) -> None:
    print(f"{record['device']}, jax {record['jax']}: {len(record['lengths'])} sequences, ", end="")
    print(f"{sum(record['lengths']):,} tokens an update")
    for name in ("matmul_flops", "mlp_flops"):
        print(f"{name.replace('_', ' ')}: {record[name] / 1e12:.1f} TFLOP/s measured", end="; ")
    print(f"copy: {record['copy_bytes'] / 1e9:.0f} GB/s; an update's floor: {record['floor_seconds']:.3f} s")
    print(f"MFU is over {'the data sheet' if record['peak_flops'] else 'the measured matrix product'}\n")
    print(
        f"{'':<14}{'stream':>8}{'attention':>14}{'remat':>11}{'chunk':>7}{'tokens/s':>10}{'MFU':>7}", end=""
    )
    print(f"{'seconds':>9}{'logp s':>9}{'peak GB':>9}{'first s':>9}{'loss':>10}{'grad norm':>11}")


def show(row: JsonObject) -> None:
    head = f"{row['program']:<14}{row['stream']:>8}{row['backend']:>14}{row['remat']:>11}{row['chunk']:>7}"
    if "failed" in row:
        print(f"{head}  {row['failed'].splitlines()[-1]}", flush=True)
        return
    print(f"{head}{row['tokens_per_second']:>10.0f}{row['mfu']:>7.1%}{row['seconds']:>9.3f}", end="")
    print(
        f"{row['logprobs_seconds']:>9.3f}{row['peak_bytes'] / 1e9:>9.1f}{row['first_seconds']:>9.1f}", end=""
    )
    print(f"{row['loss']:>10.5f}{row['grad_norm']:>11.5f}", flush=True)


def fastest(rows: list[JsonObject], program: str) -> JsonObject | None:
    done = [row for row in rows if row["program"] == program and "failed" not in row]
    return max(done, key=lambda row: row["tokens_per_second"], default=None)


def show_ratio(rows: list[JsonObject]) -> None:
    ours, theirs = (fastest(rows, program) for program in ("jaxrl_update", "torch_update"))
    if ours and theirs:
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        print(f"\njaxrl's best / PyTorch's best: {ratio:.2f}")


if __name__ == "__main__":
    main()
