"""The comparison of variants for people: a page, a table in Markdown, the numbers as JSON."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evals.compare import NOTICED, SEEN, Compared, Finished
from evals.matrix import BASELINE, Cell, Matrix
from evals.paired import POWER, Difference
from jaxrl import config
from jaxrl.files import replacing, write_atomically
from jaxrl.report.markdown import table
from jaxrl.report.panels import colors_of

MEASURES = {"final": "at the end", "tokens": "at equal tokens", "seconds": "at equal seconds"}


def write(
    matrix: Matrix, cells: Sequence[Cell], found: Sequence[Compared], runs: Sequence[Finished]
) -> list[Path]:
    """Writes compare.md, compare.json, compare.png and compare.html into the matrix's folder; returns the paths."""
    folder = Path(matrix.directory)
    changes = _changes(cells)
    lines = _markdown(matrix, found, changes)
    image = _curves(runs, [each.name for each in found])
    write_atomically(folder / "compare.md", "\n".join(lines) + "\n")
    write_atomically(folder / "compare.json", json.dumps([_numbers(each) for each in found], indent=1) + "\n")
    with replacing(folder / "compare.png") as file:
        file.write(image)
    write_atomically(folder / "compare.html", _page(lines, image))
    return [folder / f"compare.{kind}" for kind in ("md", "json", "png", "html")]


def _changes(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """In which keys each variant's recipe is not the baseline's, by name."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.variant, cell)
    base = first[BASELINE].recipe
    found = {name: config.differences(base, cell.recipe) for name, cell in first.items()}
    return {
        name: [line for line in lines if not line.startswith("run.directory:")]
        for name, lines in found.items()
    }


def _markdown(matrix: Matrix, found: Sequence[Compared], changes: dict[str, list[str]]) -> list[str]:
    base = next(each for each in found if each.name == BASELINE)
    budget = next(f"{v:,g} {k}" for k, v in vars(matrix.budget).items() if v)
    title = f"# Variants of {matrix.baseline}, {budget} each"
    rows = [
        [
            each.name,
            str(len(each.seeds)),
            f"{each.final:.1%}",
            *(_cell(each, m) for m in MEASURES),
            each.verdict(),
        ]
        for each in found
        if each is not base
    ]
    columns = ["variant", "seeds", "held-out", *MEASURES.values(), "verdict"]
    lines = [
        title,
        *table(columns, [["baseline", str(len(base.seeds)), f"{base.final:.1%}", *[""] * 4], *rows]),
    ]
    lines += [
        "",
        "Differences of held-out accuracy to the baseline in points, paired over seeds and problems, with 95% intervals "
        "(a bootstrap of both, Student's quantiles for the seeds), and p-values corrected for the number of variants "
        f"(Holm). A verdict is given below p = {SEEN:g}. Seeds are said by which a difference of {NOTICED:.0%} would be "
        f"seen {POWER:.0%} of the time. Equal tokens and seconds are what the run took that took least.",
    ]
    if matrix.accuracies:
        rows = [[each.name, *(_reached(each, a) for a in matrix.accuracies)] for each in found]
        lines += [
            "",
            "## Tokens and seconds to an accuracy",
            *table(["", *(f"{a:.0%}" for a in matrix.accuracies)], rows),
        ]
        lines += ["", "Medians over the runs that reach it, and how many do."]
    names = list(base.totals)
    rows = [[each.name, *(f"{each.totals[name]:,.4g}" for name in names)] for each in found]
    lines += ["", "## What they took, and what they were like at the end", *table(["", *names], rows)]
    lines += ["", "Means over seeds; entropy, length and truncation of the last tenth of steps."]
    lines += [
        "",
        "## What each changes",
        *table(["variant", "values"], [[n, "; ".join(c)] for n, c in changes.items() if c]),
    ]
    return lines


def _cell(each: Compared, measure: str) -> str:
    found = each.differences[measure]
    if not math.isfinite(found.low):
        return f"{100 * found.mean:+.1f}"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f}), p {each.corrected[measure]:.2g}"


def _reached(each: Compared, accuracy: float) -> str:
    runs, tokens, seconds = each.reached[accuracy]
    return f"{tokens:,.3g} tokens, {seconds:,.3g} s ({runs} of {len(each.seeds)})" if runs else "none"


def _numbers(each: Compared) -> dict[str, object]:
    return {
        "variant": each.name,
        "seeds": each.seeds,
        "accuracy": each.final,
        "differences": {
            measure: _of(d) | {"p_holm": each.corrected.get(measure)}
            for measure, d in each.differences.items()
        },
        "seeds_needed": each.needed,
        "reached": {str(k): v if v[0] else None for k, v in each.reached.items()},
        "totals": each.totals,
    }


def _of(found: Difference) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def _curves(runs: Sequence[Finished], names: Sequence[str]) -> bytes:
    """Held-out accuracy over steps, tokens and seconds: means over seeds, with bands from the least to the most."""
    figure = Figure(figsize=(15, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, axis in zip(figure.subplots(1, 3, sharey=True), ("steps", "tokens", "seconds"), strict=True):
        for name, color in zip(names, colors_of(len(names)), strict=True):
            curves = [each.curve for each in runs if each.cell.variant == name]
            end = min(getattr(curve, axis)[-1] for curve in curves)
            places = np.linspace(0, end, 60)
            values = np.array(
                [[curve.at(getattr(curve, axis), x).mean() for x in places] for curve in curves]
            )
            axes.plot(places, 100 * values.mean(axis=0), color=color, label=name)
            axes.fill_between(
                places, 100 * values.min(axis=0), 100 * values.max(axis=0), color=color, alpha=0.12
            )
        axes.set_xlabel(axis)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out accuracy in %")
    figure.axes[0].legend(fontsize=8)
    image = io.BytesIO()
    figure.savefig(image)
    return image.getvalue()


def _page(lines: Sequence[str], image: bytes) -> str:
    """The Markdown's headings, tables and paragraphs as a page of its own."""
    parts, rows = [], list[str]()
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        if rows:
            head, _, *body = [[escape(cell) for cell in row.strip("| ").split(" | ")] for row in rows]
            parts.append("<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>")
            parts += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
            parts.append("</table>")
            rows = []
        if line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            parts.append(f"<h{level}>{escape(line[level + 1 :])}</h{level}>")
        elif line:
            parts.append(f"<p>{escape(line)}</p>")
    source = base64.b64encode(image).decode()
    parts.insert(
        1, f'<img alt="held-out accuracy" src="data:image/png;base64,{source}" style="max-width: 100%">'
    )
    style = (
        "body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem } "
        "table { border-collapse: collapse } td, th { text-align: left; padding: .3rem .8rem .3rem 0; "
        "border-bottom: 1px solid #ccc; vertical-align: top }"
    )
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>Variants</title><style>{style}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(parts)}</html>\n"
