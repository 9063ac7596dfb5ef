"""Plans of the twelve recipes of JustRL's table at their real size, on 8 and 32 H100: `python -m benchmarks.plans`.

Memory is by the plan's arithmetic; `--compile` also compiles the largest stage of each recipe for 8 devices (needs the
extra `cuda`, no GPU; about a minute each). tests/test_recipes_plans.py requires every stage to fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

from benchmarks.harness import write_results
from jaxrl import config
from jaxrl.config import Recipe
from jaxrl.models.config_json import describe
from jaxrl.plan import (
    KNOWN,
    Assumptions,
    Plan,
    cache_bytes,
    compiled_bytes,
    model_config,
    parameters,
    plan,
)
from jaxrl.types import JsonObject

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = (
    "justrl-deepseek-1.5b",
    "justrl-nemotron-1.5b",
    "still-3-1.5b",
    "deepscaler-1.5b",
    "fastcurl-1.5b-v3",
    "prorl-1.5b-v1",
    "prorl-1.5b-v2",
    "brorl-1.5b",
    "archer-math-1.5b",
    "questa-nemotron-1.5b",
    "e3-1.7b",
    "polaris-1.7b",
)
GPU, DEVICES = "H100", (8, 32)
MEAN, SHARE, KEPT = 5000, 0.4, 0.5
ASSUMED = {
    "mean response": f"{MEAN} tokens, or {SHARE} of the stage's rollout.max_tokens where that is less",
    "mean prompt": "150 tokens",
    "kept": f'{KEPT} of the groups, where groups.filter is "refill" or "drop"; zero advantage: none',
    "in turn": "every device trains, and samples as a vLLM server that has 0.3 of it; one that trains has 0.62",
    "ahead": "the fastest split into trainers and samplers, where one may be a step ahead (sampler.max_staleness)",
    "model": "prorl-1.5b-v2 begins with prorl-1.5b-v1's export, which has the shape of its base model; polaris-1.7b's "
    "second stage is longer than Qwen3-1.7B's 40,960 positions, so its config.json is taken to say 49,152",
}
GB = 1e9


def load(name: str, folder: Path) -> Recipe:
    """A recipe, with a model whose shape is known without network; `folder` is for a config.json of our own."""
    changes = []
    if name == "prorl-1.5b-v2":
        changes = ["--model.path", config.load(str(FOLDER / "prorl-1.5b-v1.toml"), []).model.path]
    if name == "polaris-1.7b":
        longer = dataclasses.replace(KNOWN["Qwen/Qwen3-1.7B"], max_positions=49_152)
        (folder / "config.json").write_text(json.dumps(describe(longer)), encoding="utf-8")
        changes = ["--model.path", str(folder)]
    return config.load(str(FOLDER / f"{name}.toml"), changes)


def assumptions(recipe: Recipe, **devices: int) -> Assumptions:
    """What a stage's plan assumes, see ASSUMED."""
    kept = KEPT if recipe.groups.filter in ("refill", "drop") else 1.0
    mean = min(MEAN, SHARE * recipe.rollout.max_tokens)
    return Assumptions(hardware=GPU, compile=False, mean_response=mean, kept=kept, **devices)


def plans_of(recipe: Recipe, devices: int) -> dict[str, Plan]:
    """The plans of a stage: "in turn", and "ahead" for the fastest split."""
    both = plan(recipe, assumptions(recipe, devices=devices))
    split = next(step for step in both["steps"] if not step["colocated"])
    sides = {"trainers": int(split["trainers"]), "samplers": int(split["samplers"])}
    in_turn = plan(recipe, assumptions(recipe, trainers=devices))
    return {"in turn": in_turn, "ahead": plan(recipe, assumptions(recipe, **sides))}


def peak(made: Plan) -> float:
    """Bytes on a trainer at most at one time."""
    return sum(size for name, size in made["bytes"].items() if name != "temporaries of scoring")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile the largest stage of each recipe too")
    compiles = parser.parse_args().compile
    rows = list[JsonObject]()
    for name in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            recipe = load(name, Path(folder))
            made = [whole_run(name, recipe, devices) for devices in DEVICES]
            if compiles:
                made[0]["compiled"] = compiled(recipe, made[0]["stages"])
        rows += made
    how = {"hardware": GPU, "bytes": "arithmetic", "assumed": ASSUMED}
    write_results("plans", how | {"rows": rows})


def whole_run(name: str, recipe: Recipe, devices: int) -> JsonObject:
    """The plans of all stages on so many devices, and their sums; prints them."""
    stages = config.stages_of(recipe)
    own = "ahead" if recipe.sampler.max_staleness else "in turn"
    made = [(stage, plans_of(stage.recipe, devices)) for stage in stages]
    rows, totals = [], {}
    for stage, both in made:
        rows.append(
            {"stage": stage.name, "steps": stage.until - stage.first, **{n: _row(p) for n, p in both.items()}}
        )
        rows[-1] |= {"tokens_of_step": stage.recipe.step_tokens, "sampler": _sampler(stage.recipe)}
        shown = "".join(_shown(rows[-1][how]) for how in both)
        print(f"{name:<22}{devices:>3} {stage.name:<22}{rows[-1]['steps']:>6} steps{shown}")
    for how in ("in turn", "ahead"):
        seconds = sum(row["steps"] * row[how]["seconds"] for row in rows)
        totals[how] = {"days": seconds / 86400, "device_hours": seconds * devices / 3600}
    budget = sum(row["steps"] * row["tokens_of_step"] for row in rows)
    hours = ", ".join(f"{how} {totals[how]['device_hours']:,.0f}" for how in totals)
    print(
        f"{name:<22}{devices:>3} {budget:.2g} tokens at most; GPU hours {hours}; its way: {own}\n", flush=True
    )
    totals |= {"recipe": name, "devices": devices, "its_way": own, "tokens": budget, "stages": rows}
    return totals


def table(rows: list[JsonObject]) -> str:
    """The table of docs/planning.md, from the rows of the results."""
    heads = "| recipe | tokens at most | 8 H100 in turn: GPU hours, GB | one step ahead | 32 in turn | one step ahead |"
    lines = [heads, "|---|---|---|---|---|---|"]
    for small, large in zip(rows[::2], rows[1::2], strict=True):
        cells = [small["recipe"], f"{small['tokens'] / 1e9:.0f} billion"]
        for row, how in ((row, how) for row in (small, large) for how in ("in turn", "ahead")):
            most = max(stage[how]["peak_gigabytes"] for stage in row["stages"])
            cells.append(f"{row[how]['device_hours']:,.0f}, {most:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(made: Plan) -> JsonObject:
    step = made["steps"][0]
    return {
        "trainers": int(step["trainers"]),
        "samplers": int(step["samplers"]),
        "seconds": round(step["total"], 1),
        "sampling": round(step["prefill"] + step["decode"], 1),
        "old_logprobs": round(step["old_logprobs"], 1),
        "update": round(step["update"], 1),
        "mean_response": made["assumptions"]["mean_response"],
        "remat": made["recipe"]["model"]["remat"],
        "gigabytes": {name: round(size / GB, 2) for name, size in made["bytes"].items()},
        "peak_gigabytes": round(peak(made) / GB, 1),
    }


def _shown(row: JsonObject) -> str:
    split = f"{row['trainers']}+{row['samplers']}" if row["gigabytes"].get("sampler") is None else "in turn"
    return f"{split:>9}{row['seconds']:>8.0f} s{row['peak_gigabytes']:>6.1f} GB {row['remat']:<12}"


def _sampler(recipe: Recipe) -> JsonObject:
    """What a sampler's device needs beside the share that it is given: parameters, and the longest sequence's cache."""
    model, longest = (
        model_config(recipe.model.path),
        recipe.data.max_prompt_tokens + recipe.rollout.max_tokens,
    )
    return {
        "parameters_gigabytes": round(2 * parameters(model) / GB, 2),
        "longest_sequence_gigabytes": round(cache_bytes(model) * longest / GB, 2),
    }


def compiled(recipe: Recipe, rows: list[JsonObject]) -> JsonObject:
    """Bytes of the largest stage on 8 devices in turn, by the GPU's compiler."""
    largest = max(range(len(rows)), key=lambda i: rows[i]["in turn"]["peak_gigabytes"])
    own = config.stages_of(recipe)[largest].recipe
    remat = rows[largest]["in turn"]["remat"]
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, remat=remat))
    held = compiled_bytes(own, model_config(own.model.path), DEVICES[0], GPU)
    shown = {name: round(size / GB, 2) for name, size in held.items()}
    total = sum(size for name, size in held.items() if name != "temporaries of scoring") / GB
    estimated = rows[largest]["in turn"]["peak_gigabytes"] - rows[largest]["in turn"]["gigabytes"]["sampler"]
    print(
        f"compiled, '{rows[largest]['stage']}': {total:.1f} GB of the trainer, estimated {estimated:.1f}",
        flush=True,
    )
    return {
        "stage": rows[largest]["stage"],
        "gigabytes": shown,
        "trainer": round(total, 1),
        "estimated": estimated,
    }


if __name__ == "__main__":
    main()
