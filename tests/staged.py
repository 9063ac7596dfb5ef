"""A run whose steps are not a function of seed and step alone: stages, a reference, refill, rescue, dropped prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_run
from jaxrl import config

STAGES: list[dict[str, Any]] = [
    {"name": "short", "until": 3, "rollout": {"max_tokens": 6}},
    {
        "name": "hot",
        "until": 6,
        "restart": ["optimizer", "reference"],
        "rollout": {"temperature": 1.25},
        "groups": {"filter": "refill", "rescue": True},
    },
    {
        "name": "rest",
        "until": 9,
        "restart": ["optimizer"],
        "data": {"drop_solved": 0.65},
        "groups": {"filter": "substitute"},
    },
]


def write_recipe(
    folder: Path, base: Path, stages: list[dict[str, Any]] | None = None, **overrides: Any
) -> Path:
    """As `tiny_run.write_recipe`, of nine steps in three stages, over twelve prompts."""
    sections = {
        "groups.max_rounds": 6,
        "groups.filter": "refill",
        "kl.coefficient": 0.02,
        "kl.reset_every": 2,
    }
    path = tiny_run.write_recipe(folder, base, **{"data.deduplicate": False} | sections | overrides)
    rows = [{"problem": digit, "answer": digit} for digit in "012" * 4]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config.to_dict(config.load(path))
    del values["run"]["steps"]
    path.write_text(
        config.to_toml(config.from_dict(values | {"stages": STAGES if stages is None else stages}))
    )
    return path


def manifest(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds: fingerprints of its arrays and of its reference, a digest of its ledger."""
    whole = json.loads((run / "checkpoints" / str(step) / "manifest" / "metadata").read_text())["manifest"]
    return {key: whole.get(key) for key in ("arrays", "ledger", "reference")}
