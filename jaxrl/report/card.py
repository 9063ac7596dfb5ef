"""The summary of runs as one image, for a slide or a post."""

from __future__ import annotations

import io
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxrl.report.headline import Headline, compared, departures, facts, headline, matters, short
from jaxrl.report.panels import colors_of
from jaxrl.report.runs import Run, series, smooth

WIDTH, HEIGHT, DPI = 1200, 630, 100  # pixels, as link previews have them
INK, DIM, RULE = "#1c1f24", "#5c6470", "#dfe2e7"
LISTED = 4  # runs whose results are written out


def png(runs: list[Run]) -> bytes:
    """The image: headline, curve and small print of a run; of several, their results and in what they differ."""
    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    found = [headline(run) for run in runs]
    colors = colors_of(len(runs))

    def write(
        x: float, y: float, text: str, size: float, color: str = INK, bold: bool = False, ha: str = "left"
    ) -> None:
        font = {"size": size, "color": color, "weight": "bold" if bold else "normal", "ha": ha}
        figure.text(x, y, text, font, va="top", linespacing=1.5, parse_math=False)

    if len(runs) == 1:
        top, (first, *_) = 0.66, found
        write(0.05, 0.94, first.change if first else "no result yet", 46, bold=True)
        write(0.05, 0.805, f"{first.measure} of {short(runs[0].name)}" if first else short(runs[0].name), 20)
        write(0.05, 0.735, first.interval if first else "", 12, DIM)
    else:
        shown = min(len(runs), LISTED)
        top = 0.9 - 0.075 * shown
        for i, (run, each, color) in enumerate(zip(runs[:shown], found, colors, strict=False)):
            write(0.05, 0.95 - 0.075 * i, short(run.name, 24), 20, color, bold=True)
            write(0.38, 0.95 - 0.075 * i, each.change if each else "-", 20, bold=True)
            write(0.62, 0.938 - 0.075 * i, f"{each.measure}, {facts(run)[0]}" if each else "", 14, DIM)
    axes = figure.add_axes((0.08, 0.25, 0.87, top - 0.25))
    _curves(axes, runs, found, colors)
    write(0.05, 0.135, textwrap.fill(_small_print(runs), 130, max_lines=4, placeholder=" …"), 11, DIM)
    write(0.95, 0.06, "jaxrl", 13, DIM, bold=True, ha="right")
    image = io.BytesIO()
    figure.savefig(image)
    return image.getvalue()


def _curves(axes: Axes, runs: list[Run], found: list[Headline | None], colors: list[str]) -> None:
    """Accuracy of the sampled answers as lines and evaluations as points; rewards where no headline is of accuracy."""
    percent = any(each and each.percent for each in found)
    scale = 100 if percent else 1
    for run, each, color in zip(runs, found, colors, strict=True):
        values = scale * series(run.rows, "reward/accuracy" if percent else "reward/mean")
        steps = series(run.rows, "step") + 1
        axes.plot(steps, values, color=color, linewidth=1, alpha=0.3)
        axes.plot(steps, smooth(values), color=color, linewidth=2.5)
        if each and each.percent:
            at = [point.step for point in each.points]
            means = scale * np.array([point.value for point in each.points])
            errors = np.abs(scale * np.array([point.ci95 for point in each.points]) - means[:, None]).T
            axes.errorbar(
                at, means, errors, color=color, marker="o", markersize=7, capsize=4, linestyle="none"
            )
            if np.isnan(values).all():
                axes.plot(at, means, color=color, linewidth=2.5)
    label = "accuracy in %: points evaluations,\nline sampled answers" if percent else "mean reward"
    axes.set_ylabel(label, color=DIM)
    axes.set_xlabel("step", color=DIM)
    axes.tick_params(colors=DIM)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _small_print(runs: list[Run]) -> str:
    if len(runs) == 1:
        changes = [
            f"{d.key} {short(d.values[0])} ({short(d.default)})" for d in departures(runs) if matters(d)
        ]
        recipe = (
            ["JustRL but for " + ", ".join(changes) if changes else "JustRL's recipe"]
            if runs[0].recipe
            else []
        )
        return " · ".join([*facts(runs[0]), *recipe])
    differences = [f"{d.key} {' / '.join(map(short, d.values))}" for d in compared(runs)]
    more = f"{len(runs)} runs, of which the first {LISTED} are listed. " if len(runs) > LISTED else ""
    return more + (
        "They differ in " + ", ".join(differences) if differences else "Their recipes are the same."
    )
