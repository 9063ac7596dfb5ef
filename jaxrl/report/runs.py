"""What the numbers of a run say: means of its beginning and end, checks, the budget it used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.telemetry.trackers import read_metrics

PHASES = ("sample", "score", "old_logprobs", "update", "publish")


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    name: str
    directory: Path
    rows: list[dict[str, Any]]  # metrics.jsonl
    evaluations: list[dict[str, Any]]  # eval/*.json by step
    benchmarks: list[dict[str, Any]]  # eval/benchmarks/*.json by step
    recipe: config.Recipe | None  # None without a recipe.toml that this version takes


@dataclass(frozen=True)
class Check:
    """A rule on the means of a sum of metrics over the first and the last tenth of a run's steps."""

    title: str
    rule: str
    keys: tuple[str, ...]
    warns: Callable[[float, float], bool]


CHECKS = (
    Check(
        "entropy collapse",
        "the last tenth's mean entropy is under half of the first tenth's",
        ("policy/entropy",),
        lambda first, last: last < first / 2,
    ),
    Check(
        "truncation rising",
        "the share of truncated answers in the last tenth is over 0.05 above the first tenth's",
        ("response/truncated_fraction",),
        lambda first, last: last > first + 0.05,
    ),
    Check(
        "sampler mismatch",
        "sampler and trainer give a token log-probs that differ by over 0.02 nats on average in the last tenth",
        ("sampler/logprob_diff_mean",),
        lambda first, last: last > 0.02,
    ),
    Check(
        "dead groups",
        "over 0.8 of the last tenth's groups are all right or all wrong, and teach nothing",
        ("groups/all_correct_fraction", "groups/all_wrong_fraction"),
        lambda first, last: last > 0.8,
    ),
    Check(
        "skipped updates",
        "gradients that are not finite made updates of the last tenth void",
        ("update/skipped",),
        lambda first, last: last > 0,
    ),
)


def read_run(directory: Path) -> Run:
    """Reads a run folder.

    Raises:
      InputError: if it has no metrics, or an evaluation that is not JSON.
    """
    recipe = None
    if (directory / "recipe.toml").exists():
        try:
            recipe = config.load(directory / "recipe.toml")
        except InputError:
            recipe = None  # of an older version: curves and rollouts are still worth a report
    rows = read_metrics(directory / "metrics.jsonl")
    evaluations = sorted(_results(directory / "eval"), key=lambda result: (result["step"], result["name"]))
    benchmarks = sorted(_results(directory / "eval" / "benchmarks"), key=lambda result: result["step"])
    return Run(directory.resolve().name, directory, rows, evaluations, benchmarks, recipe)


def series(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], float)


def ends(values: np.ndarray) -> tuple[float, float]:
    """Means over what is finite in the first and in the last tenth; NaN where nothing is."""
    tenth = max(1, len(values) // 10)
    return _mean(values[:tenth]), _mean(values[-tenth:])


def smooth(values: np.ndarray, weight: float = 0.9) -> np.ndarray:
    """Exponential moving average without the start's bias (arXiv 1412.6980, section 3), over what is not NaN."""
    total = norm = 0.0
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        if norm:
            out[i] = total / norm
    return out


def check(run: Run, rule: Check) -> tuple[float, float, bool]:
    """The two means of a check, and whether they warn."""
    first, last = ends(np.sum([series(run.rows, key) for key in rule.keys], axis=0))
    return first, last, bool(rule.warns(first, last))


def scores(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of a file in eval/benchmarks: the measures of each benchmark by name, and of their average if there are more."""
    found = dict(result["benchmarks"])
    return found | ({"average": {"title": "Average"} | result["average"]} if len(found) > 1 else {})


def budget(run: Run) -> dict[str, float]:
    """What the run used so far: tokens, seconds by phase, device hours, and hours for a point of accuracy.

    `tokens at most` is the formula of papers: steps x prompts x samples x longest sequence. Tokens sampled are those
    of answers; trained on are those in updates, without groups that are all right or all wrong. All devices are
    occupied in every phase, the trainer's by its own and the sampler's by theirs (one a vLLM server is counted). Points
    are of the average over benchmarks, or of held-out accuracy where there are none.
    """
    rows, used = run.rows, {"steps": float(len(run.rows))}
    seconds = {phase: float(np.nansum(series(rows, f"time/{phase}"))) for phase in PHASES}
    evaluations = float(sum(result.get("seconds", 0) for result in run.benchmarks))
    total = float(np.nansum(series(rows, "time/step"))) + evaluations
    devices = ends(series(rows, "perf/devices"))[1]
    if run.recipe:
        r, s = run.recipe.rollout, run.recipe.sampler
        used["tokens at most"] = float(len(rows) * token_budget(run.recipe))
        prompts = r.prompts - np.nan_to_num(series(rows, "sampler/refused"))
        sampled = series(rows, "response/length_mean") * prompts * r.samples
        used["tokens sampled"] = float(np.nansum(sampled))
        devices += (len(s.urls) or s.servers) if r.engine == "vllm" else 0
    used["tokens trained on"] = float(np.nansum(series(rows, "update/tokens")))
    used |= {f"seconds {phase.replace('_', ' ')}": spent for phase, spent in seconds.items()}
    if evaluations:
        used["seconds benchmarks"] = evaluations
    used["seconds in all"] = total
    unit = "hours"
    if np.isfinite(devices):
        used["devices"] = devices
        used |= {
            f"device {name}": spent * devices for name, spent in used.items() if name.startswith("seconds")
        }
        used["device hours in all"] = total * devices / 3600
        unit = "device hours"
    gained = [result["average"]["pass@1"] for result in run.benchmarks] or [
        result["accuracy"] for result in run.evaluations
    ]
    points = 100 * (gained[-1] - gained[0]) if gained else 0
    if points > 0:
        used[f"{unit} a point of accuracy"] = total / 3600 / points * (devices if unit != "hours" else 1)
    return used


def token_budget(recipe: config.Recipe) -> int:
    """Tokens a step at most: prompts x samples x longest sequence."""
    return (
        recipe.rollout.prompts
        * recipe.rollout.samples
        * (recipe.data.max_prompt_tokens + recipe.rollout.max_tokens)
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if np.isfinite(value) else "-"


def _results(directory: Path) -> list[dict[str, Any]]:
    results = []
    for path in sorted(directory.glob("*.json")):
        try:
            results.append(json.loads(path.read_text()))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}); delete it and evaluate again") from None
    return results


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan
