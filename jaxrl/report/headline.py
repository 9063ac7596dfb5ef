"""What a run achieved, in a line: accuracy before and after, with intervals, what it took, and what was changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl import config
from jaxrl.report.runs import Run, budget, number, series

# Keys that name places, divide the work, or set what is written and measured: no step depends on them.
NO_STEP = (
    *("run.", "packing.", "mesh.", "checkpoint.", "eval.", "model.path", "model.attention", "model.remat"),
    *("data.path", "data.config", "data.split", "data.files", "data.problem_column", "data.answer_column"),
    *("rollout.engine", "rollout.slots", "reward.workers", "reward.in_flight", "reward.memory_mib"),
    *("sampler.urls", "sampler.servers", "sampler.vllm", "sampler.transport", "sampler.folder"),
    *("sampler.concurrency", "sampler.request_", "sampler.publish_", "sampler.patience_"),
)
# Of these, what no comparison of runs is about.
BOOKKEEPING = (
    *("run.directory", "run.tensorboard", "run.trackers", "run.project", "run.rollouts_", "run.profile"),
    *("run.compilation_cache", "checkpoint."),
)


class Point(NamedTuple):
    """A measurement with its 95% interval."""

    step: int  # steps trained before
    value: float
    ci95: list[float]  # low, high


@dataclass(frozen=True)
class Headline:
    """A measure whose first and last points are what a run achieved."""

    measure: str
    intervals: str  # how the intervals were made
    points: list[Point]
    percent: bool

    def text(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:.3f}"

    @property
    def change(self) -> str:
        return " → ".join(self.text(point.value) for point in self.ends)

    @property
    def interval(self) -> str:
        ranges = " and ".join(" to ".join(map(self.text, point.ci95)) for point in self.ends)
        return f"95% intervals {ranges}, {self.intervals}"

    @property
    def ends(self) -> tuple[Point, Point]:
        return self.points[0], self.points[-1]


class Departure(NamedTuple):
    """A key of the recipe in which a run departs from JustRL, the default of every key."""

    key: str
    default: object  # None for keys of stages
    values: list[object]  # of each run


def headline(run: Run) -> Headline | None:
    """Accuracy before and after training; else of the first and the last evaluation, else the mean reward.

    Benchmarks go before held-out problems, as in the budget. None for a run without any of these.
    """
    held_out = [Point(result["step"], result["accuracy"], result["ci95"]) for result in run.evaluations]
    named = dict(zip((result["name"] for result in run.evaluations), held_out, strict=True))
    benchmarks = [Point(r["step"], r["average"]["pass@1"], r["average"]["ci95"]) for r in run.benchmarks]
    if named.keys() >= {"before", "after"}:
        between = [point for name, point in named.items() if name not in ("before", "after")]
        return _accuracy("held-out accuracy", [named["before"], *between, named["after"]])
    if len(benchmarks) > 1:
        names = list(run.benchmarks[-1]["benchmarks"])
        of = f"accuracy on {names[0]}" if len(names) == 1 else f"mean of {len(names)} benchmarks"
        return _accuracy(of, benchmarks)
    if len(held_out) > 1:
        return _accuracy("held-out accuracy", held_out)
    rewards, tenth = series(run.rows, "reward/mean"), max(1, len(run.rows) // 10)
    ends = [_mean(0, rewards[:tenth]), _mean(len(rewards), rewards[-tenth:])]
    if not all(np.isfinite(point.value) for point in ends):
        return None
    return Headline("mean reward", "normal, over the first and the last tenth of steps", ends, False)


def facts(run: Run) -> list[str]:
    """Steps, device hours and the model's name."""
    used = budget(run)
    hours, devices = f"{used['seconds in all'] / 3600:,.3g} hours", used.get("devices")
    if devices:
        unit = "device" if devices == 1 else "devices"
        hours = f"{used['device hours in all']:,.3g} device hours ({number(devices)} {unit})"
    model = [f"model {Path(run.recipe.model.path).name}"] if run.recipe else []
    return [f"{number(used['steps'])} steps", hours, *model]


def departures(runs: list[Run]) -> list[Departure]:
    """The keys in which one of the runs departs from JustRL; a run without a recipe has its values."""
    default = config.flat(config.Recipe())
    recipes = [config.flat(run.recipe) if run.recipe else default for run in runs]
    found = (
        Departure(key, default.get(key), [recipe.get(key) for recipe in recipes])
        for key in dict.fromkeys(key for recipe in (default, *recipes) for key in recipe)
    )
    return [each for each in found if any(value != each.default for value in each.values)]


def matters(departure: Departure) -> bool:
    """Whether a step of training depends on the key."""
    return not departure.key.startswith(NO_STEP)


def compared(runs: list[Run]) -> list[Departure]:
    """The keys in which runs differ from each other, those that steps depend on first."""
    found = [each for each in departures(runs) if any(value != each.values[0] for value in each.values)]
    found = [each for each in found if not each.key.startswith(BOOKKEEPING)]
    return [*filter(matters, found), *(each for each in found if not matters(each))]


def short(value: object, most: int = 40) -> str:
    """A recipe's value as TOML and JSON write it, cut where it is long."""
    text = value if isinstance(value, str) and value else json.dumps(value)
    if type(value) is int:
        text = f"{value:,}"
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _accuracy(measure: str, points: list[Point]) -> Headline:
    return Headline(measure, "bootstrap over problems", points, True)


def _mean(step: int, values: np.ndarray) -> Point:
    """The mean of finite values with its normal interval over steps."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Point(step, np.nan, [np.nan, np.nan])
    mean = float(finite.mean())
    error = 1.96 * float(finite.std(ddof=1)) / len(finite) ** 0.5 if len(finite) > 1 else 0.0
    return Point(step, mean, [mean - error, mean + error])
