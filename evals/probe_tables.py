"""Results of a probe for people: a table, and curves with the zones behind them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from evals.probe import Placed, Probed, Zone

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ZONES: dict[Zone, str] = {
    "cold": "#56B4E9",
    "robust": "#009E73",
    "exploration": "#E69F00",
    "collapse": "#D55E00",
}
CURVES: dict[Literal["accuracy", "distinct_4gram", "entropy"], str] = {
    "accuracy": "accuracy, 95% interval",
    "distinct_4gram": "distinct 4-grams, 95% interval",
    "entropy": "entropy (nats a token)",
}
SIZE = (13.5, 3.8)  # inches, width and height
WIDE = 130  # characters of the table where there is no terminal


def show(probed: Probed) -> None:
    """Prints a table of the results."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    settings = probed["settings"]
    title = "{problems} problems x {samples}, at most {max_tokens:,} tokens".format(**settings)
    table = Table(
        "T", "zone", "accuracy", "below the best", "distinct 4-grams", title=title, title_justify="left"
    )
    for name in ("entropy", "tokens", "truncated"):
        table.add_column(name, justify="right")
    for result, place in zip(probed["results"], probed["zones"], strict=True):
        table.add_row(
            f"{result['temperature']:g}",
            place["zone"],
            _cell(result["accuracy"], result["ci95"]),
            _cell(place["loss"], place["loss_ci95"]),
            _cell(result["distinct_4gram"], result["distinct_4gram_ci95"]),
            f"{result['entropy']:.3f}",
            f"{result['length_mean']:,.0f}",
            f"{result['truncated_fraction']:.1%}",
        )
    console.print(table)


def _cell(value: float, ci95: list[float]) -> str:
    low, high = ci95
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def plot(probed: Probed, path: Path) -> None:
    """Draws accuracy, distinct 4-grams and entropy over temperature, with the zones.

    Args:
      probed: what probe.json has.
      path: the image to write.
    """
    from jaxrl.report import figures  # heavy, and needed last of all

    figures.save(path, [partial(_curve, probed=probed, key=key) for key in CURVES], SIZE)


def _curve(axes: Axes, probed: Probed, key: Literal["accuracy", "distinct_4gram", "entropy"]) -> None:
    results, places = probed["results"], probed["zones"]
    at = [result["temperature"] for result in results]
    values = np.array([result[key] for result in results])
    if key == "entropy":
        axes.plot(at, values, color="#333333", marker="o")
    else:
        name: Literal["ci95", "distinct_4gram_ci95"] = "ci95" if key == "accuracy" else "distinct_4gram_ci95"
        errors = np.abs(np.array([result[name] for result in results]).T - values)
        axes.errorbar(at, values, errors, color="#333333", marker="o", capsize=3)
        axes.set_ylim(0, 1.02)
    for zone, begin, end in bands(places):
        axes.axvspan(begin, end, color=ZONES[zone], alpha=0.18, linewidth=0, label=zone)
    begin, end = bands(places)[0][1], bands(places)[-1][2]
    axes.set_xlim(begin, end)
    axes.set_xlabel("sampling temperature")
    axes.set_ylabel(CURVES[key])
    if key == "accuracy":
        axes.legend(frameon=False, fontsize=8)


def bands(places: list[Placed]) -> list[tuple[Zone, float, float]]:
    """The zones as (name, begin, end) in order; one ends half way to the first temperature of the next."""
    at = [place["temperature"] for place in places]
    margin = 0.5 * min((b - a for a, b in pairwise(at)), default=0.2)
    edges = [at[0] - margin, *((a + b) / 2 for a, b in pairwise(at)), at[-1] + margin]
    found: list[tuple[Zone, float, float]] = []
    for place, begin, end in zip(places, edges, edges[1:], strict=False):
        if found and found[-1][0] == place["zone"]:
            begin = found.pop()[1]
        found.append((place["zone"], begin, end))
    return found
