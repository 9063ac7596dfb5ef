"""Results of benchmarks for people: a table beside the paper's rows, and a plot."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import numpy as np

from evals.grade import undecided_note
from jaxrl.files import writing
from jaxrl.report.markdown import table
from jaxrl.report.panels import COLORS
from jaxrl.results import Average, BenchmarkResult, BenchmarksResult, Grading, Measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = Path(__file__).with_name("paper.toml")
GRADINGS: dict[Grading, str] = {
    "rule": "rule only",
    "rule+model": "rule + model",
    "corrected": "corrected rules",
}
MARKERS = "os^vD<>P"  # of the paper's models, one each
DETAILS = (
    *("benchmark", "problems x N", "pass@N", "majority@N", "tokens", "truncated", "no box"),
    *("distinct 4-grams", "judge"),
)


class PaperRow(TypedDict):
    """A row of paper.toml."""

    model: str
    scores: dict[str, float]  # accuracies in percent, by benchmark
    printed_average: NotRequired[float]  # where the paper prints another one than its numbers give


def paper() -> list[PaperRow]:
    """The rows of the paper's tables."""
    return tomllib.loads(PAPER.read_text(encoding="utf-8"))["row"]


def markdown(results: BenchmarksResult, titles: Mapping[str, str]) -> str:
    """Returns a table of all gradings beside the paper's rows, and one of further measures.

    Args:
      results: what results.json has.
      titles: of the benchmarks, by name.
    """
    found, shown = results["benchmarks"], [titles[name] for name in results["benchmarks"]]
    settings = "Temperature {temperature:g}, top-p {top_p:g}, at most {max_tokens:,} tokens, seed {seed}, "
    rows, notes = _paper_rows(list(found))
    lines = [
        f"# {results['model']}",
        "",
        "Mean score of all responses in percent, with 95% bootstrap intervals over problems.",
        (settings + "protocol {protocol}.").format(**results["settings"]),
        *table(["model", *shown, "average"], [*_own_rows(results), *rows]),
        "",
        "The paper's rows are of rule + model; BroRL's are its authors' own. Averages are of the benchmarks shown.",
        *notes,
        *(
            f"{titles[name]}: {undecided_note(result['undecided'])}."
            for name, result in found.items()
            if result["undecided"]
        ),
        *table(DETAILS, [_details(titles[name], result) for name, result in found.items()]),
    ]
    return "\n".join([*lines, ""])


def _own_rows(results: BenchmarksResult) -> list[list[str]]:
    """The accuracies of the evaluated model, a row for each grading."""
    rows = []
    for grading, title in GRADINGS.items():
        measures = [result[grading] for result in results["benchmarks"].values()]
        cells = map(_cell, [*measures, results["average"][grading]])
        rows.append([f"**{results['model']}**, {title}", *cells])
    return rows


def _cell(measures: Measures | Average | None) -> str:
    if not measures:
        return "-"
    low, high = measures["ci95"]
    return f"{100 * measures['pass@1']:.2f} ({100 * low:.1f} to {100 * high:.1f})"


def _paper_rows(names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The paper's rows for these benchmarks, and notes where it prints other averages."""
    rows, notes = [], []
    for row in paper():
        there = [row["scores"][name] for name in names if name in row["scores"]]
        if not there:
            continue
        mean = f"{np.mean(there):.2f}" if len(there) == len(names) else "-"
        cells = [f"{row['scores'][name]:.2f}" if name in row["scores"] else "-" for name in names]
        rows.append([f"{row['model']} (paper)", *cells, mean])
        if "printed_average" in row and len(row["scores"]) == len(there) == len(names):
            printed = f"{row['printed_average']:.2f} as {row['model']}'s average"
            notes.append(f"The paper prints {printed}; its scores give {mean}.")
    return rows, notes


def _details(title: str, result: BenchmarkResult) -> list[str]:
    """The further measures of a benchmark, by the best grading that there is, as a row."""
    best, n, judged = result["rule+model"] or result["rule"], result["samples"], result["judge"] or {}
    return [
        title,
        f"{result['problems']} x {n}",
        f"{best['pass@k'][n]:.1%}",
        f"{best['majority@k'][n]:.1%}",
        f"{result['length_mean']:,.0f}",
        f"{result['truncated']:.1%}",
        f"{result['no_box']:.1%}",
        f"{result['distinct_4gram']:.3f}",
        ", ".join(f"{count} {label or 'none'}" for label, count in judged.items()) or "-",
    ]


def plot(results: BenchmarksResult, titles: Mapping[str, str], path: Path) -> None:
    """Draws bars of all gradings with their intervals, and the paper's models as markers.

    Args:
      results: what results.json has.
      titles: of the benchmarks, by name.
      path: the image to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and needed last of all
    from matplotlib.figure import Figure

    names = list(results["benchmarks"])
    figure = Figure(figsize=(max(5.0, 1.3 * len(names) + 2.5), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, grading in enumerate(GRADINGS):
        _bars(axes, i, grading, list(results["benchmarks"].values()))
    for row, marker in zip(paper(), MARKERS, strict=True):
        points = [(x, row["scores"][name]) for x, name in enumerate(names) if name in row["scores"]]
        if points:
            at, accuracies = zip(*points, strict=True)
            label = f"{row['model']} (paper)"
            axes.plot(at, accuracies, marker, color="#555555", markersize=4, linestyle="", label=label)
    axes.set_xticks(range(len(names)), [titles[name] for name in names], rotation=20, ha="right")
    axes.set_ylabel("mean score, percent")
    axes.set_ylim(0, 105)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    with writing(path):
        figure.savefig(path, dpi=130)


def _bars(axes: Axes, i: int, grading: Grading, results: Sequence[BenchmarkResult]) -> None:
    """Draws the accuracies of one grading, the i-th, with their intervals."""
    shown = [(x, measures) for x, result in enumerate(results) if (measures := result[grading])]
    if not shown:
        return
    accuracies = 100 * np.array([m["pass@1"] for _, m in shown])
    errors = np.abs(100 * np.array([m["ci95"] for _, m in shown]).T - accuracies)
    where = np.array([x for x, _ in shown]) + 0.26 * (i - 1)
    axes.bar(where, accuracies, 0.24, yerr=errors, capsize=3, color=COLORS[i], label=GRADINGS[grading])
