"""The GPU's compiler against the planner's arithmetic, in bytes: `python -m benchmarks.plan_bytes`.

Every case is compiled for an abstract H100 (jaxrl.aot); tests/test_plan.py holds jaxrl.plan.estimated_bytes against the
results. About 30 seconds of a processor a case.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.harness import write_results
from jaxrl import config
from jaxrl.models.decoder import Config
from jaxrl.plan import KNOWN, compiled_bytes, estimated_bytes
from jaxrl.types import JsonObject

MODELS = {
    "R1-Distill-Qwen-1.5B": next(iter(KNOWN.values())),
    "Llama-3.1-8B": Config("llama", 128_256, 4096, 32, 32, 8, 128, 14_336, 5e5, 1e-5, False, 131_072),
    "Qwen3-0.6B": Config("qwen3", 151_936, 1024, 28, 16, 8, 128, 3072, 1e6, 1e-6, True, 40_960),
}


class Case(NamedTuple):
    """One update."""

    trainers: int
    remat: str
    stream: int  # tokens
    gather: str = "step"
    chunk: int = 2048  # tokens whose logits exist at one time
    model: str = "R1-Distill-Qwen-1.5B"

    def recipe(self) -> config.Recipe:
        return config.from_dict(
            {
                "model": {"remat": self.remat},
                "mesh": {"gather": self.gather},
                "packing": {"stream_tokens": self.stream, "logprob_chunk": self.chunk},
            }
        )


CASES = [
    Case(8, "full", 32_768),
    Case(8, "none", 16_384),
    Case(8, "products", 32_768),
    Case(8, "full", 32_768, "layer"),
    Case(8, "full", 16_384),
    Case(8, "attention", 32_768),
    Case(8, "projections", 32_768),
    Case(1, "full", 32_768),
    Case(4, "full", 16_384, chunk=1024),
    Case(8, "products", 32_768, "layer"),
    Case(4, "attention", 16_384, "layer", 1024),
    Case(1, "products", 16_384, chunk=1024),
    Case(8, "full", 16_384, "layer", model="Llama-3.1-8B"),
    Case(8, "projections", 32_768, "layer", 1024),
    Case(1, "full", 32_768, model="Qwen3-0.6B"),
    Case(4, "none", 16_384, model="Qwen3-0.6B"),
]


def table(rows: list[JsonObject]) -> str:
    """The table of docs/planning.md: compiled bytes of the results beside the arithmetic of now."""
    heads = "| model | trainers | remat | stream | gather | chunk | compiled GB | arithmetic | |"
    lines = [heads, "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        case = Case(**{name: row[name] for name in Case._fields})
        estimated = sum(estimated_bytes(case.recipe(), MODELS[case.model], case.trainers).values())
        sizes = f"{row['bytes'] / 1e9:.1f} | {estimated / 1e9:.1f} | {estimated / row['bytes'] - 1:+.1%}"
        what = f"{case.model} | {case.trainers} | {case.remat} | {case.stream:,} | {case.gather} | {case.chunk:,}"
        lines.append(f"| {what} | {sizes} |")
    return "\n".join(lines)


def main() -> None:
    rows = []
    for case in CASES:
        model, recipe = MODELS[case.model], case.recipe()
        compiled = compiled_bytes(recipe, model, case.trainers, "H100")
        total = sum(size for name, size in compiled.items() if name != "temporaries of scoring")
        estimated = sum(estimated_bytes(recipe, model, case.trainers).values())
        rows.append(case._asdict() | {"bytes": total, "scoring": compiled["temporaries of scoring"]})
        print(f"{case}: {total / 1e9:.1f} GB, estimated {estimated / 1e9:.1f}: {estimated / total - 1:+.0%}")
    write_results("plan_bytes", {"hardware": "H100", "rows": rows})


if __name__ == "__main__":
    main()
