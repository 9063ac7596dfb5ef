"""Curves and a summary of runs, as PNG and Markdown, and one HTML page of it all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl.files import write_atomically
from jaxrl.report import html
from jaxrl.report.runs import PHASES, Run, budget, ends, number, read_run, scores, series, smooth

# Okabe and Ito's palette, readable with any color vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PANELS = {
    "reward": ("reward/mean", "mean reward (+1 right, -1 wrong)"),
    "entropy": ("policy/entropy", "policy entropy (nats a token)"),
    "length": ("response/length_mean", "response length (tokens)"),
    "clip_fraction": ("update/clip_fraction", "clipped share of tokens"),
    "grad_norm": ("update/grad_norm", "gradient norm"),
}
SUMMARY = (
    "reward/accuracy",
    "reward/mean",
    "policy/entropy",
    "response/length_mean",
    "response/truncated_fraction",
    "update/grad_norm",
    "update/clip_fraction",
    "sampler/logprob_diff_max",
    "perf/tokens_per_second",
)


def report(directories: list[Path], out: Path | None = None, megabytes: int = 100) -> list[Path]:
    """Writes report.html, training.png (an overview), a PNG a panel, accuracy.png and benchmarks.png, and summary.md.

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
    out.mkdir(parents=True, exist_ok=True)
    panels: dict[str, Callable[[Axes], None]] = {
        name: lambda axes, key=key, label=label: _curve(axes, runs, key, label)  # type: ignore[misc]
        for name, (key, label) in PANELS.items()
    }
    panels["time"] = lambda axes: _time_split(axes, runs[0])
    written = [_save(out / f"{name}.png", [draw], (5.2, 3.4)) for name, draw in panels.items()]
    written.insert(0, _save(out / "training.png", list(panels.values()), (13.5, 7.0)))
    if any(run.evaluations for run in runs):
        written.append(_save(out / "accuracy.png", [lambda axes: _accuracy(axes, runs)], (5.2, 3.4)))
    names = list(dict.fromkeys(name for run in runs for result in run.benchmarks for name in scores(result)))
    if names:
        each: list[Callable[[Axes], None]] = [partial(_benchmark, runs=runs, name=name) for name in names]
        size = (4.5 * min(3, len(names)), 3.4 * -(-len(names) // 3))
        written.append(_save(out / "benchmarks.png", each, size))
    write_atomically(out / "summary.md", "\n".join(_summary(run) for run in runs))
    page = html.render(runs, _colors(len(runs)), PANELS, SUMMARY, megabytes)
    write_atomically(out / "report.html", page)
    return [*written, out / "summary.md", out / "report.html"]


def _curve(axes: Axes, runs: list[Run], key: str, label: str) -> None:
    for run, color in zip(runs, _colors(len(runs)), strict=True):
        steps, values = series(run.rows, "step") + 1, series(run.rows, key)
        if not np.isfinite(values).any():
            continue
        many = len(values) > 20
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=color, alpha=0.3 if many else 1, linewidth=1, marker=marker,
                  label=None if many else run.name)  # fmt: skip
        if many:
            axes.plot(steps, smooth(values), color=color, linewidth=2, label=run.name)
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    if len(runs) > 1 and axes.lines:
        axes.legend(frameon=False, fontsize=8)


def _time_split(axes: Axes, run: Run) -> None:
    rows = [
        row for row in run.rows if "time/first_step" not in row
    ] or run.rows  # compilation dwarfs all that follows
    seconds = [np.nan_to_num(series(rows, f"time/{phase}")) for phase in PHASES]
    axes.stackplot(series(rows, "step") + 1, seconds, labels=[p.replace("_", " ") for p in PHASES],
                   colors=COLORS, alpha=0.85, linewidth=0)  # fmt: skip
    axes.set_ylabel("seconds a step")
    axes.set_xlabel(f"step of {run.name}, after the first")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axes.set_ylim(0, 1.3 * max(np.sum(seconds, axis=0).max(), 1e-9))


def _accuracy(axes: Axes, runs: list[Run]) -> None:
    """Held-out accuracy with 95% intervals: bars where there are two, a curve over steps where there are more."""
    shown = [(run, color) for run, color in zip(runs, _colors(len(runs)), strict=True) if run.evaluations]
    for i, (run, color) in enumerate(shown):
        results = run.evaluations
        values = np.array([result["accuracy"] for result in results])
        errors = np.abs(np.array([result["ci95"] for result in results]).T - values)
        if len(results) > 2:
            axes.errorbar(
                [r["step"] for r in results],
                values,
                errors,
                color=color,
                marker="o",
                capsize=3,
                label=run.name,
            )
            axes.set_xlabel("step")
            continue
        width = 0.7 / len(shown)
        at = np.arange(len(results)) + (i - (len(shown) - 1) / 2) * width
        axes.bar(at, values, width, yerr=errors, color=color, capsize=4, label=run.name)
        for x, value, top in zip(at, values, values + errors[1], strict=True):
            axes.annotate(
                f"{value:.1%}", (x, top), ha="center", va="bottom", xytext=(0, 3), textcoords="offset points"
            )
        axes.set_xticks(range(len(results)), [f"{r['name']} (step {r['step']})" for r in results])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("held-out accuracy, 95% interval")
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=8)


def _benchmark(axes: Axes, runs: list[Run], name: str) -> None:
    """Mean score over steps with its 95% interval (Figure 1 of the paper)."""
    for run, color in zip(runs, _colors(len(runs)), strict=True):
        points = [(r["step"], found[name]) for r in run.benchmarks if name in (found := scores(r))]
        if points:
            steps = [step for step, _ in points]
            values = [100 * score["pass@1"] for _, score in points]
            low, high = 100 * np.array([score["ci95"] for _, score in points]).T
            axes.plot(steps, values, color=color, marker="o", markersize=3, label=run.name)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.set_title(points[0][1].get("title", name), fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("mean score, percent")
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)


def _save(path: Path, draws: list[Callable[[Axes], None]], size: tuple[float, float]) -> Path:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    columns = min(3, len(draws))
    grid = figure.subplots(-(-len(draws) // columns), columns, squeeze=False)
    for axes in grid.flat[len(draws) :]:
        axes.set_visible(False)
    for axes, draw in zip(grid.flat, draws, strict=False):
        draw(axes)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _summary(run: Run) -> str:
    rows, tenth = run.rows, max(1, len(run.rows) // 10)
    lines = [f"## {run.name}", "", f"{len(rows)} steps. First and last are means over {tenth} of them.", ""]
    lines += ["| metric | first | last |", "|---|---|---|"]
    for key in SUMMARY:
        values = series(rows, key)
        if np.isfinite(values).any():
            lines.append("| {} | {} | {} |".format(key, *map(number, ends(values))))
    if run.evaluations:
        lines += [
            "",
            "| held-out | step | accuracy | 95% interval | problems x samples |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {e['name']} | {e['step']} | {e['accuracy']:.3f} | {e['ci95'][0]:.3f} to {e['ci95'][1]:.3f} "
            f"| {e['problems']} x {e['samples']} |"
            for e in run.evaluations
        ]
    if run.benchmarks:
        first, last = scores(run.benchmarks[0]), scores(run.benchmarks[-1])
        lines += [
            "",
            f"| benchmark, rule only | step {run.benchmarks[0]['step']} | step {run.benchmarks[-1]['step']} |",
        ]
        lines += ["|---|---|---|"]
        lines += [
            f"| {score.get('title', name)} | {_percent(first.get(name))} | {_percent(score)} |"
            for name, score in last.items()
        ]
    lines += ["", "| phase | seconds | share |", "|---|---|---|"]
    total = np.nansum(series(rows, "time/step"))
    for phase in PHASES:
        seconds = np.nansum(series(rows, f"time/{phase}"))
        lines.append(f"| {phase} | {seconds:,.1f} | {seconds / total if total else 0:.1%} |")
    lines += ["", "| budget | used |", "|---|---|"]
    lines += [f"| {name} | {number(value)} |" for name, value in budget(run).items() if "seconds" not in name]
    return "\n".join([*lines, ""])


def _percent(score: dict[str, Any] | None) -> str:
    if not score:
        return "-"
    low, high = score["ci95"]
    return f"{score['pass@1']:.1%} ({low:.1%} to {high:.1%})"


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]
