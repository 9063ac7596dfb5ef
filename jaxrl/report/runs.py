"""The numbers of a run: means of its beginning and end, checks, the budget it used."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

import numpy as np
from jaxtyping import Float

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.results import HeldOutResult, TrainingResult
from jaxrl.telemetry import agreement
from jaxrl.telemetry.history import FILE, HistoryRow, Totals, read_history, totals
from jaxrl.telemetry.timer import PHASES
from jaxrl.telemetry.trackers import MetricsRow, read_metrics
from jaxrl.types import JsonObject

Values = Float[np.ndarray, " T"]  # of a metric, one a step; NaN where it is missing
# Of a benchmark, which has the rest of a TaskResult too, or of the average over benchmarks.
Accuracy = TypedDict("Accuracy", {"title": str, "pass@1": float, "ci95": list[float]})


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    name: str
    directory: Path
    rows: list[MetricsRow]  # metrics.jsonl
    evaluations: list[HeldOutResult]  # eval/*.json by step
    benchmarks: list[TrainingResult]  # eval/benchmarks/*.json by step
    recipe: config.Recipe | None  # None without a recipe.toml that this version takes

    @functools.cached_property
    def history(self) -> list[HistoryRow]:
        """prompts.jsonl; empty for older runs."""
        return read_history(self.directory / FILE)

    @functools.cached_property
    def prompts(self) -> list[Totals]:
        """The totals of each prompt over the run."""
        return totals(self.history)


class Finding(NamedTuple):
    """The two means that a check compares, and whether it warns."""

    first: float
    last: float
    warns: bool


@dataclass(frozen=True)
class Check:
    """A rule on the means of a sum of metrics over the first and the last tenth of a run's steps."""

    title: str
    rule: str
    keys: tuple[str, ...]
    warns: Callable[[float, float], bool]

    def apply(self, run: Run) -> Finding:
        """Compares the run's two means. They are NaN, and nothing warns, without the metrics."""
        first, last = ends(np.sum([series(run.rows, key) for key in self.keys], axis=0))
        return Finding(first, last, bool(self.warns(first, last)))


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
        f"sampler and trainer give a token log-probs that differ by over {agreement.USUAL} nats on average in the last "
        "tenth",
        (agreement.METRIC,),
        lambda first, last: last > agreement.USUAL,
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


def read_run(directory: Path, begun: bool = True) -> Run:
    """Reads a run folder.

    Args:
      directory: the run folder.
      begun: whether it has to have metrics of a step.

    Raises:
      InputError: if it has no metrics, or an evaluation that is not JSON.
    """
    recipe = None
    if (directory / "recipe.toml").exists():
        try:
            recipe = config.load(directory / "recipe.toml")
        except InputError:
            recipe = None  # of an older version: curves and rollouts are still worth a report
    rows = read_metrics(directory / "metrics.jsonl", begun)
    evaluations = cast(list[HeldOutResult], _results(directory / "eval", "name", "step", "accuracy", "ci95"))
    needed = ("step", "benchmarks", "average")
    benchmarks = cast(list[TrainingResult], _results(directory / "eval" / "benchmarks", *needed))
    return Run(
        name=directory.resolve().name,
        directory=directory,
        rows=rows,
        evaluations=sorted(evaluations, key=lambda result: (result["step"], result["name"])),
        benchmarks=sorted(benchmarks, key=lambda result: result["step"]),
        recipe=recipe,
    )


def series(rows: Sequence[MetricsRow], key: str) -> Values:
    """A metric over steps."""
    return np.array([np.nan if (value := row.get(key)) is None else value for row in rows], float)


def switches(run: Run) -> list[config.Stage]:
    """The stages of a run that have begun, but for the first."""
    stages = config.stages_of(run.recipe) if run.recipe else ()
    return [stage for stage in stages[1:] if stage.first < len(run.rows)]


def total(rows: Sequence[MetricsRow], key: str) -> float:
    """A metric's sum over steps; 0 where no step has it."""
    return float(np.nansum(series(rows, key)))


def ends(values: Values) -> tuple[float, float]:
    """Means of the finite values in the first and in the last tenth; NaN where there are none."""
    tenth = max(1, len(values) // 10)
    return _mean(values[:tenth]), _mean(values[-tenth:])


def smooth(values: Values, share: float = 0.1) -> Values:
    """Fits a line to the values around each step that are not NaN: a straight line stays as it is, ends too.

    Weights are tricube (Cleveland 1979): steps at `share` of the run or more away count nothing. NaN where none is
    near.
    """
    width = max(2, round(share * len(values)))
    offsets = np.arange(1 - width, width)
    weights = (1 - np.abs(offsets / width) ** 3) ** 3
    there = np.isfinite(values)
    filled = np.where(there, values, 0)

    def moment(of: np.ndarray, power: int) -> Values:  # sums of what is near, times weights and distances
        return np.convolve(of, (weights * (-offsets) ** power), "full")[width - 1 : width - 1 + len(values)]

    s0, s1, s2 = (moment(there.astype(float), power) for power in range(3))
    t0, t1 = (moment(filled, power) for power in range(2))
    spread = s0 * s2 - s1**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 1e-9 * s0 * s2, (s2 * t0 - s1 * t1) / spread, t0 / s0)


def accuracies(result: TrainingResult) -> dict[str, Accuracy]:
    """The accuracy on each benchmark by name, and their average where there are several."""
    # older files have no titles
    titled = {name: {"title": name, **each} for name, each in result["benchmarks"].items()}
    found = cast(dict[str, Accuracy], titled)
    if len(found) > 1:
        found["average"] = {"title": "Average", **result["average"]}
    return found


def budget(run: Run) -> dict[str, float]:
    """What the run used so far: tokens, seconds by phase, device hours, and hours for a point of accuracy.

    `tokens at most` is the formula of papers: steps x prompts x samples x longest sequence. Tokens sampled are those
    of answers; trained on are those in updates, without groups that are all right or all wrong. All devices are
    occupied in every phase, the trainer's by its own and the sampler's by theirs (one a vLLM server is counted). Points
    are of the average over benchmarks, or of held-out accuracy where there are none.
    """
    seconds = {f"seconds {phase.replace('_', ' ')}": total(run.rows, f"time/{phase}") for phase in PHASES}
    evaluations = float(sum(result.get("seconds", 0.0) for result in run.benchmarks))
    if evaluations:
        seconds["seconds benchmarks"] = evaluations
    seconds["seconds in all"] = total(run.rows, "time/step") + evaluations
    used = {"steps": float(len(run.rows))} | _tokens(run) | seconds
    hours, unit = seconds["seconds in all"] / 3600, "hours"
    devices = _devices(run)
    if np.isfinite(devices):
        hours, unit = hours * devices, "device hours"
        used["devices"] = devices
        used |= {f"device {name}": spent * devices for name, spent in seconds.items()}
        used["device hours in all"] = hours
    points = _points(run)
    if points > 0:
        used[f"{unit} a point of accuracy"] = hours / points
    return used


def prompt_counts(run: Run) -> dict[str, int]:
    """Counts of the prompts that were sampled so far; empty where the run has no history of them."""
    if not run.prompts:
        return {}
    return {
        "prompts sampled": len(run.prompts),
        "never solved": sum(not prompt.right for prompt in run.prompts),
        "solved and lost again": sum(prompt.lost for prompt in run.prompts),
    }


def number(value: float) -> str:
    """A number in four digits; - where it is not finite."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if np.isfinite(value) else "-"


def _tokens(run: Run) -> dict[str, float]:
    tokens = {}
    if run.recipe:
        stages, rollout = config.stages_of(run.recipe), run.recipe.rollout
        each = [config.stage_at(stages, int(step)).recipe.step_tokens for step in series(run.rows, "step")]
        tokens["tokens at most"] = float(sum(each))
        prompts = rollout.prompts - np.nan_to_num(series(run.rows, "sampler/refused"))
        # older runs have no count
        estimated = series(run.rows, "response/length_mean") * prompts * rollout.samples
        counted = series(run.rows, "sampler/tokens")
        tokens["tokens sampled"] = float(np.nansum(np.where(np.isfinite(counted), counted, estimated)))
    return tokens | {"tokens trained on": total(run.rows, "update/tokens")}


def _devices(run: Run) -> float:
    """Devices of the trainer and one for each vLLM server; NaN where the run did not write its own."""
    devices = ends(series(run.rows, "perf/devices"))[1]
    if run.recipe and run.recipe.rollout.engine == "vllm":
        devices += len(run.recipe.sampler.urls) or run.recipe.sampler.servers
    return devices


def _points(run: Run) -> float:
    """Percentage points of accuracy from the first evaluation to the last."""
    measured = [result["average"]["pass@1"] for result in run.benchmarks]
    measured = measured or [result["accuracy"] for result in run.evaluations]
    return 100 * (measured[-1] - measured[0]) if measured else 0.0


def _results(directory: Path, *needed: str) -> list[JsonObject]:
    """The result files of a folder, each with the keys that are needed."""
    found = []
    for path in sorted(directory.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}); delete it and evaluate again") from None
        if not isinstance(result, dict) or not result.keys() >= set(needed):
            raise InputError(f"{path}: not a result with {', '.join(needed)}; delete it and evaluate again")
        found.append(result)
    return found


def _mean(values: Values) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else np.nan
