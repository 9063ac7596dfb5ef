"""Curves and a summary of runs, as PNG and Markdown, and one HTML page of it all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl.files import replacing, write_atomically, writing
from jaxrl.report import card, html
from jaxrl.report.markdown import table
from jaxrl.report.panels import COLORS, OUTCOME_COLORS, PANELS, SUMMARY, colors_of
from jaxrl.report.runs import (
    Accuracy,
    Run,
    accuracies,
    budget,
    ends,
    number,
    prompt_counts,
    read_run,
    series,
    smooth,
    switches,
    total,
)
from jaxrl.results import HeldOutResult, TrainingResult
from jaxrl.telemetry.history import OUTCOMES, Totals, hardest, last_outcomes
from jaxrl.telemetry.timer import PHASES
from jaxrl.telemetry.trackers import MetricsRow

Draw = Callable[[Axes], None]

PANEL, OVERVIEW, BENCHMARK = (5.2, 3.4), (4.5, 3.5), (4.5, 3.4)  # inches of a panel, width and height
COLUMNS = 3  # of panels in one figure
MANY = 20  # steps from which on a curve is smoothed, as in the page


def report(directories: list[Path], out: Path | None = None, megabytes: int = 30) -> list[Path]:
    """Writes report.html, training.png (an overview), a PNG a panel, accuracy.png and benchmarks.png, and summary.md.

    summary.png is the headline and a curve, for a slide or a post. prompts.png is a panel where a run has a history of
    its prompts.

    Args:
      directories: run folders; several are overlaid.
      out: where to write; report/ in the first run where None.
      megabytes: of rollout files to take into the page.

    Returns:
      the files written.

    Raises:
      InputError: if a folder has no metrics.
    """
    runs = [read_run(directory) for directory in directories]
    out = out or directories[0] / "report"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    panels: dict[str, Draw] = {
        name: partial(_curve, runs=runs, key=key, label=label) for name, (key, label) in PANELS.items()
    }
    panels["time"] = partial(_time_split, run=runs[0])
    with_history = next((run for run in runs if run.history), None)
    if with_history:
        panels["prompts"] = partial(_outcomes, run=with_history)
    written = [save(out / "training.png", list(panels.values()), _grid_size(OVERVIEW, len(panels)))]
    written += [save(out / f"{name}.png", [draw], PANEL) for name, draw in panels.items()]
    if any(run.evaluations for run in runs):
        written.append(save(out / "accuracy.png", [partial(_accuracy, runs=runs)], PANEL))
    names = dict.fromkeys(name for run in runs for result in run.benchmarks for name in accuracies(result))
    if names:
        curves = [partial(_benchmark, runs=runs, name=name) for name in names]
        written.append(save(out / "benchmarks.png", curves, _grid_size(BENCHMARK, len(names))))
    summary, page = out / "summary.md", out / "report.html"
    write_atomically(summary, "\n".join(_summary(run) for run in runs))
    image = card.png(runs)
    with replacing(out / "summary.png") as file:
        file.write(image)
    write_atomically(page, html.render(runs, megabytes, image))
    return [*written, out / "summary.png", summary, page]


def _curve(axes: Axes, runs: list[Run], key: str, label: str) -> None:
    for run, color in zip(runs, colors_of(len(runs)), strict=True):
        steps, values = series(run.rows, "step") + 1, series(run.rows, key)
        if not np.isfinite(values).any():
            continue
        if len(values) > MANY:
            axes.plot(steps, values, color=color, linewidth=1, alpha=0.3)
            axes.plot(steps, smooth(values), color=color, linewidth=2, label=run.name)
        else:
            marker = "o" if len(values) == 1 else None
            axes.plot(steps, values, color=color, linewidth=1, marker=marker, label=run.name)
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    for stage in switches(runs[0]):
        axes.axvline(stage.first + 0.5, color="#888", linewidth=1, linestyle=":")
    if len(runs) > 1 and axes.lines:
        axes.legend(frameon=False, fontsize=8)


def _time_split(axes: Axes, run: Run) -> None:
    # a first step compiles, which dwarfs all that follows
    rows = [row for row in run.rows if "time/first_step" not in row] or run.rows
    steps, labels = series(rows, "step") + 1, [phase.replace("_", " ") for phase in PHASES]
    seconds = [np.nan_to_num(series(rows, f"time/{phase}")) for phase in PHASES]
    axes.stackplot(steps, seconds, labels=labels, colors=COLORS, alpha=0.85, linewidth=0)
    axes.set_ylabel("seconds a step")
    axes.set_xlabel(f"step of {run.name}, after the first")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axes.set_ylim(0, 1.3 * max(np.sum(seconds, axis=0).max(), 1e-9))


def _outcomes(axes: Axes, run: Run) -> None:
    """Shares of the prompts sampled so far by their last answers, one above the other."""
    steps = [row["step"] + 1 for row in run.history]
    shares = last_outcomes(run.history).T
    axes.stackplot(steps, shares, labels=OUTCOMES, colors=OUTCOME_COLORS, alpha=0.85, linewidth=0)
    axes.set_ylabel("share of prompts, when last shown")
    axes.set_xlabel(f"step of {run.name}")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axes.set_ylim(0, 1.15)


def _accuracy(axes: Axes, runs: list[Run]) -> None:
    """Held-out accuracy with 95% intervals: bars where there are two, a curve over steps where there are more."""
    shown = [(run, color) for run, color in zip(runs, colors_of(len(runs)), strict=True) if run.evaluations]
    width = 0.7 / len(shown)
    for i, (run, color) in enumerate(shown):
        results = run.evaluations
        values = np.array([result["accuracy"] for result in results])
        errors = np.abs(np.array([result["ci95"] for result in results]).T - values)
        if len(results) > 2:
            steps = [result["step"] for result in results]
            axes.errorbar(steps, values, errors, color=color, marker="o", capsize=3, label=run.name)
            axes.set_xlabel("step")
        else:
            at = np.arange(len(results)) + (i - (len(shown) - 1) / 2) * width
            axes.bar(at, values, width, yerr=errors, color=color, capsize=4, label=run.name)
            _label_bars(axes, at, values, values + errors[1])
            axes.set_xticks(range(len(results)), [f"{r['name']} (step {r['step']})" for r in results])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("held-out accuracy, 95% interval")
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=8)


def _label_bars(axes: Axes, at: np.ndarray, values: np.ndarray, tops: np.ndarray) -> None:
    for x, value, top in zip(at, values, tops, strict=True):
        label = f"{value:.1%}"
        axes.annotate(label, (x, top), (0, 3), textcoords="offset points", ha="center", va="bottom")


def _benchmark(axes: Axes, runs: list[Run], name: str) -> None:
    """Accuracy over steps with its 95% interval (Figure 1 of the paper)."""
    for run, color in zip(runs, colors_of(len(runs)), strict=True):
        points = [(r["step"], found[name]) for r in run.benchmarks if name in (found := accuracies(r))]
        if points:
            steps = [step for step, _ in points]
            values = [100 * accuracy["pass@1"] for _, accuracy in points]
            low, high = 100 * np.array([accuracy["ci95"] for _, accuracy in points]).T
            axes.plot(steps, values, color=color, marker="o", markersize=3, label=run.name)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set_title(points[0][1]["title"], fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("mean score, percent")
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)


def _grid_size(panel: tuple[float, float], count: int) -> tuple[float, float]:
    """Inches of a figure of so many panels."""
    width, height = panel
    return width * min(COLUMNS, count), height * math.ceil(count / COLUMNS)


def save(path: Path, draws: Sequence[Draw], size: tuple[float, float], columns: int = COLUMNS) -> Path:
    """Writes a figure of panels.

    Args:
      path: the image to write.
      draws: draws each panel on its axes.
      size: in inches, width and height.
      columns: panels side by side at most.

    Returns:
      the path.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    columns = min(columns, len(draws))
    grid = figure.subplots(math.ceil(len(draws) / columns), columns, squeeze=False)
    for axes in grid.flat[len(draws) :]:
        axes.set_visible(False)
    for axes, draw in zip(grid.flat, draws, strict=False):
        draw(axes)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with writing(path):
        figure.savefig(path, dpi=130)
    return path


def _summary(run: Run) -> str:
    rows, tenth = run.rows, max(1, len(run.rows) // 10)
    lines = [f"## {run.name}", "", f"{len(rows)} steps. First and last are means over {tenth} of them."]
    lines += table(("metric", "first", "last"), _means(rows))
    if run.evaluations:
        columns = ["held-out", "step", "accuracy", "95% interval", "problems x samples"]
        lines += table(columns, map(_held_out, run.evaluations))
    if run.benchmarks:
        first, last = run.benchmarks[0], run.benchmarks[-1]
        columns = ["benchmark, rule only", f"step {first['step']}", f"step {last['step']}"]
        lines += table(columns, _benchmarks(first, last))
    lines += table(("phase", "seconds", "share"), _phases(rows))
    used = [(name, number(value)) for name, value in budget(run).items() if "seconds" not in name]
    lines += table(("budget", "used"), used)
    if run.prompts:
        counts = ", ".join(f"{value:,} {name}" for name, value in prompt_counts(run).items())
        lines += ["", f"{counts}. The hardest:"]
        lines += table(("prompt", "answers", "right", "last step"), map(_prompt, hardest(run.prompts)))
    return "\n".join([*lines, ""])


def _means(rows: list[MetricsRow]) -> list[tuple[str, str, str]]:
    means = {key: ends(values) for key in SUMMARY if np.isfinite(values := series(rows, key)).any()}
    return [(key, number(first), number(last)) for key, (first, last) in means.items()]


def _held_out(result: HeldOutResult) -> tuple[str, ...]:
    low, high = result["ci95"]
    interval, size = f"{low:.3f} to {high:.3f}", f"{result['problems']} x {result['samples']}"
    return result["name"], str(result["step"]), f"{result['accuracy']:.3f}", interval, size


def _benchmarks(first: TrainingResult, last: TrainingResult) -> list[tuple[str, str, str]]:
    before = accuracies(first)
    return [(a["title"], _percent(before.get(name)), _percent(a)) for name, a in accuracies(last).items()]


def _phases(rows: list[MetricsRow]) -> list[tuple[str, str, str]]:
    seconds, steps = {phase: total(rows, f"time/{phase}") for phase in PHASES}, total(rows, "time/step")
    return [(name, f"{s:,.1f}", f"{s / steps if steps else 0:.1%}") for name, s in seconds.items()]


def _prompt(prompt: Totals) -> tuple[str, ...]:
    name = " ".join(prompt.id.split()).replace("|", "\\|")  # the file's own ids, in a cell of a table
    return name, f"{prompt.shown:,}", f"{prompt.right:,}", str(prompt.last_step + 1)


def _percent(accuracy: Accuracy | None) -> str:
    if not accuracy:
        return "-"
    low, high = accuracy["ci95"]
    return f"{accuracy['pass@1']:.1%} ({low:.1%} to {high:.1%})"
