"""Whole steps of two checkouts of jaxrl, in turn: `python -m benchmarks.versions OTHER RECIPE --section.key value`.

OTHER is a clone of another commit; this checkout is compared with it. Each trains the recipe from its start, A B A B,
by the same interpreter, and must give the same rewards. Ratios are of medians; their interval is over pairs of runs.
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
from pathlib import Path

import jax

from benchmarks.harness import write_results
from jaxrl.types import JsonObject

HERE = Path(__file__).parent.parent
WARM_UP = 2  # steps of each run that are left out
PARTS = {
    "step": ("step",),
    "sample": ("sample",),
    "prepare": ("exchange", "score", "old_logprobs"),
    "update": ("update",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path)
    parser.add_argument("recipe")
    parser.add_argument(
        "--steps", type=int, default=30, help=f"of each run; the first {WARM_UP} are left out"
    )
    parser.add_argument("--rounds", type=int, default=4)
    options, overrides = parser.parse_known_args()
    checkouts = {"other": options.other.absolute(), "this": HERE}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    held: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxrl-versions-") as folder:
        for i in range(options.rounds):
            rewards = {}
            for name, checkout in checkouts.items():
                run = Path(folder) / f"{name}-{i}"
                more = [*overrides, "--run.directory", str(run), "--run.steps", str(options.steps)]
                rows = train(checkout, Path(options.recipe).absolute(), more)
                rewards[name] = [row["reward/mean"] for row in rows]
                seconds[name].append({part: measure(rows, phases) for part, phases in PARTS.items()})
                held[name] = checkpoint_bytes(run, options.steps)
            assert rewards["other"] == rewards["this"], "the two do not train alike"
    ratios = {
        part: ratio(*([run[part] for run in seconds[name]] for name in ("this", "other"))) for part in PARTS
    }
    commits = {name: commit(checkout) for name, checkout in checkouts.items()}
    setting = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    setting |= {"recipe": options.recipe, "steps": options.steps, "rounds": options.rounds} | commits
    for part, (middle, low, high) in ratios.items():
        own, others = (statistics.median(run[part] for run in seconds[name]) for name in ("this", "other"))
        print(f"{part:8} {own:.4f} s, other {others:.4f} s, ratio {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"checkpoint: {held}")
    results = {
        part: dict(zip(("median", "least", "most"), each, strict=True)) for part, each in ratios.items()
    }
    write_results("versions", {"setting": setting, "ratio": results, "checkpoint_bytes": held})


def train(checkout: Path, recipe: Path, overrides: list[str]) -> list[JsonObject]:
    """The rows of a run's metrics after the warm-up."""
    command = [sys.executable, "-m", "jaxrl.cli", "train", str(recipe), *overrides]
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    # python -m looks in the working folder first
    subprocess.run(command, check=True, env=environment, cwd=checkout, stdout=subprocess.DEVNULL)
    run = Path(overrides[overrides.index("--run.directory") + 1])
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[WARM_UP:]]


def measure(rows: list[JsonObject], phases: tuple[str, ...]) -> float:
    return statistics.median(sum(row[f"time/{phase}"] for phase in phases) for row in rows)


def ratio(own: list[float], others: list[float]) -> tuple[float, float, float]:
    """The ratio of medians, and the least and the most of a pair of runs."""
    pairs = [a / b for a, b in zip(own, others, strict=True)]
    return statistics.median(own) / statistics.median(others), min(pairs), max(pairs)


def checkpoint_bytes(run: Path, step: int) -> dict[str, int]:
    """Bytes of each item of a checkpoint."""
    folder = run / "checkpoints" / str(step)
    items = [item for item in sorted(folder.iterdir()) if item.is_dir()]
    return {
        item.name: sum(file.stat().st_size for file in item.rglob("*") if file.is_file()) for item in items
    }


def commit(checkout: Path) -> str:
    shown = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return shown.stdout.strip()


if __name__ == "__main__":
    main()
