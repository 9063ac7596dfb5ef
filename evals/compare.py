"""What variants of a recipe do to its held-out accuracy: paired over seeds and problems, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Float

from evals.matrix import BASELINE, Budget, Cell, Matrix, departures
from evals.paired import Difference, difference, holm, p_values, seeds_needed
from jaxrl.errors import InputError
from jaxrl.report.runs import Run, ends, read_run, series, total
from jaxrl.results import HeldOutResult, TaskResult, TrainingResult

NOTICED = 0.02  # a difference of accuracy for which the seeds that it would take are said
SEEN = 0.05  # level of the corrected p-values
SPENT = ("tokens", "seconds")  # what a budget of steps does not bound
# Where accuracies are compared: with the budget used up, and at equal amounts
MEASURES = ("budget", *SPENT)
Axis = Float[np.ndarray, " K"]


class Curve(NamedTuple):
    """Held-out accuracy over a run, at each of its K evaluations of P problems."""

    steps: Axis
    tokens: Axis  # sampled before
    seconds: Axis  # of a device, in steps before
    scores: Float[np.ndarray, "K P"]  # see `_scores`

    def at(self, axis: Axis, place: float) -> Float[np.ndarray, " P"]:
        """The scores at a place of an axis, on the line between the evaluations around it."""
        k = int(np.clip(np.searchsorted(axis, place), 1, len(axis) - 1))
        span = axis[k] - axis[k - 1]
        part = np.clip((place - axis[k - 1]) / span, 0, 1) if span else 1.0
        return (1 - part) * self.scores[k - 1] + part * self.scores[k]

    def reaches(self, accuracy: float, axis: Axis) -> float:
        """Where an axis has the first evaluation of at least this accuracy, on the line before it; NaN if nowhere."""
        means = self.scores.mean(axis=1)
        k = next((k for k, mean in enumerate(means) if mean >= accuracy), None)
        if k is None:
            return math.nan
        if k == 0:
            return float(axis[0])
        part = (accuracy - means[k - 1]) / (means[k] - means[k - 1])
        return float(axis[k - 1] + part * (axis[k] - axis[k - 1]))


class Finished(NamedTuple):
    """A run of the matrix that has used its budget."""

    cell: Cell
    run: Run
    curve: Curve


@dataclasses.dataclass(frozen=True)
class Compared:
    """A variant beside the baseline, over the seeds that both have."""

    name: str
    seeds: list[int]
    accuracy: float  # with the budget used up, mean over seeds
    differences: Mapping[str, Difference]  # by measure
    corrected: Mapping[str, float]  # p-values, by measure, for all variants together; none of the baseline
    needed: int  # seeds for NOTICED; 0 where it cannot be told
    reached: Mapping[float, tuple[int, float, float]]  # by accuracy: runs that do, median tokens and seconds
    totals: Mapping[str, float]  # means over seeds

    def verdict(self) -> str:
        """What can be said of the accuracy with the budget used up."""
        found, n = self.differences["budget"], len(self.seeds)
        if not math.isfinite(found.low):
            return "no verdict: one seed"
        apart = found.low > 0 or found.high < 0
        if apart and self.corrected["budget"] < SEEN:
            return "better" if found.mean > 0 else "worse"
        if apart:
            return "no verdict: too many comparisons for this interval"
        return f"no difference seen with {n} seeds" + (
            f"; one of {100 * NOTICED:g} points would take about {self.needed}" if self.needed else ""
        )


def spent(run: Run, budget: Budget) -> float:
    """What a run has used of a budget, in its unit."""
    unit, _ = budget.given
    return float(len(run.rows)) if unit == "steps" else float(_taken(run, unit).sum())


def _taken(run: Run, unit: str) -> Axis:
    """What each step took: tokens sampled, or seconds of one of the trainer's devices."""
    if unit == "tokens":
        return np.nan_to_num(series(run.rows, "sampler/tokens"))
    devices = np.nan_to_num(series(run.rows, "perf/devices"), nan=1.0)  # older runs do not say
    return np.nan_to_num(series(run.rows, "time/step")) * devices


def steps_wanted(cell: Cell, budget: Budget, run: Run | None) -> int | None:
    """What run.steps a run is to be started with, by what its steps have taken so far; None if it is finished."""
    if run is None:
        return cell.recipe.run.steps
    done, used, most = len(run.rows), spent(run, budget), budget.given[1]
    if used < most:
        return done + max(1, math.ceil(done * (most - used) / used)) if used else 2 * done
    evaluated = any(result["step"] == done for result in _evaluations(run))
    return None if evaluated else done


def find(cells: Sequence[Cell], budget: Budget) -> list[tuple[Cell, Run | None]]:
    """The runs that are there, whoever made them.

    Raises:
      InputError: if one is of another recipe than its cell.
    """
    found: list[tuple[Cell, Run | None]] = []
    for cell in cells:
        run = read_run(cell.folder, begun=False) if (cell.folder / "metrics.jsonl").exists() else None
        if run and not run.rows:
            run = None
        if run and run.recipe and (other := departures(cell, run.recipe)):
            raise InputError(
                f"{cell.folder}: is of another recipe ({'; '.join(other)}); rename variant '{cell.variant}', or move "
                "the run away"
            )
        found.append((cell, run and _within(run, budget)))
    return found


def _within(run: Run, budget: Budget) -> Run:
    """The part of a run that a budget of steps has."""
    if not budget.steps:
        return run
    most = budget.steps
    return dataclasses.replace(
        run,
        rows=run.rows[:most],
        evaluations=[result for result in run.evaluations if result["step"] <= most],
        benchmarks=[result for result in run.benchmarks if result["step"] <= most],
    )


def _evaluations(run: Run) -> Sequence[HeldOutResult | TrainingResult]:
    """Those during training, by step: on held-out problems, or on benchmarks where there are none."""
    return [result for result in run.evaluations if result["name"] == "step"] or run.benchmarks


def _scores(result: HeldOutResult | TrainingResult) -> list[float]:
    """A number for each problem, of which the accuracy is the mean; of benchmarks, each of which counts the same."""
    tasks = cast(TrainingResult, result).get("benchmarks")
    sets: Sequence[HeldOutResult | TaskResult]
    sets = list(tasks.values()) if tasks else [cast(HeldOutResult, result)]
    shares = [[right / each["samples"] for right in each["right"]] for each in sets]
    count = sum(map(len, shares))
    return [share * count / len(sets) / len(own) for own in shares for share in own]


def finished(runs: Sequence[tuple[Cell, Run | None]], budget: Budget) -> list[Finished]:
    """Those that have used their budget.

    Raises:
      InputError: if one has no two evaluations, or lacks the right answers of each problem.
    """
    there = [(cell, run) for cell, run in runs if run and steps_wanted(cell, budget, run) is None]
    return [Finished(cell, run, _curve(run)) for cell, run in there]


def _curve(run: Run) -> Curve:
    found = _evaluations(run)
    if len(found) < 2:
        raise InputError(
            f"{run.directory}/eval: has {len(found)} evaluations during training, and a curve takes two"
        )
    try:
        scores = np.array([_scores(result) for result in found])
    except KeyError:
        raise InputError(
            f"{run.directory}/eval: has results of an older version, without each problem's right answers; run "
            "the matrix in another directory"
        ) from None
    steps = np.array([result["step"] for result in found])
    tokens, seconds = (np.concatenate([[0.0], np.cumsum(_taken(run, unit))])[steps] for unit in SPENT)
    return Curve(steps.astype(float), tokens, seconds, scores)


def compare(matrix: Matrix, runs: Sequence[Finished]) -> list[Compared]:
    """Compares every variant with the baseline, which comes first.

    Equal tokens and seconds are those of the run that has spent least.

    Raises:
      InputError: if no run of the baseline is finished, or runs have other held-out problems.
    """
    by_cell = {(each.cell.variant, each.cell.seed): each for each in runs}
    base = {seed for variant, seed in by_cell if variant == BASELINE}
    if not base:
        raise InputError(f"{matrix.directory}: no run of the baseline is finished")
    if len({each.curve.scores.shape[1] for each in runs}) > 1:
        raise InputError(f"{matrix.directory}: runs have different numbers of held-out problems")
    unit, most = matrix.budget.given
    least = {name: min(getattr(each.curve, name)[-1] for each in runs) for name in SPENT}

    def measured(each: Finished) -> dict[str, Float[np.ndarray, " P"]]:
        curve = each.curve
        places = {
            "budget": (unit, most),
            "tokens": ("tokens", least["tokens"]),
            "seconds": ("seconds", least["seconds"]),
        }
        return {measure: curve.at(getattr(curve, axis), place) for measure, (axis, place) in places.items()}

    scores: dict[str, dict[int, dict[str, Float[np.ndarray, " P"]]]] = {}
    for name in (BASELINE, *(variant.name for variant in matrix.variants)):
        own = {seed: measured(each) for (variant, seed), each in by_cell.items() if variant == name}
        if shared := {seed: own[seed] for seed in sorted(own) if seed in base}:
            scores[name] = shared
    corrected: dict[str, dict[str, float]] = {name: {} for name in scores}
    for measure in MEASURES:
        at = {n: {seed: found[measure] for seed, found in each.items()} for n, each in scores.items()}
        p = p_values(at, BASELINE)
        for name, value in zip(p, holm([*p.values()]), strict=True):
            corrected[name][measure] = value
    found = []
    for name, ours in scores.items():
        pairs = {m: np.array([ours[s][m] - scores[BASELINE][s][m] for s in ours]) for m in MEASURES}
        spread = float(pairs["budget"].mean(axis=1).std(ddof=1)) if len(ours) > 1 else 0.0
        runs_of = [by_cell[name, seed] for seed in ours]
        found.append(
            Compared(
                name,
                [*ours],
                float(np.mean([each["budget"] for each in ours.values()])),
                {measure: difference(values) for measure, values in pairs.items()},
                corrected[name],
                seeds_needed(spread, NOTICED) if spread else 0,
                {accuracy: _reached(runs_of, accuracy) for accuracy in matrix.accuracies},
                _totals([each.run for each in runs_of]),
            )
        )
    return found


def _reached(runs: Sequence[Finished], accuracy: float) -> tuple[int, float, float]:
    """How many runs reach an accuracy, and the medians over these of the tokens and seconds it takes."""
    at = [[each.curve.reaches(accuracy, getattr(each.curve, axis)) for axis in SPENT] for each in runs]
    there = [pair for pair in at if not math.isnan(pair[0])]
    tokens, seconds = np.median(there, axis=0) if there else (math.nan, math.nan)
    return len(there), float(tokens), float(seconds)


def _totals(runs: Sequence[Run]) -> dict[str, float]:
    """What runs spent and what they were like in the last tenth, means over them."""
    each = [
        {
            "tokens sampled": float(_taken(run, "tokens").sum()),
            "tokens trained on": total(run.rows, "update/tokens"),
            "device seconds": float(_taken(run, "seconds").sum()),
            "entropy": ends(series(run.rows, "policy/entropy"))[1],
            "length": ends(series(run.rows, "response/length_mean"))[1],
            "truncated": ends(series(run.rows, "response/truncated_fraction"))[1],
        }
        for run in runs
    ]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}
