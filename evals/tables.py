"""Numbers of graded responses, and how they are shown: JSON, a table beside the paper's rows, a plot."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.benchmarks import Benchmark
from evals.generate import Response
from evals.statistics import bootstrap, confidence, distinct, interval, majority_at, pass_at
from jaxrl.results import Average, Measures, Responses
from jaxrl.rewards.latex_equality import last_box, spelling

PAPER = Path(__file__).with_name("paper.toml")
STAGES = {"rule": "rule only", "rule+model": "rule + model"}


def describe(groups: Sequence[Sequence[Response]]) -> Responses:
    """What does not depend on the grading: lengths (tokens), and shares of responses."""
    flat = [response for group in groups for response in group]
    return {
        "problems": len(groups),
        "samples": len(groups[0]),
        "length_mean": float(np.mean([r.tokens for r in flat])),
        "truncated": float(np.mean([r.finish_reason == "length" for r in flat])),
        "no_box": float(np.mean([last_box(r.response) is None for r in flat])),
        "distinct_4gram": float(np.mean([distinct([r.response for r in group]) for group in groups])),
    }


def measure(right: np.ndarray, groups: Sequence[Sequence[Response]]) -> Measures:
    """Of marks [P, G]: pass@1 with its 95% bootstrap interval over problems, pass@k and majority@k."""
    samples = right.shape[1]
    sizes = sorted({2**i for i in range(samples.bit_length())} | {samples})
    votes = [[vote(r.response) for r in group] for group in groups]
    return {
        "pass@1": float(right.mean()),
        "ci95": confidence(right.mean(axis=1)),
        "pass@k": {
            k: float(np.mean([pass_at(samples, int(c), k) for c in right.sum(axis=1)])) for k in sizes
        },
        "majority@k": {
            k: float(np.mean([majority_at(v, list(r), k) for v, r in zip(votes, right, strict=True)]))
            for k in sizes
        },
    }


def vote(response: str) -> str | None:
    """What a response votes for: its box in one spelling."""
    box = last_box(response)
    return None if box is None else spelling(box)


def released(right: np.ndarray, groups: Sequence[Sequence[Response]]) -> dict[str, float]:
    """The figures of JustRL's released script, under its names; its length is 0 whatever the responses."""
    return {
        "mean_score": float(right.mean()),
        "best_score": float(right.any(axis=1).mean()),
        "solve_none": int((~right.any(axis=1)).sum()),
        "solve_all": int(right.all(axis=1).sum()),
        "distinct_4gram": float(np.mean([distinct([r.response for r in group]) for group in groups])),
        "avg_output_length": 0,
        "format_error_rollouts": sum("boxed" not in r.response for group in groups for r in group),
    }


def average(per_problem: dict[str, np.ndarray]) -> Average:
    """Mean of the benchmarks' scores, each counting the same, and its interval: problems drawn within each."""
    means = [bootstrap(values, seed) for seed, values in enumerate(per_problem.values())]
    score = float(np.mean([values.mean() for values in per_problem.values()]))
    return {"pass@1": score, "ci95": interval(np.mean(means, axis=0))}


def paper() -> list[dict[str, Any]]:
    return tomllib.loads(PAPER.read_text())["row"]


def markdown(results: dict[str, Any], benchmarks: dict[str, Benchmark]) -> str:
    """Both gradings beside the paper's rows, and then what else was counted."""
    found, names = results["benchmarks"], list(results["benchmarks"])
    titles = [benchmarks[name].title or name for name in names]
    lines = [
        f"# {results['model']}", "",
        "Mean score of all responses in percent, with 95% bootstrap intervals over problems.",
        "Temperature {temperature:g}, top-p {top_p:g}, at most {max_tokens:,} tokens, seed {seed}, protocol {protocol}."
        .format(**results["settings"]), "",
        f"| model | {' | '.join(titles)} | average |", "|---" * (len(names) + 2) + "|",
    ]  # fmt: skip
    for stage, title in STAGES.items():
        scores = [found[name][stage] for name in names] + [results["average"][stage]]
        lines.append(f"| **{results['model']}**, {title} | " + " | ".join(map(_score, scores)) + " |")
    notes = []
    for row in paper():
        scores = [row["scores"].get(name) for name in names]
        if not any(scores):
            continue
        cells = [f"{score:.2f}" if score else "-" for score in scores]
        mean = f"{np.mean(scores):.2f}" if all(scores) else "-"
        lines.append(f"| {row['model']} (paper) | {' | '.join(cells)} | {mean} |")
        if "printed_average" in row and len(row["scores"]) == sum(map(bool, scores)) == len(names):
            notes.append(
                f"The paper prints {row['printed_average']:.2f} as {row['model']}'s average; its scores give {mean}."
            )
    lines += [
        "",
        "The paper's rows are of rule + model; BroRL's are its authors' own. Averages are of the benchmarks shown.",
        *notes,
        "",
    ]
    lines += [
        "| benchmark | problems x N | pass@N | majority@N | tokens | truncated | no box | distinct 4-grams | judge |",
        "|---" * 9 + "|",
    ]
    for name, title in zip(names, titles, strict=True):
        b = found[name]
        best, judged = b["rule+model"] or b["rule"], b["judge"]
        n = b["samples"]
        lines.append(
            f"| {title} | {b['problems']} x {n} | {best['pass@k'][n]:.1%} | {best['majority@k'][n]:.1%} | "
            f"{b['length_mean']:,.0f} | {b['truncated']:.1%} | {b['no_box']:.1%} | {b['distinct_4gram']:.3f} | "
            + (", ".join(f"{count} {label or 'none'}" for label, count in judged.items()) if judged else "-")
            + " |"
        )
    return "\n".join([*lines, ""])


def plot(results: dict[str, Any], benchmarks: dict[str, Benchmark], path: Path) -> None:
    """Bars of both gradings with their intervals, and the paper's models as marks."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from jaxrl.report.figures import COLORS

    found, names = results["benchmarks"], list(results["benchmarks"])
    figure = Figure(figsize=(max(5.0, 1.3 * len(names) + 2.5), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes, at = figure.subplots(), np.arange(len(names))
    for i, (stage, title) in enumerate(STAGES.items()):
        shown = [(x, found[name][stage]) for x, name in zip(at, names, strict=True) if found[name][stage]]
        if shown:
            scores = 100 * np.array([s["pass@1"] for _, s in shown])
            errors = np.abs(100 * np.array([s["ci95"] for _, s in shown]).T - scores)
            where = np.array([x for x, _ in shown]) + 0.36 * (i - 0.5)
            axes.bar(where, scores, 0.34, yerr=errors, capsize=3, color=COLORS[i], label=title)
    for row, marker in zip(paper(), "os^vD<>P", strict=True):
        points = [
            (x, row["scores"][name]) for x, name in zip(at, names, strict=True) if name in row["scores"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color="#555555", markersize=4, linestyle="",
                      label=f"{row['model']} (paper)")  # fmt: skip
    axes.set_xticks(at, [benchmarks[name].title or name for name in names], rotation=20, ha="right")
    axes.set_ylabel("mean score, percent")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def _score(measured: dict[str, Any] | None) -> str:
    if not measured:
        return "-"
    low, high = measured["ci95"]
    return f"{100 * measured['pass@1']:.2f} ({100 * low:.1f} to {100 * high:.1f})"
