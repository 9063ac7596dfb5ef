"""Curves and a summary of runs, as PNG and Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl.errors import InputError
from jaxrl.telemetry import read_metrics, write_atomically

# Okabe and Ito's palette, readable with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PANELS = {
    "reward": ("reward/mean", "mean reward (+1 right, -1 wrong)"),
    "entropy": ("policy/entropy", "policy entropy (nats a token)"),
    "length": ("response/length_mean", "response length (tokens)"),
    "clip_fraction": ("update/clip_fraction", "clipped share of tokens"),
    "grad_norm": ("update/grad_norm", "gradient norm"),
}
PHASES = ("sample", "score", "old_logprobs", "update", "publish")
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

Run = tuple[str, list[dict[str, Any]]]


def report(directories: list[Path], out: Path | None = None) -> list[Path]:
    """Draws training.png (an overview), a PNG a panel, accuracy.png where there are evaluations, and summary.md.

    Args:
      directories: run folders; several are overlaid.
      out: where to write; report/ in the first run where None.

    Returns:
      the files written.

    Raises:
      InputError: if a folder has no metrics.
    """
    runs = [(d.name, read_metrics(d / "metrics.jsonl")) for d in directories]
    out = out or directories[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    panels: dict[str, Callable[[Axes], None]] = {
        name: lambda axes, key=key, label=label: _curve(axes, runs, key, label)  # type: ignore[misc]
        for name, (key, label) in PANELS.items()
    }
    panels["time"] = lambda axes: _time_split(axes, runs[0])
    written = [_save(out / f"{name}.png", [draw], (5.2, 3.4)) for name, draw in panels.items()]
    written.insert(0, _save(out / "training.png", list(panels.values()), (13.5, 7.0)))
    evaluations = {d.name: _evaluations(d) for d in directories}
    if any(evaluations.values()):
        written.append(_save(out / "accuracy.png", [lambda axes: _accuracy(axes, evaluations)], (5.2, 3.4)))
    summary = "\n".join(_summary(name, rows, evaluations[name]) for name, rows in runs)
    write_atomically(out / "summary.md", summary)
    return [*written, out / "summary.md"]


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


def _series(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], float)


def _curve(axes: Axes, runs: list[Run], key: str, label: str) -> None:
    for (name, rows), colour in zip(runs, _colours(len(runs)), strict=True):
        steps, values = _series(rows, "step") + 1, _series(rows, key)
        if not np.isfinite(values).any():
            continue
        many = len(values) > 20
        marker = "o" if len(values) == 1 else None
        axes.plot(steps, values, color=colour, alpha=0.3 if many else 1, linewidth=1, marker=marker,
                  label=None if many else name)  # fmt: skip
        if many:
            axes.plot(steps, smooth(values), color=colour, linewidth=2, label=name)
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)


def _time_split(axes: Axes, run: Run) -> None:
    name, rows = run
    rows = [
        row for row in rows if "time/first_step" not in row
    ] or rows  # compilation dwarfs all that follows
    seconds = [np.nan_to_num(_series(rows, f"time/{phase}")) for phase in PHASES]
    axes.stackplot(_series(rows, "step") + 1, seconds, labels=[p.replace("_", " ") for p in PHASES],
                   colors=COLOURS, alpha=0.85, linewidth=0)  # fmt: skip
    axes.set_ylabel("seconds a step")
    axes.set_xlabel(f"step of {name}, after the first")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    axes.set_ylim(0, 1.3 * max(np.sum(seconds, axis=0).max(), 1e-9))


def _evaluations(directory: Path) -> list[dict[str, Any]]:
    results = []
    for path in sorted((directory / "eval").glob("*.json")):
        try:
            results.append(json.loads(path.read_text()))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}); delete it and evaluate again") from None
    return sorted(results, key=lambda result: (result["step"], result["name"]))


def _accuracy(axes: Axes, evaluations: dict[str, list[dict[str, Any]]]) -> None:
    """Held-out accuracy with 95% intervals: bars where there are two, a curve over steps where there are more."""
    shown = {name: results for name, results in evaluations.items() if results}
    for i, ((name, results), colour) in enumerate(zip(shown.items(), _colours(len(shown)), strict=True)):
        values = np.array([result["accuracy"] for result in results])
        errors = np.abs(np.array([result["ci95"] for result in results]).T - values)
        if len(results) > 2:
            axes.errorbar(
                [r["step"] for r in results], values, errors, color=colour, marker="o", capsize=3, label=name
            )
            axes.set_xlabel("step")
            continue
        width = 0.7 / len(shown)
        at = np.arange(len(results)) + (i - (len(shown) - 1) / 2) * width
        axes.bar(at, values, width, yerr=errors, color=colour, capsize=4, label=name)
        for x, value, top in zip(at, values, values + errors[1], strict=True):
            axes.annotate(
                f"{value:.1%}", (x, top), ha="center", va="bottom", xytext=(0, 3), textcoords="offset points"
            )
        axes.set_xticks(range(len(results)), [f"{r['name']} (step {r['step']})" for r in results])
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("held-out accuracy, 95% interval")
    if len(shown) > 1:
        axes.legend(frameon=False, fontsize=8)


def _save(path: Path, draws: list[Callable[[Axes], None]], size: tuple[float, float]) -> Path:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    columns = min(3, len(draws))
    grid = figure.subplots(-(-len(draws) // columns), columns, squeeze=False)
    for axes, draw in zip(grid.flat, draws, strict=True):
        draw(axes)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    return path


def _summary(name: str, rows: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> str:
    tenth = max(1, len(rows) // 10)
    lines = [f"## {name}", "", f"{len(rows)} steps. First and last are means over {tenth} of them.", ""]
    lines += ["| metric | first | last |", "|---|---|---|"]
    for key in SUMMARY:
        values = _series(rows, key)
        if np.isfinite(values).any():
            lines.append(f"| {key} | {_mean(values[:tenth])} | {_mean(values[-tenth:])} |")
    if evaluations:
        lines += [
            "",
            "| held-out | step | accuracy | 95% interval | problems x samples |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {e['name']} | {e['step']} | {e['accuracy']:.3f} | {e['ci95'][0]:.3f} to {e['ci95'][1]:.3f} "
            f"| {e['problems']} x {e['samples']} |"
            for e in evaluations
        ]
    lines += ["", "| phase | seconds | share |", "|---|---|---|"]
    total = np.nansum(_series(rows, "time/step"))
    for phase in PHASES:
        seconds = np.nansum(_series(rows, f"time/{phase}"))
        lines.append(f"| {phase} | {seconds:,.1f} | {seconds / total if total else 0:.1%} |")
    return "\n".join([*lines, ""])


def _mean(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    return f"{finite.mean():.4g}" if len(finite) else "-"


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]
