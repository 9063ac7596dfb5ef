"""The comparison of variants for people: a page, tables in Markdown, the numbers as JSON, figures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from evals.compare import MEASURES, NOTICED, SEEN, SPENT, Compared, Curve, Finished
from evals.matrix import BASELINE, Cell, Matrix
from evals.paired import POWER
from jaxrl import config
from jaxrl.files import replacing, write_atomically
from jaxrl.report import markdown
from jaxrl.report.panels import COLORS as LINES
from jaxrl.report.panels import OUTCOME_COLORS

PLACES = {"budget": "budget used up", "tokens": "at equal tokens", "seconds": "at equal device seconds"}
COLORS = {"better": OUTCOME_COLORS[0], "worse": OUTCOME_COLORS[2]}
OTHER = "#5c6470"
POINTS = 60  # of a curve


class Table(NamedTuple):
    """Of the page: a title, rows of text, and what they are."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str


def write(
    matrix: Matrix, cells: Sequence[Cell], found: Sequence[Compared], runs: Sequence[Finished]
) -> list[Path]:
    """Writes compare.md, .json and .html, and both figures, into the matrix's folder; returns the paths."""
    folder, tables = Path(matrix.directory), _tables(matrix, cells, found)
    unit, amount = matrix.budget.given
    title = f"Variants of {matrix.baseline}, {amount:,g} {unit} each"
    figures = {
        "differences": (
            "Differences to the baseline, with 95% intervals, colored by verdict",
            _differences(found),
        ),
        "curves": ("Accuracy over tokens sampled: means and ranges over seeds", _curves(found, runs)),
    }
    images = []
    for name, (caption, figure) in figures.items():
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
        with replacing(folder / f"{name}.png") as file:
            file.write(image.getvalue())
        images.append((caption, base64.b64encode(image.getvalue()).decode()))
    lines = [f"# {title}"]
    for table in tables:
        lines += ["", f"## {table.title}", *markdown.table(table.columns, table.rows), "", table.note]
    write_atomically(folder / "compare.md", "\n".join(lines) + "\n")
    numbers = {
        "baseline": matrix.baseline,
        "budget": {unit: amount},
        "variants": [_numbers(each) for each in found],
    }
    write_atomically(folder / "compare.json", json.dumps(numbers, indent=1) + "\n")
    environment = Environment(loader=PackageLoader("evals", "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("compare.html.j2").render(title=title, tables=tables, images=images)
    write_atomically(folder / "compare.html", page)
    return [folder / name for name in ("compare.html", "compare.md", "compare.json")]


def _tables(matrix: Matrix, cells: Sequence[Cell], found: Sequence[Compared]) -> list[Table]:
    rows = [
        [
            each.name,
            str(len(each.seeds)),
            f"{100 * each.accuracy:.1f}",
            *(_difference(each, m) for m in MEASURES),
        ]
        + ([each.verdict()] if each.corrected else [""])
        for each in found
    ]
    tables = [
        Table(
            "Accuracy",
            ["variant", "seeds", "%", *PLACES.values(), "verdict"],
            rows,
            "Accuracy on held-out problems with the budget used up, and differences to the baseline in points, paired "
            "over seeds and problems. The 95% intervals are of each variant's own runs (Student's, with the standard "
            "error of a bootstrap over seeds and problems). The p-values borrow from how much all variants vary over "
            f"seeds, and are corrected for their number (Holm). There is a verdict below p = {SEEN:g} where the "
            "interval excludes 0, for the budget used up; else, how many seeds would show a difference of "
            f"{100 * NOTICED:g} points in {100 * POWER:g} of 100 cases. Equal tokens and device seconds are those of "
            "the run that took least.",
        )
    ]
    if matrix.accuracies:
        reached = [[each.name, *(_reached(each, a) for a in matrix.accuracies)] for each in found]
        tables.append(
            Table(
                "Tokens and device seconds to an accuracy",
                ["variant", *(f"{100 * a:g}%" for a in matrix.accuracies)],
                reached,
                "Medians over the runs that reach it, and how many of them do.",
            )
        )
    names = list(found[0].totals)
    tables.append(
        Table(
            "What runs took, and what they were like at the end",
            ["variant", *names],
            [[each.name, *(_short(each.totals[name]) for name in names)] for each in found],
            "Means over seeds. Device seconds are of the trainer's devices in steps, without evaluations. Entropy "
            "(nats), length (tokens) and the share of truncated answers are those of the last tenth of steps.",
        )
    )
    tables.append(
        Table(
            "What each one changes",
            ["variant", "values"],
            [[name, "; ".join(lines)] for name, lines in _changes(cells).items() if lines],
            f"Of the baseline, {matrix.baseline} with the matrix's own values.",
        )
    )
    return tables


def _changes(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """In which keys each variant's recipe is not the baseline's, by name."""
    own = {cell.variant: cell.recipe for cell in reversed(cells)}  # of the first seed
    base = own.pop(BASELINE)
    found = {name: config.differences(base, recipe) for name, recipe in own.items()}
    return {
        name: [line for line in lines if not line.startswith("run.directory:")]
        for name, lines in found.items()
    }


def _difference(each: Compared, measure: str) -> str:
    found = each.differences[measure]
    if not each.corrected:
        return ""
    if not math.isfinite(found.low):
        return f"{100 * found.mean:+.1f}"
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.mean:+.1f} ({low:+.1f} to {high:+.1f}), p = {each.corrected[measure]:.2g}"


def _reached(each: Compared, accuracy: float) -> str:
    runs, tokens, seconds = each.reached[accuracy]
    return f"{_short(tokens)} tokens, {_short(seconds)} s ({runs} of {len(each.seeds)})" if runs else "none"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _numbers(each: Compared) -> dict[str, object]:
    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    differences = {
        measure: finite(found._asdict()) | {"p_holm": each.corrected.get(measure)}
        for measure, found in each.differences.items()
    }
    reached = {
        f"{accuracy:g}": finite({"runs": runs, "tokens": tokens, "seconds": seconds})
        for accuracy, (runs, tokens, seconds) in each.reached.items()
    }
    return {
        "variant": each.name,
        "seeds": each.seeds,
        "accuracy": each.accuracy,
        "verdict": each.verdict() if each.corrected else None,
        "differences": differences,
        "seeds_needed": each.needed or None,
        "reached": reached,
        "totals": finite(dict(each.totals)),
    }


def _differences(found: Sequence[Compared]) -> Figure:
    """Each variant's differences, a panel for each place where accuracies are compared."""
    ordered = sorted(found[1:], key=lambda each: each.differences["budget"].mean)
    figure = Figure(figsize=(13, 1.5 + 0.3 * len(ordered)), dpi=110, layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        axes.axvline(0, color="#999", linewidth=1)
        for place, each in enumerate(ordered):
            color = COLORS.get(each.verdict(), OTHER)
            at = each.differences[measure]
            if math.isfinite(at.low):
                axes.plot([100 * at.low, 100 * at.high], [place, place], color=color, linewidth=2)
            axes.plot(100 * at.mean, place, "o", color=color)
        axes.set_xlabel(f"points, {PLACES[measure]}")
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(ordered)), [each.name for each in ordered])
    return figure


def _curves(found: Sequence[Compared], runs: Sequence[Finished]) -> Figure:
    """A panel for each variant, with the baseline in gray."""
    curves = {
        each.name: [
            run.curve for run in runs if run.cell.variant == each.name and run.cell.seed in each.seeds
        ]
        for each in found
    }
    others = [each for each in found if each.name != BASELINE] or list(found)
    columns = min(5, len(others))
    rows = math.ceil(len(others) / columns)
    figure = Figure(figsize=(3 * columns, 2.4 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, each in zip(panels, others, strict=False):
        for name, color in ((BASELINE, "#999"), (each.name, COLORS.get(each.verdict(), LINES[0]))):
            places, values = _band(curves[name])
            axes.plot(places, 100 * values.mean(axis=0), color=color)
            axes.fill_between(
                places, 100 * values.min(axis=0), 100 * values.max(axis=0), color=color, alpha=0.15
            )
        axes.set_title(each.name, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
    for axes in list(figure.axes)[len(others) :]:
        axes.set_visible(False)
    figure.supxlabel("tokens sampled", fontsize=9)
    figure.supylabel("accuracy, %", fontsize=9)
    return figure


def _band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Places on the axis of tokens that all curves have, and each curve's accuracy there."""
    axis = SPENT[0]
    places = np.linspace(0, min(getattr(curve, axis)[-1] for curve in curves), POINTS)
    return places, np.array([[curve.at(getattr(curve, axis), x).mean() for x in places] for curve in curves])
