"""What variants of a recipe do to its held-out accuracy: paired over seeds and problems, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evals.matrix import BASELINE, Cell, Matrix
from evals.paired import Difference, difference, holm, seeds_needed
from jaxrl.errors import InputError
from jaxrl.report.runs import Run, ends, read_run, series, total

NOTICED = 0.02  # a difference of accuracy for which the seeds that it would take are said
SEEN = 0.05  # level of the corrected p-values
Axis = Float[np.ndarray, " K"]


class Curve(NamedTuple):
    """Held-out accuracy over a run, at each of its K evaluations of P problems."""

    steps: Axis
    tokens: Axis  # sampled before
    seconds: Axis  # in steps before
    right: Float[np.ndarray, "K P"]  # share of each problem's answers

    def at(self, axis: Axis, place: float) -> Float[np.ndarray, " P"]:
        """The shares at a place of an axis, on the line between the evaluations around it."""
        k = int(np.clip(np.searchsorted(axis, place), 1, len(axis) - 1))
        span = axis[k] - axis[k - 1]
        part = np.clip((place - axis[k - 1]) / span, 0, 1) if span else 1.0
        return (1 - part) * self.right[k - 1] + part * self.right[k]

    def reaches(self, accuracy: float, axis: Axis) -> float:
        """Where an axis has the first evaluation of at least this accuracy, on the line before it; NaN if nowhere."""
        means = self.right.mean(axis=1)
        k = next((k for k, mean in enumerate(means) if mean >= accuracy), None)
        if k is None:
            return math.nan
        if k == 0 or means[k] == means[k - 1]:
            return float(axis[k])
        part = (accuracy - means[k - 1]) / (means[k] - means[k - 1])
        return float(axis[k - 1] + part * (axis[k] - axis[k - 1]))


class Finished(NamedTuple):
    """A run of the matrix that is there."""

    cell: Cell
    run: Run
    curve: Curve


@dataclasses.dataclass(frozen=True)
class Compared:
    """A variant beside the baseline, over the seeds that both have."""

    name: str
    seeds: list[int]
    final: float  # accuracy at the end, mean over seeds
    differences: Mapping[str, Difference]  # by measure: final, tokens, seconds
    corrected: dict[str, float]  # p-values, by measure, for all variants together
    needed: int  # seeds for NOTICED
    reached: Mapping[
        float, tuple[int, float, float]
    ]  # by accuracy: runs that reach it, median tokens and seconds
    totals: Mapping[str, float]  # means over seeds
    departs: list[str] = dataclasses.field(default_factory=list)

    def verdict(self) -> str:
        """What can be said of the accuracy at the end."""
        found, n = self.differences["final"], len(self.seeds)
        if self.corrected["final"] < SEEN:
            return f"{'better' if found.mean > 0 else 'worse'} by {found.low:+.1%} to {found.high:+.1%}"
        if not math.isfinite(found.low):
            return "no verdict: one seed"
        return f"no difference seen with {n} seeds; one of {NOTICED:.0%} would take about {self.needed}"


def curve_of(run: Run) -> Curve:
    """The curve of a run.

    Raises:
      InputError: if it has no two evaluations during training, or they lack the right answers of each problem.
    """
    found = sorted({r["step"]: r for r in run.evaluations if r["name"] == "step"}.items())
    if len(found) < 2:
        raise InputError(
            f"{run.directory}: has {len(found)} evaluations during training; set eval.path and eval.every"
        )
    if missing := [step for step, result in found if "right" not in result]:
        raise InputError(
            f"{run.directory}/eval: the result after step {missing[0]} is of an older version, without each problem's "
            "right answers; remove it, and the run makes it again"
        )
    steps = np.array([step for step, _ in found], float)
    spent = {
        name: np.concatenate([[0.0], np.cumsum(np.nan_to_num(series(run.rows, key)))])
        for name, key in (("tokens", "sampler/tokens"), ("seconds", "time/step"))
    }
    right = np.array([np.array(result["right"]) / result["samples"] for _, result in found])
    tokens, seconds = (spent[name][steps.astype(int)] for name in ("tokens", "seconds"))
    return Curve(steps, tokens, seconds, right)


def read(cells: Sequence[Cell]) -> list[Finished]:
    """The runs of a matrix that are there, whoever made them."""
    found = [(cell, read_run(cell.folder)) for cell in cells if (cell.folder / "metrics.jsonl").exists()]
    return [Finished(cell, run, curve_of(run)) for cell, run in found]


def compare(matrix: Matrix, finished: Sequence[Finished]) -> list[Compared]:
    """Compares every variant with the baseline, which comes first.

    Equal tokens and seconds are those of the run that has spent least.

    Raises:
      InputError: if no run of the baseline is there.
    """
    runs = {(each.cell.variant, each.cell.seed): each for each in finished}
    base = {seed: each for (variant, seed), each in runs.items() if variant == BASELINE}
    if not base:
        raise InputError(f"{matrix.directory}: no run of the baseline is finished")
    least = {
        "tokens": min(each.curve.tokens[-1] for each in finished),
        "seconds": min(each.curve.seconds[-1] for each in finished),
    }

    def measured(each: Finished) -> dict[str, Float[np.ndarray, " P"]]:
        curve = each.curve
        return {
            "final": curve.right[-1],
            "tokens": curve.at(curve.tokens, least["tokens"]),
            "seconds": curve.at(curve.seconds, least["seconds"]),
        }

    found = []
    for name in (BASELINE, *(variant.name for variant in matrix.variants)):
        own = {seed: each for (variant, seed), each in runs.items() if variant == name and seed in base}
        if not own:
            continue
        ours, theirs = ([measured(runs[key, seed]) for seed in sorted(own)] for key in (name, BASELINE))
        pairs = {
            measure: np.array([a[measure] - b[measure] for a, b in zip(ours, theirs, strict=True)])
            for measure in ours[0]
        }
        spread = float(pairs["final"].mean(axis=1).std(ddof=1)) if len(own) > 1 else 0.0
        reached = {}
        for accuracy in matrix.accuracies:
            at = [
                (
                    each.curve.reaches(accuracy, each.curve.tokens),
                    each.curve.reaches(accuracy, each.curve.seconds),
                )
                for each in own.values()
            ]
            there = np.array([pair for pair in at if not math.isnan(pair[0])]).reshape(-1, 2)
            median = np.median(there, axis=0) if len(there) else np.full(2, np.nan)
            reached[accuracy] = (len(there), float(median[0]), float(median[1]))
        found.append(
            Compared(
                name,
                sorted(own),
                float(np.mean([a["final"].mean() for a in ours])),
                {measure: difference(values) for measure, values in pairs.items()},
                {},
                seeds_needed(spread, NOTICED) if spread else 0,
                reached,
                _totals([each.run for each in own.values()]),
            )
        )
    for measure in ("final", "tokens", "seconds"):
        others = [each for each in found if each.name != BASELINE]
        for each, p in zip(others, holm([o.differences[measure].p for o in others]), strict=True):
            each.corrected[measure] = p
    return found


def _totals(runs: Sequence[Run]) -> dict[str, float]:
    """What runs spent and what they were like in the last tenth, means over them."""
    each = [
        {
            "tokens sampled": total(run.rows, "sampler/tokens"),
            "tokens trained on": total(run.rows, "update/tokens"),
            "seconds": total(run.rows, "time/step"),
            **{
                title: ends(series(run.rows, key))[1]
                for title, key in (
                    ("entropy", "policy/entropy"),
                    ("length", "response/length_mean"),
                    ("truncated", "response/truncated_fraction"),
                )
            },
        }
        for run in runs
    ]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def done(cell: Cell, matrix: Matrix) -> bool:
    """Whether a cell's run has used its budget and was evaluated at its end."""
    return steps_left(cell, matrix) == 0


def steps_left(cell: Cell, matrix: Matrix) -> int:
    """Steps that a cell's run is short of, by what its steps have taken so far; at least one where it is unfinished."""
    if not (cell.folder / "metrics.jsonl").exists():
        return cell.recipe.run.steps
    run = read_run(cell.folder)
    steps = len(run.rows)
    if matrix.budget.steps:
        short = max(0, matrix.budget.steps - steps)
    else:
        key, most = (
            ("sampler/tokens", matrix.budget.tokens)
            if matrix.budget.tokens
            else ("time/step", matrix.budget.seconds)
        )
        spent = total(run.rows, key)
        short = (
            math.ceil(steps * max(0.0, float(most or 0) - spent) / spent) if spent else cell.recipe.run.steps
        )
    evaluated = any(result["step"] == steps and result["name"] == "step" for result in run.evaluations)
    return short or int(not evaluated)
