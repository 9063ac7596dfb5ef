"""The update as a GPU's own compiler leaves it, without the GPU: `python -m benchmarks.update_aot`.

Update and scoring pass of JustRL's recipe for DeepSeek-R1-Distill-Qwen-1.5B are compiled for devices that are not here
(jaxrl.aot), and every kernel of the result is held against the data sheet (jaxrl.hlo): FLOPs over peak, or bytes over
bandwidth, whichever takes longer. One stream is counted, with segments of one length or as R1-Distill writes them.

Attainable MFU is the model FLOPs of the stream's tokens (jaxrl.plan.sequence_flops, three forward passes for an update)
over peak times the sum of the kernels' rooflines: no program of these kernels can be faster. What it cannot know: how
close a kernel comes to its roofline (nothing is autotuned here), and the gaps between launches. Kernels are counted, so
that a measured gap can be multiplied.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from benchmarks.harness import answer_lengths, write_results
from jaxrl import aot, config, hlo
from jaxrl.grpo import packing
from jaxrl.hardware import HARDWARE
from jaxrl.models import attention
from jaxrl.parallel.mesh import mesh_over
from jaxrl.plan import KNOWN, sequence_flops
from jaxrl.programs import Programs, build_programs, peak_bytes
from jaxrl.types import JsonObject

RECIPE = Path(__file__).parent.parent / "recipes" / "justrl-deepseek-1.5b.toml"
MODEL = next(iter(KNOWN.values()))
PARTS = ("attention", "projections", "mlp", "lm_head", "copies", "optimizer", "accumulate", "rest")
Lengths = Int[np.ndarray, " S"]  # tokens of a stream's segments


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--hardware", default="H100", choices=list(aot.TARGETS))
    add("--devices", type=int, default=8)
    add("--remat", nargs="+", default=["products"])
    add("--mixes", nargs="+", default=list(mixes(32_768)), help="of segments in a stream")
    add("--programs", nargs="+", default=["update", "score"], choices=["update", "score"])
    add("--against", type=Path, help="results of an earlier run, for a table of both")
    add("--hlo", type=Path, help="folder for the compiled programs")
    add("--top", type=int, default=0, help="kernels to list, the slowest first")
    add("--name", default="", help="of the results: update_aot_HARDWARE without")
    options, changes = parser.parse_known_args()  # --section.key VALUE of the recipe
    rows: list[JsonObject] = []
    for remat in options.remat:
        overrides = ["--model.remat", remat, "--mesh.fsdp", str(options.devices), *changes]
        recipe = config.load(RECIPE, overrides)
        mesh = mesh_over(aot.devices(options.hardware, options.devices), recipe.mesh.data)
        programs = build_programs(recipe, MODEL, mesh)
        for name in options.programs:
            rows += measure(options, programs, name, {"remat": remat})
    before = json.loads(options.against.read_text(encoding="utf-8"))["rows"] if options.against else []
    show(rows, before)
    write_results(
        options.name or f"update_aot_{options.hardware}",
        {k: str(v) for k, v in vars(options).items()}
        | {"changes": changes, "jax": jax.__version__}
        | {"rows": rows},
    )


def mixes(stream: int) -> dict[str, list[Lengths]]:
    """Streams by name: each a list of the lengths in one, over which is averaged."""
    same = {f"{stream // n} x {n:,}": [np.full(stream // n, n)] for n in (16_384, 2_048, 512)}
    same["6 x 5,120"] = [np.full(6, 5_120)]
    return same | {"R1-like": r1_streams(stream)}


def r1_streams(stream: int) -> list[Lengths]:
    """The streams of a device's share of a mini-batch, 64 answers as R1-Distill-Qwen-1.5B writes them."""
    lengths = 150 + answer_lengths(np.random.default_rng(0), 64)
    layout = packing.Layout((stream,), packing.bucket_lengths(512, 16_384), 64, 0.0)
    _, places = packing.place_sequences(list(lengths), 1, layout)
    rows: dict[int, list[int]] = collections.defaultdict(list)
    for length, place in zip(lengths, places, strict=True):
        rows[place.micro_batch].append(int(length))
    return [np.array(row) for row in rows.values()]


def measure(
    options: argparse.Namespace, programs: Programs, name: str, setting: JsonObject
) -> list[JsonObject]:
    """Compiles a program; a row for each mix."""
    stream = programs.layout.streams[-1]
    state, batch = programs.abstract_state(), programs.abstract_batch(stream)
    began = time.process_time()
    lowered = (
        programs.update.lower(state, batch)
        if name == "update"
        else programs.logprobs.lower(state.params, packing.without_terms(batch))
    )
    compiled = lowered.compile()
    seconds, text = time.process_time() - began, compiled.as_text()
    if options.hlo:
        options.hlo.mkdir(exist_ok=True)
        (options.hlo / f"{name}-{setting['remat']}.hlo").write_text(text, encoding="utf-8")
    module, rows = hlo.parse(text), []
    for mix in options.mixes:
        streams = mixes(stream)[mix]
        costs = hlo.costs(module, HARDWARE[options.hardware], loops(programs, streams))
        found = summary(costs, streams, HARDWARE[options.hardware].flops, 3 if name == "update" else 1)
        rows.append(
            {"program": name, "mix": mix, "bytes": peak_bytes(compiled), "compile_seconds": seconds}
            | setting
            | found
        )
        for cost in sorted(costs, key=lambda c: -c.seconds)[: options.top]:
            print(
                f"{1e3 * cost.seconds:9.2f} ms x{cost.times:<7.0f}{cost.bytes / 1e9:9.2f} GB "
                f"{sum(cost.flops.values()) / 1e12:8.2f} TF {part(cost):12}{cost.name[:40]:40} {cost.scope[-90:]}"
            )
    return rows


def loops(programs: Programs, streams: list[Lengths]):
    """Trips of the loops whose number of trips is data: one stream, and its segments' attention."""
    buckets, kernel = programs.layout.buckets, attention.TRIP
    padded = attention.padded_lengths(buckets, kernel)

    def loop(scope: str) -> hlo.Loop:
        inside = [length for length in padded if f"padded_{length}/" in scope]
        if not inside:
            return hlo.Loop(1)
        (length,) = inside
        shorter = max((n for n in padded if n < length), default=0)
        batch = max(1, kernel // length)
        trips, computed = 0.0, 0.0
        for lengths in streams:
            rounded = np.array(buckets)[np.searchsorted(buckets, lengths)]
            own = lengths[(rounded > shorter) & (rounded <= length)]
            trips += -(-len(own) // batch) / len(streams)
            computed += float((own.astype(float) ** 2).sum()) / len(streams)
        return hlo.Loop(trips, computed / max(trips * batch * length**2, 1))

    return loop


def summary(costs: list[hlo.Cost], streams: list[Lengths], peak: float, passes: int) -> JsonObject:
    parts: collections.Counter[str] = collections.Counter()
    for cost in costs:
        parts[part(cost)] += cost.seconds
    seconds = sum(parts.values())
    flops = passes * float(np.mean([sequence_flops(MODEL, lengths) for lengths in streams]))
    return {
        "seconds": seconds,
        "hidden_seconds": sum(cost.hidden for cost in costs),
        "floor_seconds": flops / peak,
        "mfu": flops / peak / seconds,
        "parts": {name: parts[name] for name in PARTS},
        "float32_flops": sum(c.flops.get("f32", 0) for c in costs),
        "sent": sum(c.sent for c in costs),
        "kernels": sum(c.times for c in costs),
    }


def part(cost: hlo.Cost) -> str:
    """The part of the model that a kernel belongs to."""
    scope = cost.scope
    if cost.op in ("copy", "copy-start", "transpose") or cost.name.startswith(
        ("wrapped_copy", "copy_", "loop_copy")
    ):
        return "copies"
    for name, marks in {
        "optimizer": ("optimizer",),
        "accumulate": ("accumulate",),
        "lm_head": ("lm_head",),
        "attention": ("padded_",),
        "mlp": ("mlp/", "mlp)/"),
        "projections": ("attention/", "attention)/"),
    }.items():
        if any(mark in scope for mark in marks):
            return name
    return "rest"


def show(rows: list[JsonObject], before: list[JsonObject]) -> None:
    head = f"{'':8}{'remat':12}{'segments':12}{'ms':>8}{'hidden':>8}{'MFU':>6}{'GB':>7}{'f32 TF':>8}{'kernels':>9}"
    print(head + "".join(f"{name:>12}" for name in PARTS))
    for row in rows:
        same = ("program", "remat", "mix")
        old = next((b for b in before if all(b[key] == row[key] for key in same)), None)
        for label, r in (("before", old), ("", row)):
            if r:
                print(
                    f"{label or r['program']:8}{r['remat']:12}{r['mix']:12}{1e3 * r['seconds']:8.1f}"
                    f"{1e3 * r['hidden_seconds']:8.1f}{r['mfu']:6.1%}"
                    f"{r['bytes'] / 1e9:7.1f}{r['float32_flops'] / 1e12:8.2f}{r['kernels']:9.0f}"
                    + "".join(f"{1e3 * r['parts'][name]:12.1f}" for name in PARTS)
                )


if __name__ == "__main__":
    main()
