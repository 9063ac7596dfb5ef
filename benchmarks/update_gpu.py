"""The update at full size on one GPU, beside PyTorch's: `python -m benchmarks.update_gpu`.

DeepSeek-R1-Distill-Qwen-1.5B's shapes with random weights, float32 state, bfloat16 compute, AdamW, answers as long as
that model writes them; the same weights and tokens for all. Each configuration (stream, attention backend, remat) has
a process of its own, and the memory of the device to itself. What fails is a result too, "out of memory" above all.
PyTorch runs transformers' model with SDPA, autocast and gradient checkpointing, its logits whole or by chunks.

MFU counts the FLOPs that the tokens need: three forward passes (the matrices of the layers and the LM head, causal
attention over true lengths), nothing for recomputation, padding or the embedding's lookup; over the data sheet's peak.
The floor is the time of those FLOPs at the rate of the MLP's matrix product, measured, and of reading and writing the
state once (parameters, two moments and gradients in float32) at the rate of a copy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.harness import RESULTS, Contestant, Stopped, answer_lengths, write_batch
from benchmarks.update_cpu import MODEL as TINY
from jaxrl.hardware import HARDWARE
from jaxrl.models.attention import Backend
from jaxrl.models.decoder import Config, Remat, forward_flops
from jaxrl.plan import KNOWN, parameters

MODEL = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
PROMPT, LONGEST = 150, 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=131_072, help="of an update, at most")
    parser.add_argument("--streams", type=int, nargs="+", default=[32_768, 16_384], help="tokens in a stream")
    parser.add_argument("--backends", nargs="+", default=[b for b in get_args(Backend) if b != "xla"])
    parser.add_argument("--remat", nargs="+", default=["attention", "full", "none"], choices=get_args(Remat))
    parser.add_argument("--bucket", type=int, default=512, help="attention lengths are multiples of it")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens whose logits exist at one time")
    parser.add_argument("--steps", type=int, default=2, help="timed, after one that compiles")
    parser.add_argument(
        "--profile", type=Path, help="trace an update of the best configuration there, for XProf"
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all; what is left then is not run")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has torch and transformers")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model on the CPU, to see that all of it runs"
    )
    options = parser.parse_args()
    environment = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    model, prompt, longest, square, dtype = MODEL, PROMPT, LONGEST, 8192, "bfloat16"
    if options.tiny:
        environment = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        model, prompt, longest, square, dtype = TINY, 8, 256, 256, "float32"
        options.tokens, options.streams, options.backends = 1024, [512], ["xla", "cudnn"]
        options.bucket, options.chunk = 64, 128
    common = {"model": vars(model), "dtype": dtype, "threads": 1, "bucket": options.bucket, "square": square}
    deadline = time.monotonic() + 60 * options.minutes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = sequences(options.tokens, longest, prompt)
        write_batch(folder, model.vocab_size, lengths, longest, prompt)
        with Contestant(
            "device", sys.executable, folder, common | {"stream": max(options.streams)}, environment
        ) as c:
            device = c.ask()[1]
        peak = next((hardware.flops for name, hardware in HARDWARE.items() if name in device["device"]), None)
        record = vars(options) | {"lengths": lengths.tolist(), "peak_flops": peak} | device
        record |= {"model": vars(model), "environment": environment}
        record["floor_seconds"] = floor_seconds(lengths, model, device)
        show_device(record)
        out = RESULTS / f"update_gpu_{device['device'].replace(' ', '_')}.json"
        out.parent.mkdir(exist_ok=True)
        rows: list[dict[str, Any]] = []
        for configuration in configurations(options):
            python = options.torch if configuration["program"] == "torch_update" else sys.executable
            try:
                settings = common | configuration
                with Contestant(
                    configuration["program"], python, folder, settings, environment
                ) as contestant:
                    found = measure(contestant, options.steps, deadline)
                found |= rates(lengths, forward_flops(model), found, peak or device["matmul_flops"])
            except Stopped as stopped:
                found = {"failed": str(stopped)}
            rows.append(configuration | found)
            show(rows[-1])
            if not options.tiny:
                out.write_text(json.dumps(record | {"rows": rows}, indent=2, default=str) + "\n")
        show_ratio(rows)
        if options.profile and (best := fastest(rows, "jaxrl_update")):
            settings = common | {name: best[name] for name in ("stream", "backend", "remat", "chunk")}
            with Contestant(
                "jaxrl_update",
                sys.executable,
                folder,
                settings | {"profile": str(options.profile)},
                environment,
            ) as contestant:
                contestant.ask()
                contestant.ask("profile")
            print(f"traced in {options.profile}")


def floor_seconds(lengths: np.ndarray, model: Config, device: dict[str, Any]) -> float:
    dense, attended = forward_flops(model)
    forward = dense * lengths.sum() + attended * (lengths.astype(float) ** 2).sum() / 2
    state = 7 * 4 * parameters(model)  # read: parameters, moments, gradients; written: the first three
    return float(3 * forward / device["mlp_flops"] + state / device["copy_bytes"])


def sequences(tokens: int, longest: int, prompt: int) -> np.ndarray:
    """Lengths of as many sequences as `tokens` hold, a prompt and an answer each."""
    answers = answer_lengths(np.random.default_rng(0), tokens // prompt, longest * 15 // 16)
    lengths = prompt + answers
    return lengths[np.cumsum(lengths) <= tokens]


def configurations(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The likely best first, as time may run out; PyTorch's early, to have a ratio."""
    ours = [
        {
            "program": "jaxrl_update",
            "stream": stream,
            "backend": backend,
            "remat": remat,
            "chunk": options.chunk,
        }
        for remat, backend, stream in itertools.product(options.remat, options.backends, options.streams)
    ]
    # rows padded to one length, or one at a time; logits by chunks, or whole
    ways = ((min(options.streams), options.chunk), (1, options.chunk), (1, 0))
    theirs = [
        {"program": "torch_update", "stream": stream, "backend": "sdpa", "remat": "full", "chunk": chunk}
        for stream, chunk in ways
    ]
    return [ours[0], *theirs, *ours[1:]]


def measure(contestant: Contestant, steps: int, deadline: float) -> dict[str, Any]:
    ask = lambda what: contestant.ask(what, deadline - time.monotonic())  # noqa: E731
    first, found = ask("update")
    seconds = [ask("update")[0] for _ in range(steps)]
    found["peak_bytes"] = ask("update")[1].get("peak_bytes", 0)
    ask("score")
    scoring = [ask("score")[0] for _ in range(steps)]
    return found | {
        "first_seconds": first,  # from the start of the process: loading, compilation and one update
        "seconds": statistics.median(seconds),
        "score_seconds": statistics.median(scoring),
    }


def rates(
    lengths: np.ndarray, flops: tuple[int, int], found: dict[str, Any], peak: float
) -> dict[str, float]:
    dense, attended = flops
    forward = dense * lengths.sum() + attended * (lengths.astype(float) ** 2).sum() / 2
    return {
        "tokens_per_second": lengths.sum() / found["seconds"],
        "mfu": 3 * forward / found["seconds"] / peak,
        "score_mfu": forward / found["score_seconds"] / peak,
    }


def show_device(record: dict[str, Any]) -> None:
    print(f"{record['device']}, jax {record['jax']}: {len(record['lengths'])} sequences, ", end="")
    print(f"{sum(record['lengths']):,} tokens an update")
    for name in ("matmul_flops", "mlp_flops"):
        print(f"{name.replace('_', ' ')}: {record[name] / 1e12:.1f} TFLOP/s measured", end="; ")
    print(f"copy: {record['copy_bytes'] / 1e9:.0f} GB/s; an update's floor: {record['floor_seconds']:.3f} s")
    print(f"MFU is over {'the data sheet' if record['peak_flops'] else 'the measured matrix product'}\n")
    print(
        f"{'':<14}{'stream':>8}{'attention':>14}{'remat':>11}{'chunk':>7}{'tokens/s':>10}{'MFU':>7}{'seconds':>9}"
        f"{'score s':>9}{'peak GB':>9}{'first s':>9}{'loss':>10}{'grad norm':>11}"
    )


def show(row: dict[str, Any]) -> None:
    head = f"{row['program']:<14}{row['stream']:>8}{row['backend']:>14}{row['remat']:>11}{row['chunk']:>7}"
    if "failed" in row:
        print(f"{head}  {row['failed'].splitlines()[-1]}", flush=True)
        return
    print(
        f"{head}{row['tokens_per_second']:>10.0f}{row['mfu']:>7.1%}{row['seconds']:>9.3f}{row['score_seconds']:>9.3f}"
        f"{row['peak_bytes'] / 1e9:>9.1f}{row['first_seconds']:>9.1f}{row['loss']:>10.5f}{row['grad_norm']:>11.5f}",
        flush=True,
    )


def fastest(rows: list[dict[str, Any]], program: str) -> dict[str, Any] | None:
    done = [row for row in rows if row["program"] == program and "failed" not in row]
    return max(done, key=lambda row: row["tokens_per_second"], default=None)


def show_ratio(rows: list[dict[str, Any]]) -> None:
    ours, theirs = (fastest(rows, program) for program in ("jaxrl_update", "torch_update"))
    if ours and theirs:
        ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
        print(f"\njaxrl's best / PyTorch's best: {ratio:.2f}")


if __name__ == "__main__":
    main()
